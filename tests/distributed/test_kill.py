# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: what is resumed ends as if nothing had happened, bit for bit."""

import re

import pytest
from forks import SUPPORT, run_checked

# Kills, processes, and the type of the state dict where FSDP2 shards the training.
LONG = [(20, 1), (5, 2), (3, 2, "SHARDED_STATE_DICT"), (3, 2, "FULL_STATE_DICT")]
CASES = [("lcam", 2, 1), *(("nsf", *case) for case in LONG), *(("lcam", *case) for case in LONG)]
SLOW = [pytest.mark.slow, pytest.mark.timeout(1000)]
PARAMS = [CASES[0], *(pytest.param(case, marks=SLOW) for case in CASES[1:])]


@pytest.mark.parametrize("case", PARAMS, ids=lambda case: "-".join(map(str, case)))
def test_killed_runs_end_as_uninterrupted_ones(case, tmp_path):
    printed = run_checked(SUPPORT / "kill_chain.py", tmp_path, *case, timeout=900)
    counts = re.search(r"(\d+) kills in \d+ trainings, (\d+) with a checkpoint", printed)
    # A kill before the first checkpoint shows little: at least half must come later.
    assert counts and int(counts[1]) == case[1] and 2 * int(counts[2]) >= case[1]
