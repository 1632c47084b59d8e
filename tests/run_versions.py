# SPDX-License-Identifier: Apache-2.0
"""Run the default tests with several versions of Python, torch and transformers, each in a fresh virtual environment.

    python tests/run_versions.py                 # all combinations whose interpreter is installed
    python tests/run_versions.py --only 3.11     # those of one Python

A combination names what it asks for; every other version is that of tests/constraints.txt, as far as this Python takes
it. Prints a table in Markdown, which tests/README.md carries. Ends with 1 if a test failed or a combination gave no
result; an interpreter that is not here is only said to be missing.
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
FLOORS = ["torch==2.7.0", "accelerate==1.7.0", "transformers==5.2.0"]
COMBINATIONS = [
    ("3.10", FLOORS),  # those of pyproject.toml
    ("3.10", ["transformers<5.21"]),  # the newest line that takes Python 3.10
    ("3.11", ["transformers==5.2.0"]),
    ("3.11", []),
    ("3.11", ["transformers>=5.24"]),  # the newest there is
    ("3.12", []),
    ("3.13", []),
]
SHOWN = ("torch", "accelerate", "transformers")
# What another version of transformers or torch chooses for itself.
ITS_OWN = {"transformers": ("tokenizers", "huggingface_hub"), "torch": ("numba", "llvmlite", "numpy", "triton")}


def interpreter(version: str) -> str | None:
    """Path of the Python of that version, or None."""
    found = [shutil.which(f"python{version}")]
    found += sorted(map(str, (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")))
    for path in filter(None, found):
        answer = subprocess.run([path, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.startswith(f"{version}."):
            return path
    return None


def constraints(pip: list[str], asked: list[str]) -> list[str]:
    """The lines of the constraints file, but for what is asked for otherwise and what this Python does not take."""
    names = [re.split(r"[<=>]", each)[0] for each in asked]
    free = {*names, *(other for name in names for other in ITS_OWN.get(name, ()))}
    kept = []
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if version and name not in free:
            known = subprocess.run([*pip, "index", "versions", name], capture_output=True, text=True).stdout
            if re.search(rf"(?<![\w.]){re.escape(version)}(?![\w.])", known):
                kept.append(line)
    return kept


def run_one(version: str, asked: list[str]) -> tuple[list[str], bool]:
    """Install and test one combination; returns its cells (versions, result), and whether all is well."""
    unknown = [""] * len(SHOWN)
    python = interpreter(version)
    if python is None:
        return [*unknown, f"not run: no Python {version} here"], True
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        if run([python, "-m", "venv", folder]).returncode:
            return [*unknown, "not installed: no virtual environment"], False
        own = f"{folder}/bin/python"
        pip = [own, "-m", "pip", "--disable-pip-version-check"]
        kept = Path(folder, "constraints.txt")
        kept.write_text("\n".join([*constraints(pip, asked), *asked]), encoding="utf-8")
        # torch first: an open requirement may bring other builds of it.
        for packages in (["torch"], ["-e", ".[test]"]):
            done = run([*pip, "install", "--quiet", "-c", str(kept), *packages])
            if done.returncode:
                return [*unknown, f"not installed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"], False
        show = f"import importlib.metadata as m; print(*map(m.version, {SHOWN}))"
        versions = run([own, "-c", show]).stdout.split() or unknown
        # Old versions deprecate each other, which the default run takes for errors.
        warnings = ["-o", "filterwarnings="] if asked and ">=" not in asked[0] else []
        done = run([own, "-m", "pytest", "-q", *warnings])
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        result = ", ".join(re.findall(r"\d+ (?:passed|skipped|failed|errors?)", last)) or "no result"
        well = done.returncode == 0 and "passed" in result
        if not well:
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
            result += f" (pytest ended with {done.returncode})"
        return [*(each.split("+")[0] for each in versions), result], well


def main() -> int:
    """Run the combinations asked for and print the table; 1 if a test failed or one gave no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys(version for version, _ in COMBINATIONS))
    parser.add_argument("--only", choices=known, help="only this Python, e.g. 3.12")
    only = parser.parse_args().only
    rows, all_well = [f"| Python | {' | '.join(SHOWN)} | tests |", "|---" * (len(SHOWN) + 2) + "|"], True
    for version, asked in COMBINATIONS:
        if only in (None, version):
            cells, well = run_one(version, asked)
            all_well = all_well and well
            rows.append(f"| {version} | " + " | ".join(cells) + " |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))
    return int(not all_well)


if __name__ == "__main__":
    sys.exit(main())
