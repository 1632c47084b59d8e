# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (FSDP2, tensor parallelism, their mix with plain ones) give the steps of whole parameters."""

import pytest
from forks import SUPPORT, run_checked
from problems import TORCH
from sharded_worker import CASES

pytestmark = pytest.mark.skipif(
    TORCH < (2, 9),
    reason="before torch 2.9, FSDP2 on gloo sums gradients rather than averaging them",
)

FEW = ["nsf", "nsf none", "nsf bfloat16", "lcam"]


@pytest.mark.parametrize(
    ("processes", "cases"),
    [(2, FEW), *(pytest.param(processes, list(CASES), marks=pytest.mark.slow) for processes in (2, 4))],
)
def test_sharded_steps_are_whole_steps_with_one_collective_each(processes, cases):
    printed = run_checked(SUPPORT / "sharded_worker.py", processes, "--cases", *cases)
    assert [line.removeprefix("passed: ") for line in printed.splitlines() if line.startswith("passed")] == cases
