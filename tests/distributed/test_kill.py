# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: what is resumed ends as if nothing had happened, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
# Kills, processes, and the type of the state dict where FSDP2 shards the training.
LONG = [(20, 1), (5, 2), (3, 2, "SHARDED_STATE_DICT"), (3, 2, "FULL_STATE_DICT")]
CASES = [("lcam", 2, 1), *(("nsf", *case) for case in LONG), *(("lcam", *case) for case in LONG)]
SLOW = [pytest.mark.slow, pytest.mark.timeout(1000)]
PARAMS = [CASES[0], *(pytest.param(case, marks=SLOW) for case in CASES[1:])]


@pytest.mark.parametrize("case", PARAMS, ids=lambda case: "-".join(map(str, case)))
def test_killed_runs_end_as_uninterrupted_ones(case, tmp_path):
    paths = [str(SUPPORT), str(SUPPORT.parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kill_chain.py"), str(tmp_path), *map(str, case)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = re.search(r"(\d+) kills in \d+ trainings, (\d+) with a checkpoint", done.stdout)
    # A kill before the first checkpoint shows little: at least half must come later.
    assert counts and int(counts[1]) == case[1] and 2 * int(counts[2]) >= case[1]
