# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: what is resumed ends as if nothing had happened, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [
    pytest.param("lcam", 2, 1, None),
    pytest.param("nsf", 2, 1, None),
    *(pytest.param(name, 20, 1, None, marks=pytest.mark.slow) for name in ("lcam", "nsf")),
    *(pytest.param(name, 5, 2, None, marks=pytest.mark.slow) for name in ("lcam", "nsf")),
    *(pytest.param(name, 3, 2, "SHARDED_STATE_DICT", marks=pytest.mark.slow) for name in ("lcam", "nsf")),
    *(pytest.param(name, 3, 2, "FULL_STATE_DICT", marks=pytest.mark.slow) for name in ("lcam", "nsf")),
]


@pytest.mark.parametrize(("optimizer", "kills", "processes", "sharded"), CASES)
def test_killed_runs_end_as_uninterrupted_ones(optimizer, kills, processes, sharded, tmp_path):
    paths = [str(HERE), *(str(HERE.parent / name) for name in ("distributed", "sharded")), str(HERE.parents[1])]
    options = [optimizer, str(kills), str(processes), str(tmp_path), *([sharded] if sharded else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_chain.py"), *options],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = re.search(r"(\d+) kills in \d+ trainings, (\d+) with a checkpoint", done.stdout)
    # A kill before the first checkpoint shows little: at least half must come later.
    assert counts and int(counts[1]) == kills and 2 * int(counts[2]) >= kills
