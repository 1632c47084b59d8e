# SPDX-License-Identifier: Apache-2.0
"""Processes of tests: scripts of this folder, and ranks as forks of one process, which saves them the imports."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

SUPPORT = Path(__file__).parent


def run_python(*arguments, timeout: int = 290, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with one thread, without a network, with this folder, the package and the examples on its path."""
    root = SUPPORT.parents[1]
    paths = os.pathsep.join(map(str, (SUPPORT, root, root / "examples")))
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def run_checked(*arguments, **options) -> str:
    """What a process prints, whose exit code must be 0."""
    done = run_python(*arguments, **options)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    return done.stdout


def launch(script: str, jobs: list[dict], folder: str | Path, launcher="torchrun", processes=2, **options):
    """Run a script of this folder under a launcher, by a JSON file of jobs; its finished process, and their results.

    These are what each rank saved, {job: [rank 0, rank 1, ...]}, or {} if the launcher failed.
    """
    file = Path(folder, "jobs.json")
    file.write_text(json.dumps(jobs))
    command = {
        "torchrun": ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
    }[launcher]  # fmt: skip
    options = {"ACCELERATE_USE_CPU": "true", **options}
    done = run_python("-m", *command, SUPPORT / script, file, folder, **options)
    return done, {} if done.returncode else {job["name"]: load_job(job["name"], folder) for job in jobs}


def load_job(name: str, folder: str | Path) -> list:
    """What the ranks saved at the end of a job."""
    return [torch.load(path, weights_only=True) for path in sorted(Path(folder).glob(f"{name}-?.pt"))]


def save_jobs(jobs: list[dict], run_job: Callable, folder: str | Path) -> None:
    """Make jobs in a rank, and save what it holds at the end of each to `<folder>/<job>-<rank>.pt`."""
    for job in jobs:
        torch.save(run_job({**job}, folder), Path(folder, f"{job['name']}-{os.environ.get('RANK', 0)}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()  # models in cycles hold DDP's process group, whose threads would abort the process at its end
        torch.distributed.destroy_process_group()


def start(processes: int, function: Callable, *arguments) -> list[int]:
    """Call a function on each rank of a new group (of no group, if it is one process); return the process ids."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = []
    for rank in map(str, range(processes)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if processes > 1:
                    os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
                function(*arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    return ranks


def fork(processes: int, function: Callable, *arguments) -> None:
    """Call a function on each rank and wait for all; SystemExit if one fails, which ends the others."""
    ranks = set(start(processes, function, *arguments))
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            sys.exit("a rank failed")
