# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified script, module or command with both optimizers registered: see `--help`.

The script gets a Python process of its own, so that arguments, sys.path, `__main__`, tracebacks and exit status are
Python's. `_site/sitecustomize.py`, found through PYTHONPATH, registers in it and in its child processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HELP = """\
usage: python -m hf_nsf SCRIPT [arguments]        torchrun [options] -m hf_nsf SCRIPT [arguments]
       python -m hf_nsf -m MODULE [arguments]     accelerate launch [options] -m hf_nsf SCRIPT [arguments]
       python -m hf_nsf COMMAND [arguments]       deepspeed [options] --module hf_nsf SCRIPT [arguments]

Run SCRIPT, MODULE or COMMAND unmodified, and add two optimizers to transformers' Trainer:
  --optim lcam   SGD whose momentum follows the loss   --optim_args low_loss_momentum=0.9,high_loss_momentum=0.95,...
  --optim nsf    AdamW whose exponent p cycles         --optim_args p_min=-0.25,p_max=0.5,cycles=8,...
Child Python processes have them, too, so tools that train in child processes need nothing else:
  python -m hf_nsf trl sft --optim nsf --model_name_or_path ...
"""
_SITE = str(Path(__file__).with_name("_site"))


def _python() -> list[str]:
    """This Python with the options it was given, which precede `-m hf_nsf`."""
    unbuffered = ["-u"] if getattr(sys.stdout, "write_through", False) else []  # as torchrun starts its processes
    return [sys.executable, *subprocess._args_from_interpreter_flags(), *unbuffered]  # type: ignore[attr-defined]


def _is_for_python(name: str) -> bool:
    """Whether `name` is a script, a folder or an archive for Python, and not another executable such as ./train.sh."""
    if not os.path.isfile(name):
        return os.path.isfile(os.path.join(name, "__main__.py"))
    with open(name, "rb") as file:
        first = file.readline(200)
    names = [os.path.basename(word) for word in first[2:].split()]
    for_python = first.startswith(b"#!") and any(name.startswith(b"python") for name in names)
    return for_python or not (first.startswith((b"#!", b"\x7fELF")) and os.access(name, os.X_OK))


def _command(arguments: list[str], environment: dict[str, str]) -> list[str]:
    """Return the command to execute, and extend PATH for it; a ValueError names what is wrong."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise ValueError("Python's options -E, -I and -S keep hf_nsf from reaching the script.")
    rest = list(arguments)
    # deepspeed --module and torch.distributed.launch --module put the script's first argument before the script.
    ranks = [rest.pop(0)] if rest[0].startswith(("--local_rank=", "--local-rank=")) else []
    if not rest:
        raise ValueError(f"there is no script after {ranks[0]}.")
    name, *rest = rest
    if name == "-m" and rest:
        return [*_python(), "-m", rest[0], *ranks, *rest[1:]]
    if _is_for_python(name):
        return [*_python(), name, *ranks, *rest]
    if name.startswith("-"):
        raise ValueError(f"there is no option {name}; the script comes first.")
    # A command of this environment, even if it is not activated, before those of the system.
    own, path = os.path.dirname(sys.executable), environment.get("PATH", "")
    found = name if os.path.isfile(name) else shutil.which(name, path=os.pathsep.join([own, path]))
    if found is None:
        raise ValueError(f"there is no script and no command {name}.")
    if os.path.dirname(found) == own:  # it may start accelerate or torchrun by name
        environment["PATH"] = os.pathsep.join([own, path])
    return [found, *ranks, *rest]


def main(arguments: list[str]) -> int:
    """Replace this process by the command in `arguments`; returns an exit status only if that is not possible."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if not arguments or arguments == ["-m"]:
        print(HELP, end="", file=sys.stderr)
        return 2
    given = os.environ.get("PYTHONPATH")
    others = [folder for folder in given.split(os.pathsep) if folder != _SITE] if given else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_SITE, *others])}
    try:
        command = _command(arguments, environment)
        if os.name == "nt":  # exec returns to the shell at once there
            return subprocess.call(command, env=environment)
        sys.stdout.flush()
        for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and exec would hand that on
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        os.execve(command[0], command, environment)
    except (OSError, ValueError) as error:
        print(f"python -m hf_nsf: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
