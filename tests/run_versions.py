# SPDX-License-Identifier: Apache-2.0
"""Run the default tests with several Pythons, each in an environment of its own, and print the table of results.

    python3.12 -m venv env312
    env312/bin/pip install -e ".[test]"        # with "torch==2.7.0" and the like for other versions than the newest
    python tests/run_versions.py env312/bin/python ...

The table is that of tests/README.md. Ends with 1 if a test failed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "accelerate", "transformers")
SHOW = f"import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, {SHOWN}))"


def main(pythons: list[str]) -> int:
    """Run the tests with each Python and print the table; 1 if a test failed."""
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    usual = dict(line.split("==") for line in lines if "==" in line)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    print(f"| Python | {' | '.join(SHOWN)} | default tests |", "|---" * (len(SHOWN) + 2) + "|", sep="\n", flush=True)
    failed = False
    for python in pythons:
        shown = subprocess.run([python, "-c", SHOW], capture_output=True, text=True, check=True).stdout
        version, *versions = (each.split("+")[0] for each in shown.split())
        # Deprecations are errors by default, but old packages deprecate each other.
        old = any(Version(found) < Version(usual[name]) for name, found in zip(SHOWN, versions, strict=True))
        command = [python, "-m", "pytest", "-q", *(["-o", "filterwarnings="] if old else [])]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        result = ", ".join(re.findall(r"\d+ (?:passed|skipped|failed|errors?)", done.stdout[-200:])) or "no result"
        print("|", " | ".join([version, *versions, result]), "|", flush=True)
        if done.returncode:
            failed = True
            print(done.stdout[-5000:], file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
