# SPDX-License-Identifier: Apache-2.0
"""bfloat16: autocast through the Trainer, and parameters that are bfloat16 themselves."""

import copy

import pytest
import torch
from tiny_run import held, make_trainer, same
from torch import nn

import hf_nsf


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_autocast_learns_with_float32_state_and_resumes(optimizer, tmp_path):
    settings = {"bf16": True, "save_strategy": "steps", "save_steps": 7, "num_train_epochs": 3}
    seen = []
    whole = make_trainer(tmp_path, optimizer, **settings)
    whole.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    whole.train()
    assert set(seen) == {torch.bfloat16}
    losses = [entry["loss"] for entry in held(whole)["logs"]]
    assert len(losses) == 36 and sum(losses[-12:]) < 0.9 * sum(losses[:12])
    floats = [v for s in held(whole)["state"].values() for v in s.values() if v is not None]
    assert floats and all(v.dtype == torch.float32 for v in floats)
    resumed = make_trainer(tmp_path / "other", optimizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-21"))
    assert same(held(resumed), held(whole))


def _train(dtype, steps, **options):
    """Small steps on a fixed regression; the last loss, measured in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = torch.sin(x @ torch.randn(8, 1, generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
    optimizer = hf_nsf.NSF(model.parameters(), lr=2e-4, weight_decay=0.0, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.mse_loss(copy.deepcopy(model).double()(x.double()), y.double()).item(), optimizer


@pytest.mark.parametrize("p", [0.5, 0.25])
def test_small_steps_of_bfloat16_parameters_do_not_vanish(p):
    exact, _ = _train(torch.float32, 2000, p=p)
    kept, optimizer = _train(torch.bfloat16, 2000, p=p)
    lost, _ = _train(torch.bfloat16, 2000, p=p, kahan=False)
    assert abs(kept - exact) <= 0.02 * exact
    assert abs(lost - exact) > 0.02 * exact
    again = hf_nsf.NSF(optimizer.param_groups[0]["params"])
    again.load_state_dict(optimizer.state_dict())
    for state, loaded in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert loaded["exp_avg"].dtype == loaded["exp_avg_sq"].dtype == torch.float32
        assert same(dict(state), dict(loaded))


def test_lcam_of_bfloat16_parameters_is_torch_sgd():
    # No compensation: steps below bfloat16's rounding are lost, as in torch.optim.SGD.
    ours, theirs = (nn.Parameter(torch.linspace(1, 2, 16, dtype=torch.bfloat16)) for _ in range(2))
    pair = {"low_loss_momentum": 0.9, "high_loss_momentum": 0.9}
    a, b = hf_nsf.LCAM([ours], lr=1e-4, **pair), torch.optim.SGD([theirs], lr=1e-4, momentum=0.9)
    before = ours.detach().clone()
    for _ in range(20):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        a.step()
        b.step()
    assert torch.equal(ours, theirs) and a.state[ours]["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(ours, before)
