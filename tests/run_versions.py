# SPDX-License-Identifier: Apache-2.0
"""Run the tests against several versions of Python and transformers, each in a fresh virtual environment.

    python tests/run_versions.py                 # all combinations whose interpreter is installed
    python tests/run_versions.py --only 3.11     # those of one Python

Prints a table in Markdown, which the README carries. Tests of the examples are left out: they need data libraries
rather than hf_nsf's own requirements.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
TESTS = ["tests/optim", "tests/control", "tests/trainer"]
# Python, and a requirement for transformers; None is the version of the constraints file.
COMBINATIONS = [
    ("3.10", "transformers==5.2.0"),
    ("3.10", "transformers<5.21"),  # the newest line that takes Python 3.10
    ("3.11", "transformers==5.2.0"),
    ("3.11", None),
    ("3.12", None),
    ("3.13", None),
]
PACKAGES = ["accelerate", "pytest", "pytest-timeout", "datasets", "optuna", "tensorboard", "pyyaml", "numba"]


def interpreter(version: str) -> str | None:
    """Path of the Python of that version, or None."""
    found = [shutil.which(f"python{version}")]
    found += sorted(map(str, (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")))
    for path in filter(None, found):
        answer = subprocess.run([path, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.startswith(f"{version}."):
            return path
    return None


def pinned(name: str) -> str:
    """The line of the constraints file for one package."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def run_one(version: str, transformers: str | None) -> tuple[str, str, str]:
    """Install and test one combination; returns the versions of torch and transformers, and the result."""
    python = interpreter(version)
    if python is None:
        return "", transformers or pinned("transformers"), f"not run: no Python {version} here"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = f"{folder}/bin/python"
        pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first and pinned: an open requirement may bring other builds of it.
        for packages in ([pinned("torch")], [transformers or pinned("transformers"), *PACKAGES], ["--no-deps", "."]):
            done = subprocess.run([*pip, *packages], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                return "", transformers or pinned("transformers"), f"not installed: {done.stderr.splitlines()[-1]}"
        show = "import torch, transformers; print(torch.__version__, transformers.__version__)"
        versions = subprocess.run([own, "-c", show], capture_output=True, text=True, check=True).stdout.split()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        command = [own, "-m", "pytest", "-q", *TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        result = ", ".join(re.findall(r"\d+ (?:passed|skipped|failed|errors?)", last)) or "no result"
        if done.returncode:
            print(done.stdout[-3000:], file=sys.stderr)
        return versions[0].split("+")[0], versions[1], result


def main() -> int:
    """Run the combinations asked for and print the table; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only this Python, e.g. 3.12")
    only = parser.parse_args().only
    rows = ["| Python | torch | transformers | tests |", "|---|---|---|---|"]
    for version, transformers in COMBINATIONS:
        if only in (None, version):
            rows.append(f"| {version} | " + " | ".join(run_one(version, transformers)) + " |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))
    return int(any("failed" in row or "error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
