# SPDX-License-Identifier: Apache-2.0
"""bfloat16: autocast through the Trainer, and parameters that are bfloat16 themselves."""

import copy
import functools

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


def _train(dtype, steps, make):
    """Small steps on a fixed regression; the last loss, measured in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = torch.sin(x @ torch.randn(8, 1, generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.mse_loss(copy.deepcopy(model).double()(x.double()), y.double()).item(), optimizer


def _nsf(p):
    return lambda params, **options: hf_nsf.NSF(params, lr=2e-4, weight_decay=0.0, p=p, **options)


def _lcam(params, **options):
    return hf_nsf.LCAM(params, lr=1e-3, low_loss_momentum=0.9, high_loss_momentum=0.9, nesterov=True, **options)


@pytest.mark.parametrize("make", [_nsf(0.5), _nsf(0.25), _lcam], ids=["nsf p=0.5", "nsf p=0.25", "lcam"])
def test_small_steps_of_bfloat16_parameters_do_not_vanish(make):
    exact, _ = _train(torch.float32, 2000, make)
    kept, optimizer = _train(torch.bfloat16, 2000, make)
    lost, _ = _train(torch.bfloat16, 2000, functools.partial(make, kahan=False))
    assert abs(kept - exact) <= 0.02 * exact
    assert abs(lost - exact) > 0.02 * exact
    again = make(optimizer.param_groups[0]["params"])
    again.load_state_dict(optimizer.state_dict())
    for state, loaded in zip(optimizer.state.values(), again.state.values(), strict=True):
        moments = [value for name, value in loaded.items() if name in ("exp_avg", "exp_avg_sq", "momentum_buffer")]
        assert moments and all(value.dtype == torch.float32 for value in moments)
        assert same(dict(state), dict(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"nesterov": True, "maximize": True}, {"weight_decay": 0.1, "nesterov": True}],
)
def test_lcam_of_low_precision_parameters_is_sgd_in_float32(options, dtype):
    """Rounded to the parameter's dtype, with any momentum, and one parameter that has its gradients later."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(40, generator=generator).to(dtype) for _ in range(2)]
    ours, theirs = [nn.Parameter(x.clone()) for x in start], [nn.Parameter(x.float()) for x in start]
    options = {"lr": 1e-3, "low_loss_momentum": 0.9, "high_loss_momentum": 0.9, **options}
    a, b = hf_nsf.LCAM(ours, **options), hf_nsf.LCAM(theirs, **options)
    for step in range(200):
        for optimizer in (a, b):
            optimizer.param_groups[0]["momentum"] = 0.9 if step % 3 else 0.5
        for index in range(2 if step > 5 else 1):
            ours[index].grad = torch.randn(40, generator=generator).to(dtype)
            theirs[index].grad = ours[index].grad.float()
        a.step()
        b.step()
    for mine, exact in zip(ours, theirs, strict=True):
        # The compensation, below half a unit of the parameter's last place, is itself rounded at every step.
        bound = 200 * (torch.finfo(dtype).eps / 2) ** 2 * exact.abs().max()
        assert (mine.float() + a.state[mine]["compensation"].float() - exact).abs().max() <= bound


def test_lcam_without_kahan_is_torch_sgd():
    # Steps below bfloat16's rounding are lost there.
    ours, theirs = (nn.Parameter(torch.linspace(1, 2, 16, dtype=torch.bfloat16)) for _ in range(2))
    pair = {"low_loss_momentum": 0.9, "high_loss_momentum": 0.9}
    a, b = hf_nsf.LCAM([ours], lr=1e-4, kahan=False, **pair), torch.optim.SGD([theirs], lr=1e-4, momentum=0.9)
    before = ours.detach().clone()
    for _ in range(20):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        a.step()
        b.step()
    assert torch.equal(ours, theirs) and a.state[ours]["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(ours, before)
    kept = hf_nsf.LCAM([theirs], lr=1e-4, **pair)
    kept.load_state_dict(b.state_dict())  # a bfloat16 buffer goes on in float32
    for _ in range(20):
        kept.step()
    assert (theirs < before).any() and kept.state[theirs]["momentum_buffer"].dtype == torch.float32


def test_kahan_and_torchs_fused_step_exclude_each_other():
    with pytest.raises(ValueError, match="kahan=True, fused=True"):
        hf_nsf.LCAM([nn.Parameter(torch.ones(1))], kahan=True, fused=True)
    with pytest.raises(ValueError, match="kahan=True, fused=True"):
        hf_nsf.LCAM([{"params": [nn.Parameter(torch.ones(1))], "kahan": True}], fused=True)
