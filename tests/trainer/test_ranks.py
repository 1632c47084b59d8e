# SPDX-License-Identifier: Apache-2.0
"""Two ranks on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_decide_alike_on_streams_and_differing_ones_are_stopped(tmp_path):
    here = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(here / "stream_ranks.py"), str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(f"rank {rank} has passed" in done.stdout for rank in (0, 1)), done.stdout[-4000:]
