# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (FSDP2, tensor parallelism, their mix with plain ones) give the steps of whole parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_worker.py")
FEW = ["nsf p=-0.25", "nsf raw", "lcam"]
CASES = ["nsf p=0.5", "nsf p=0.0", "nsf p=-0.25", "nsf raw", "lcam", "lcam foreach"]


def launch(processes, *arguments):
    """Run the worker; return the cases that it passed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(WORKER), *arguments], capture_output=True, text=True, timeout=480, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("passed: ") for line in done.stdout.splitlines() if line.startswith("passed")]


@pytest.mark.parametrize(
    ("processes", "cases"), [(2, FEW), *(pytest.param(n, CASES, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_sharded_training_is_whole_training_with_one_collective_a_step(processes, cases):
    assert launch(processes, "--cases", *cases) == cases


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_a_sharded_run_goes_on_with_another_number_of_processes(first, second, tmp_path):
    assert launch(first, "--half_a_run", str(tmp_path)) == launch(second, "--half_a_run", str(tmp_path)) == CASES
