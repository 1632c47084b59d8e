# SPDX-License-Identifier: Apache-2.0
"""Write the results of tests into the table of what is supported in tests/README.md.

    python -m pytest -m "slow or ecosystem or not slow" --timeout=1800 --junitxml=all.xml
    python tests/run_support.py all.xml ...   # where a test stands in several files, the last one counts

The table's second column names files of this folder, or single tests of them. Ends with 1, and leaves the table alone,
if a test failed or one is missing.
"""

import collections
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

README = Path(__file__).with_name("README.md")
ROW = re.compile(r"(\| .* \| )(`.*`)( \| ).*( \|)")


def read(junits: list[str]) -> dict[str, collections.Counter[str]]:
    """The number of tests with each result, by file and by test."""
    last: dict[tuple[str, str], str] = {}
    for junit in junits:
        for case in ElementTree.parse(junit).iter("testcase"):
            kinds = {child.tag for child in case}
            result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            file = case.get("classname", "").removeprefix("tests.").replace(".", "/") + ".py"
            last[file, case.get("name", "")] = result
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for (file, name), result in last.items():
        found[file][result] += 1
        found[f"{file}::{name.partition('[')[0]}"][result] += 1
    return found


def main(junits: list[str]) -> int:
    """Write the table; 1 if a test failed or is missing."""
    found, missing = read(junits), []

    def with_results(row: re.Match[str]) -> str:
        names = re.findall("`(.*?)`", row[2])
        missing.extend(name for name in names if name not in found)
        total = sum((found[name] for name in names), collections.Counter())
        return f"{row[1]}{row[2]}{row[3]}{', '.join(f'{total[kind]} {kind}' for kind in sorted(total))}{row[4]}"

    start, table, end = re.split("(?<=tests/run_support.py -->\n)|(?=<!-- end of support)", README.read_text("utf-8"))
    table = ROW.sub(with_results, table)
    print(table)
    if missing or any(results["failed"] for results in found.values()):
        print("Not every test passed: the table stays as it is.", *missing, file=sys.stderr)
        return 1
    README.write_text(start + table + end, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
