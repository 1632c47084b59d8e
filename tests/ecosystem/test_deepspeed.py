# SPDX-License-Identifier: Apache-2.0
"""Stock Trainer under DeepSpeed's CPU accelerator, ZeRO 1, 2 and 3, with checkpoints and offload, two processes.

accelerate takes these processes for single ones and gives both the same batches, so this shows that DeepSpeed's engine
and its partitioned optimizers drive ours correctly, not that data are distributed.
"""

import pytest
from forks import launch
from trainer_runs import HIGH, LOW, by_the_rule, same, used

from hf_nsf import p_schedule

pytest.importorskip("deepspeed")
# Its processes wait for each other by spinning: where cores are shared, that takes ten times as long.
pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(1000)]

SAVED_AT = 20  # in mid-epoch: an epoch has 12 updates
SETTINGS = {"max_grad_norm": 0.0, "ddp_backend": None, "use_cpu": False, "save_strategy": "steps"}
DEEPSPEED = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}


@pytest.mark.parametrize(("stage", "offload"), [(1, ""), (2, ""), (3, ""), (2, "offload"), (3, "offload")])
@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_zero(optimizer, stage, offload, tmp_path):
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    if stage == 3:
        # Without it the Trainer writes an empty file and removes it again: here in both processes, which take
        # themselves for single ones, so that the slower one may find none.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
    }  # fmt: skip
    whole = {"name": "whole", "optimizer": optimizer, "deepspeed": config, "save_steps": SAVED_AT, **SETTINGS}
    resumed = {**whole, "name": "resumed", "resume": str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}")}
    done, made = launch("tiny_run.py", [whole, resumed], tmp_path, timeout=900, **DEEPSPEED)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected, ours in zip(made["whole"], made["resumed"], strict=True):
        assert expected["engine"] == "DeepSpeedEngine" and "ZeroOptimizer" in expected["inner"]
        assert expected["inner"].endswith("Stage3") == (stage == 3)
        assert all(same(ours[key], expected[key]) for key in ("weights", "partitions", "state", "logs"))
    first, second = made["whole"]
    assert same(first["logs"], second["logs"]) and same(first["weights"], second["weights"])
    logs = first["logs"]
    assert len(logs) == 36 and logs[-1]["loss"] < logs[0]["loss"]
    if optimizer == "lcam":
        momenta = [entry["lcam_momentum"] for entry in logs]
        assert momenta == used(first["events"]) == by_the_rule(first["events"])[0] and set(momenta) == {LOW, HIGH}
    else:
        schedule = p_schedule(range(36), p_min=-0.25, p_max=0.5, cycles=2, total_steps=36)
        assert [entry["nsf_p"] for entry in logs] == pytest.approx(schedule, abs=1e-12)
