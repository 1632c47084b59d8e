# SPDX-License-Identifier: Apache-2.0
"""Stock Trainer under DeepSpeed's CPU accelerator, ZeRO 1, 2 and 3, with checkpoints and offload, two processes.

accelerate takes these processes for single ones and gives both the same batches, so this shows that DeepSpeed's engine
and its partitioned optimizers drive ours correctly, not that data are distributed.
"""

import json

import pytest
from forks import SUPPORT, run_checked
from lcam_reference import momenta_from_losses
from trainer_runs import LOGGED

from hf_nsf import p_schedule

pytest.importorskip("deepspeed")
# Its processes wait for each other by spinning: where cores are shared, that takes ten times as long.
pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(1000)]


@pytest.mark.parametrize(("stage", "offload"), [(1, ""), (2, ""), (3, ""), (2, "offload"), (3, "offload")])
@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_zero(optimizer, stage, offload, tmp_path):
    run_checked(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
        SUPPORT / "deepspeed_worker.py", optimizer, stage, tmp_path, offload,
        timeout=900, DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_CPU="false",
    )  # fmt: skip
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for key in ("whole", "resumed"):
        one, other = first[key], second[key]
        assert one["logs"] == other["logs"] and one["norms"] == other["norms"]
    whole = first["whole"]
    assert whole["engine"] == "DeepSpeedEngine" and "ZeroOptimizer" in whole["inner"]
    assert whole["ours"] == optimizer.upper() and whole["zero3"] == (stage == 3)
    for report in (first, second):  # bit for bit, through a JSON file's repr of floats
        assert report["resumed"]["norms"] == report["whole"]["norms"]
        assert report["resumed"]["partitions"] == report["whole"]["partitions"]
        used = [[{k: v for k, v in e.items() if k in LOGGED} for e in report[k]["logs"]] for k in ("whole", "resumed")]
        assert used[0] == used[1]
    logs = whole["logs"]
    assert len(logs) == 36 and logs[-1]["loss"] < logs[0]["loss"]
    if optimizer == "lcam":
        used = [entry["lcam_momentum"] for entry in logs]
        expected, _ = momenta_from_losses([[e["loss"] for e in logs[i : i + 12]] for i in range(0, 36, 12)], 0.8, 0.9)
        assert used == expected and len(set(used)) == 2
    else:
        schedule = p_schedule(range(36), p_min=-0.25, p_max=0.5, cycles=2, total_steps=36)
        assert [entry["nsf_p"] for entry in logs] == pytest.approx(schedule, abs=1e-12)
