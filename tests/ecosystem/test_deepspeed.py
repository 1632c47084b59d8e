# SPDX-License-Identifier: Apache-2.0
"""Stock Trainer under DeepSpeed's CPU accelerator, ZeRO 1, 2 and 3, two processes.

accelerate takes these processes for single ones and gives both the same batches, so this shows that DeepSpeed's engine
and its partitioned optimizers drive ours rightly, not that data are shared out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_nsf import p_schedule

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.ecosystem
HERE = Path(__file__).parent


def momenta(logs, updates_per_epoch, low=0.8, high=0.9):
    """METHOD's rule applied to the logged losses."""
    momentum, used = high, []
    for index, entry in enumerate(logs):
        if index % updates_per_epoch == 0:
            losses = []
        used.append(momentum)
        losses.append(entry["loss"])
        momentum = low if entry["loss"] < sum(losses) / len(losses) else high
    return used


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_zero(optimizer, stage, tmp_path):
    paths = [str(HERE.parent / "distributed"), str(HERE.parents[1])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "deepspeed_worker.py"), optimizer, str(stage), str(tmp_path)],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["engine"] == "DeepSpeedEngine" and "ZeroOptimizer" in first["inner"]
    assert first["zero3"] == (stage == 3)
    logs = first["logs"]
    assert len(logs) == 36 and logs[-1]["loss"] < logs[0]["loss"]
    if optimizer == "lcam":
        used = [entry["lcam_momentum"] for entry in logs]
        assert used == momenta(logs, 12) and len(set(used)) == 2
    else:
        schedule = p_schedule(range(36), p_min=-0.25, p_max=0.5, cycles=2, total_steps=36)
        assert [entry["nsf_p"] for entry in logs] == pytest.approx(schedule, abs=1e-12)
