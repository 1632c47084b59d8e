# SPDX-License-Identifier: Apache-2.0
"""What a GPU adds, tested where there is one; what a CPU can do of it is tested there too."""

import copy

import pytest
import torch
from tiny_run import Averaging, Rows, arguments, same
from torch import nn
from transformers import Trainer, set_seed

from hf_nsf import LCAM, NSF, LossPhase, PCycle

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", CUDA]


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = [(64, 32), (7,), (), (300,)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in shapes]


def stepped(optimizer, params, steps, after=None):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for q in params:
            q.grad = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q.device, q.dtype)
        optimizer.step()
        if after is not None:
            after()
    return params


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
@pytest.mark.parametrize("path", [{}, {"foreach": False}], ids=["default", "single"])
def test_nsf_on_a_device_is_the_one_in_float64(path, step_scale, device):
    results = []
    for where, dtype, chosen in ((device, torch.float32, path), ("cpu", torch.float64, {"foreach": False})):
        params = parameters(where, dtype)
        optimizer = NSF(params, lr=1e-3, step_scale=step_scale, **chosen)
        cycle = PCycle(optimizer, p_min=-0.25, p_max=0.5, cycle_steps=20)
        results.append(stepped(optimizer, params, 50, cycle.step))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("path", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_lcam_on_a_gpu_is_sgd_on_it(path, device):
    ours, theirs = parameters(device), parameters(device)
    stepped(LCAM(ours, lr=0.1, low_loss_momentum=0.9, high_loss_momentum=0.9, **path), ours, 20)
    stepped(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, **path), theirs, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["nsf", "raw", "lcam"])
def test_a_step_waits_for_no_gpu(name, device):
    params = parameters(device)
    for q in params:
        q.grad = torch.ones_like(q)
    if name == "lcam":
        optimizer = LCAM(params, lr=0.1, foreach=True)
        control = None
    else:
        optimizer = NSF(params, step_scale="raw" if name == "raw" else "adam")
        control = PCycle(optimizer, p_min=-0.25, p_max=0.5, cycle_steps=20)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            if control is not None:
                control.step()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nsf", "lcam", "lcam fused"])
def test_a_scaler_skips_what_overflows(name, device):
    """The third of five updates and the first leave weights, moments, step counts, phase, mean and cycle alone."""
    params = parameters(device)
    optimizer = NSF(params, p=0.1) if name == "nsf" else LCAM(params, lr=0.1, fused="fused" in name or None)
    control = PCycle(optimizer, cycle_steps=5) if name == "nsf" else LossPhase(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)

    def held():
        return copy.deepcopy(([q.detach() for q in params], optimizer.state_dict()))

    for factor in (float("inf"), 1.0, float("inf"), 1.0, 1.0):
        before = held()
        optimizer.zero_grad()
        loss = sum(q.square().sum() for q in params)
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped = scaler.get_scale() < scale
        assert skipped == (factor != 1.0)
        if isinstance(control, PCycle):
            if not skipped:
                control.step()
        else:
            control.step(loss.detach(), skipped=skipped)
        (weights, state), (old_weights, old_state) = held(), before
        for now, old in ((weights, old_weights), *((state[key], old_state[key]) for key in ("state", "param_groups"))):
            assert same(now, old) == skipped
    group = optimizer.param_groups[0]
    if name == "nsf":
        assert group["p_cycle_step"] == 3 and {state["step"].item() for state in optimizer.state.values()} == {3}
    else:
        assert group["loss_count"] == 3
    assert all(q.isfinite().all() for q in params)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["nsf", "lcam"])
def test_the_trainer_in_mixed_precision(name, device, precision, tmp_path):
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("accelerate has no fp16 on a CPU")
    set_seed(3)
    args = arguments(tmp_path, name, use_cpu=device == "cpu", **{precision: True})
    trainer = Trainer(model=Averaging(), args=args, train_dataset=Rows())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    key = {"nsf": "nsf_p", "lcam": "lcam_momentum"}[name]
    half = len(logs) // 2
    assert len({entry[key] for entry in logs}) > 1
    assert sum(e["loss"] for e in logs[half:]) < sum(e["loss"] for e in logs[:half])
    state = next(iter(trainer.optimizer.optimizer.state.values()))
    assert state["exp_avg" if name == "nsf" else "momentum_buffer"].dtype == torch.float32
