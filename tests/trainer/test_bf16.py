# SPDX-License-Identifier: Apache-2.0
"""bfloat16 autocast through the Trainer."""

import pytest
import torch
from tiny_run import held, make_trainer, same


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_autocast_learns_with_float32_state_and_resumes(optimizer, tmp_path):
    settings = {"bf16": True, "save_strategy": "steps", "save_steps": 13, "num_train_epochs": 2}
    seen = []
    whole = make_trainer(tmp_path, optimizer, **settings)
    whole.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    whole.train()
    assert set(seen) == {torch.bfloat16}
    losses = [entry["loss"] for entry in held(whole)["logs"]]
    assert len(losses) == 24 and sum(losses[-12:]) < 0.95 * sum(losses[:12])
    floats = [v for s in held(whole)["state"].values() for v in s.values()]
    assert floats and all(v.dtype == torch.float32 for v in floats)
    resumed = make_trainer(tmp_path / "other", optimizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert same(held(resumed), held(whole))
