# SPDX-License-Identifier: Apache-2.0
"""Run the tests against several versions of Python and transformers, each in a fresh virtual environment.

    python tests/run_versions.py                 # all combinations whose interpreter is installed
    python tests/run_versions.py --only 3.11     # those of one Python

Each environment is what `pip install -c tests/constraints.txt -e ".[dev]"` makes, but for the version of transformers
where another is asked for and for what that one or that Python does not take, and runs the default test command,
`python -m pytest`. Prints a table in Markdown, which the README carries. Ends with 1 if a test failed or a combination
gave no result; an interpreter that is not here is only said to be missing.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
TESTS: list[str] = []  # nothing more than `python -m pytest`: the default tests
# Python, and a requirement for transformers; None is the version of the constraints file.
COMBINATIONS = [
    ("3.10", "transformers==5.2.0"),
    ("3.10", "transformers<5.21"),  # the newest line that takes Python 3.10
    ("3.11", "transformers==5.2.0"),
    ("3.11", None),
    ("3.12", None),
    ("3.13", None),
]
# What another version of transformers chooses for itself.
ITS_OWN = ("transformers", "tokenizers", "huggingface_hub")


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


def constraints(pip: list[str], transformers: str | None) -> list[str]:
    """The lines of the constraints file but for those of another transformers and what this Python does not take."""
    kept = []
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if not version or (transformers and name in ITS_OWN):
            continue
        known = subprocess.run([*pip, "index", "versions", name], capture_output=True, text=True).stdout
        if re.search(rf"(?<![\w.]){re.escape(version)}(?![\w.])", known):
            kept.append(line)
    return kept


def run_one(version: str, transformers: str | None) -> tuple[list[str], bool]:
    """Install and test one combination; returns its cells (torch, transformers, result), and whether all is well."""
    asked = transformers or pinned("transformers")
    python = interpreter(version)
    if python is None:
        return ["", asked, f"not run: no Python {version} here"], True
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        if run([python, "-m", "venv", folder]).returncode:
            return ["", asked, "not installed: no virtual environment"], False
        own = f"{folder}/bin/python"
        pip = [own, "-m", "pip", "--disable-pip-version-check"]
        kept = Path(folder, "constraints.txt")
        kept.write_text("\n".join(constraints(pip, transformers)), encoding="utf-8")
        # torch first: an open requirement may bring other builds of it.
        for packages in ([pinned("torch")], [asked, "-e", ".[dev]"]):
            done = run([*pip, "install", "--quiet", "-c", str(kept), *packages])
            if done.returncode:
                return ["", asked, f"not installed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"], False
        shown = run([own, "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)"])
        if shown.returncode:
            print(shown.stderr[-3000:], file=sys.stderr)
            return ["", asked, "no result: torch or transformers cannot be imported"], False
        versions = shown.stdout.split()[-2:]
        done = run([own, "-m", "pytest", "-q", *TESTS])
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        result = ", ".join(re.findall(r"\d+ (?:passed|skipped|failed|errors?)", last)) or "no result"
        well = done.returncode == 0 and "passed" in result
        if not well:
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
            result += f" (pytest ended with {done.returncode})"
        return [versions[0].split("+")[0], versions[1], result], well


def main() -> int:
    """Run the combinations asked for and print the table; 1 if a test failed or one gave no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys(version for version, _ in COMBINATIONS))
    parser.add_argument("--only", choices=known, help="only this Python, e.g. 3.12")
    only = parser.parse_args().only
    rows, all_well = ["| Python | torch | transformers | tests |", "|---|---|---|---|"], True
    for version, transformers in COMBINATIONS:
        if only in (None, version):
            cells, well = run_one(version, transformers)
            all_well = all_well and well
            rows.append(f"| {version} | " + " | ".join(cells) + " |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))
    return int(not all_well)


if __name__ == "__main__":
    sys.exit(main())
