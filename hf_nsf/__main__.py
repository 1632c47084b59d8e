# SPDX-License-Identifier: Apache-2.0
"""Run a script, module or command that knows nothing of hf_nsf with both optimizers registered: see `--help`.

The script gets a Python of its own, so that arguments, sys.path, `__main__`, tracebacks and exit status are Python's.
What registers there, and in its child processes, is `_site/sitecustomize.py`, found through PYTHONPATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HELP = """\
usage: python -m hf_nsf SCRIPT [arguments]        torchrun [options] -m hf_nsf SCRIPT [arguments]
       python -m hf_nsf -m MODULE [arguments]     accelerate launch [options] -m hf_nsf SCRIPT [arguments]
       python -m hf_nsf COMMAND [arguments]

Run SCRIPT, MODULE or COMMAND unmodified, as without hf_nsf, and let transformers' Trainer know two more optimizers:
  --optim lcam   SGD whose momentum follows the loss   --optim_args low_loss_momentum=0.9,high_loss_momentum=0.95,...
  --optim nsf    AdamW whose exponent p cycles         --optim_args p_min=-0.25,p_max=0.5,cycles=8,...
Python processes that it starts know them too, so tools that train in child processes need no more than this:
  python -m hf_nsf trl sft --optim nsf --model_name_or_path ...
"""
_SITE = str(Path(__file__).with_name("_site"))


def _python_options(count: int) -> list[str]:
    """The options of this process's Python: what stands before `-m hf_nsf` and the `count` arguments after it."""
    options = sys.orig_argv[1 : len(sys.orig_argv) - count]
    text = options.pop() if options else ""
    if text == "hf_nsf":
        text = (options.pop() if options else "") + text
    if not text.endswith("mhf_nsf"):
        return []  # not started by -m
    letters = text.removesuffix("mhf_nsf")  # "-", or "-u" from -um hf_nsf
    return [*options, letters] if letters != "-" else options


def _command(arguments: list[str]) -> list[str]:
    """What to execute; a ValueError says why there is nothing."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise ValueError("Python's options -E, -I and -S keep hf_nsf from reaching the script.")
    name = arguments[0]
    if name == "-m" or Path(name).is_file() or Path(name, "__main__.py").is_file():
        return [sys.executable, *_python_options(len(arguments)), *arguments]
    if name.startswith("-"):
        raise ValueError(f"there is no option {name}; the script comes first.")
    # A command of this environment, activated or not, before those of the system.
    found = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if found is None:
        raise ValueError(f"there is no script and no command {name}.")
    return [found, *arguments[1:]]


def main(arguments: list[str]) -> int:
    """Replace this process by what the arguments name; returns (an exit status) only where that cannot be."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if not arguments or arguments == ["-m"]:
        print(HELP, end="", file=sys.stderr)
        return 2
    try:
        command = _command(arguments)
    except ValueError as error:
        print(f"python -m hf_nsf: {error}", file=sys.stderr)
        return 2
    given = os.environ.get("PYTHONPATH")
    others = [path for path in given.split(os.pathsep) if path != _SITE] if given else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_SITE, *others])}
    if os.name == "nt":  # exec returns to the shell at once there
        return subprocess.call(command, env=environment)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
