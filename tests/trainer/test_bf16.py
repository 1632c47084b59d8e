# SPDX-License-Identifier: Apache-2.0
"""bfloat16: autocast through the Trainer, and trainings of parameters that are bfloat16 themselves."""

import pytest
import torch
from tiny_run import held, make_trainer, same
from torch import nn

from hf_nsf import NSF


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


def final_loss(dtype, make):
    """Of small steps on a fixed regression, measured in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = torch.sin(x @ torch.randn(8, 1, generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
    optimizer = make(model.parameters())
    for _ in range(2000):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.mse_loss(model.double()(x.double()), y.double()).item()


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.25])
def test_a_training_of_small_steps_equals_that_in_float32(p):
    """Within 2 % of its loss; without Kahan sums it does not."""

    def make(params, **options):
        return NSF(params, lr=2e-4, weight_decay=0.0, p=p, **options)

    exact, kept = final_loss(torch.float32, make), final_loss(torch.bfloat16, make)
    lost = final_loss(torch.bfloat16, lambda params: make(params, kahan_sum=False))
    assert abs(kept - exact) <= 0.02 * exact < abs(lost - exact)
