# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (FSDP2, tensor parallelism, their mix with plain ones) give the steps of whole parameters."""

import pytest
from forks import SUPPORT, run_checked
from problems import TORCH

pytestmark = pytest.mark.skipif(
    TORCH < (2, 9),
    reason="before torch 2.9, FSDP2 on gloo sums gradients rather than averaging them",
)

FEW = ["nsf", "nsf none", "nsf bfloat16", "lcam"]


def launch(*arguments):
    """Run the worker; return the cases that it passed."""
    lines = run_checked(SUPPORT / "sharded_worker.py", *arguments).splitlines()
    return [line.removeprefix("passed: ") for line in lines if line.startswith("passed")]


def test_sharded_training_is_whole_training_with_one_collective_a_step():
    assert launch("2", "--cases", *FEW) == FEW


@pytest.mark.slow
def test_sharded_training_with_every_path_and_checkpoints_of_fewer_processes():
    found = launch("2", "4")
    assert len(found) == 2 * len(set(found)) and set(found) > set(FEW)


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_fewer_processes():
    cases = ["nsf", "nsf none", "lcam"]
    assert launch("4", "2", "--cases", *cases) == 2 * cases
