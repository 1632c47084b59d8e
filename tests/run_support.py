# SPDX-License-Identifier: Apache-2.0
"""Run every test behind the table of what is supported in tests/README.md, and write their results into it.

    pip install -c tests/constraints.txt -e ".[ecosystem]"
    python tests/run_support.py            # the slow tests and those of the ecosystem too
    python tests/run_support.py --junit A.xml B.xml   # from what `pytest --junitxml` wrote; later files win

The second column names files of this folder, or single tests of them. Ends with 1, and leaves the table alone, if a
test failed or one is missing.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "tests" / "README.md"
START, END = "<!-- support: results by tests/run_support.py -->\n", "<!-- end of support -->"
ROW = re.compile(r"(\| .* \| )(`.*`)( \| ).*( \|)")


def counts(results: list[str]) -> str:
    """How many tests had which result, in words."""
    found = collections.Counter(results)
    return ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "skipped", "failed") if found[kind]) or "not run"


def tests_of(names: str) -> list[str]:
    """The tests that a row names."""
    return [f"tests/{name}" for name in re.findall("`(.*?)`", names)]


def run(junit: Path, tests: set[str]) -> None:
    """Run tests; pytest writes what became of them to a file."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or ecosystem or not slow", f"--junitxml={junit}"]
    subprocess.run([*command, "--timeout=1800", *sorted(tests)], cwd=ROOT, check=False)


def read(*junits: Path) -> dict[str, list[str]]:
    """Results by claimed name from pytest's files; where a test stands in several, the last one counts."""
    last: dict[tuple[str, str], str] = {}
    for junit in junits:
        for case in ElementTree.parse(junit).iter("testcase"):
            kinds = {child.tag for child in case}
            result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            last[case.get("classname", "").replace(".", "/") + ".py", case.get("name", "")] = result
    found: dict[str, list[str]] = collections.defaultdict(list)
    for (file, name), result in last.items():
        found[file].append(result)
        found[f"{file}::{name.partition('[')[0]}"].append(result)
    return found


def main() -> int:
    """Parse the arguments, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", nargs="+", type=Path, help="Run nothing; read these.")
    options = parser.parse_args()
    before, rest = README.read_text(encoding="utf-8").split(START)
    table, after = rest.split(END)
    tests = {name for row in ROW.finditer(table) for name in tests_of(row[2])}
    with tempfile.TemporaryDirectory() as folder:
        if options.junit is None:
            run(Path(folder, "junit.xml"), tests)
        results = read(*(options.junit or [Path(folder, "junit.xml")]))

    def with_results(row: re.Match[str]) -> str:
        found = counts([result for name in tests_of(row[2]) for result in results.get(name, [])])
        return f"{row[1]}{row[2]}{row[3]}{found}{row[4]}"

    made = ROW.sub(with_results, table)
    print(made)
    failed = any("failed" in some for some in results.values())
    if failed or not tests <= results.keys():
        print("Not every test passed: the table stays as it is.", file=sys.stderr)
        return 1
    README.write_text(before + START + made + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
