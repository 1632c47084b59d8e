# SPDX-License-Identifier: Apache-2.0
"""LCAM is torch's SGD bit for bit on each of torch's paths, and SGD in float32 for bfloat16 and float16."""

import pytest
import torch
from lcam_reference import sgd_by_formula
from problems import PATHS, drive, identical, make_parameters, set_gradients
from torch import nn

from hf_nsf import LCAM, LossPhase

OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"nesterov": True},
    {"nesterov": True, "weight_decay": 0.1},
    {"nesterov": True, "maximize": True},
]
LOW = [torch.bfloat16, torch.float16]
EQUAL = {"low_loss_momentum": 0.9, "high_loss_momentum": 0.9}


def make(path, dtype, **options):
    """LCAM over all layouts, but for gaps with fused=True; SGD over the same."""
    gaps = path != "fused"
    ours, theirs = make_parameters(dtype, gaps=gaps), make_parameters(dtype, gaps=gaps)
    plain = {"kahan_sum": False} if dtype in LOW else {}
    lcam = LCAM(ours, lr=0.1, **EQUAL, **plain, **options, **PATHS[path])
    return lcam, ours, torch.optim.SGD(theirs, lr=0.1, momentum=0.9, **options, **PATHS[path]), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_equal_momenta_are_sgd_bit_for_bit(path, dtype):
    """Whatever else the momentum is rewritten to; and gradients survive, as they do not in torch's nesterov."""
    for options in OPTIONS:
        lcam, ours, sgd, theirs = make(path, dtype, **options)
        if path == "fused" and dtype == torch.bfloat16:
            with pytest.raises(RuntimeError, match="fused=True with a torch.bfloat16"):
                drive(lcam, ours, 1)
            return
        generator = torch.Generator().manual_seed(1)
        for index in range(20):
            lcam.param_groups[0]["momentum"] = sgd.param_groups[0]["momentum"] = 0.5 if index % 7 < 3 else 0.9
            drive(lcam, ours, index + 1, skip=index)
            set_gradients(theirs, generator)
            sgd.step()
        assert identical(ours, theirs), options
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(lcam.state[a]["momentum_buffer"], sgd.state[b]["momentum_buffer"])


@pytest.mark.parametrize("path", ["default", "foreach", "reference"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kahan_sums_are_sgd_in_float32(dtype, path):
    """All layouts, a tensor of several pieces, dampening, late gradients, any momentum, 0 too."""
    large = torch.linspace(-1, 1, 300_001 if path == "default" else 301)
    for options in OPTIONS:
        for dampening in (0.0, 0.5) if not options.get("nesterov") else (0.0,):
            ours = [*make_parameters(dtype), nn.Parameter(large.to(dtype))]
            exact = [nn.Parameter(q.detach().float()) for q in ours]
            a, b = (LCAM(q, lr=1e-2, **EQUAL, **options, **PATHS[path]) for q in (ours, exact))
            generator, steps = torch.Generator().manual_seed(1), 12
            for index in range(steps):
                set_gradients(ours, generator)
                if index < 3:
                    ours[0].grad = None
                for q, e in zip(ours, exact, strict=True):
                    e.grad = None if q.grad is None else q.grad.float()
                for optimizer in (a, b):
                    momentum = (0.9, 0.5, 0.9)[index % 3] if options.get("nesterov") else (0.9, 0.0, 0.5)[index % 3]
                    optimizer.param_groups[0].update(momentum=momentum, dampening=dampening)
                    optimizer.step()
            for q, e in zip(ours, exact, strict=True):
                if q.numel():
                    assert a.state[q]["momentum_buffer"].dtype == torch.float32
                    value = q.detach().double() + a.state[q]["kahan_comp"].double()
                    # What is kept, below half a unit of the parameter's last place, is itself rounded at every step.
                    bound = steps * (torch.finfo(dtype).eps / 2) ** 2 * e.abs().max() + 1e-6
                    assert (value - e.double()).abs().max() <= bound, (options, dampening)


@pytest.mark.parametrize("path", PATHS)
def test_changing_momenta_follow_the_formula(path):
    """The buffer goes on being updated in a phase of momentum 0."""
    for low in (0.0, 0.5):
        q = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        pair = {"low_loss_momentum": low, "high_loss_momentum": 0.9}
        optimizer = LCAM([q], lr=0.1, weight_decay=0.1, **pair, **PATHS[path])
        phase = LossPhase(optimizer)
        grads, used = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64), []
        for index, g in enumerate(grads):
            used.append(optimizer.param_groups[0]["momentum"])
            q.grad = g.reshape(1).clone()
            optimizer.step()
            phase.step(1.0 / (index + 1) if index % 3 else 9.0)
        assert {round(mu, 9) for mu in used} == {low, 0.9}
        assert q.item() == pytest.approx(sgd_by_formula(1.5, grads.tolist(), used, 0.1, 0.1), rel=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_parameters_whose_gradients_come_later(path):
    """torch's own SGD(fused=True) fails there."""
    results = []
    for optimizer_of in (
        lambda q: LCAM(q, lr=0.1, **EQUAL, **PATHS[path]),
        lambda q: torch.optim.SGD(q, lr=0.1, momentum=0.9, foreach=False),
    ):
        params = [nn.Parameter(torch.linspace(0, 1, 9, dtype=torch.float64)) for _ in range(2)]
        optimizer = optimizer_of(params)
        for step in range(6):
            params[0].grad = (params[0].detach() + step).cos()
            params[1].grad = (params[1].detach() + step).sin() if step > 2 else None
            optimizer.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("path", PATHS)
def test_lr_may_be_a_tensor(path):
    for dtype in (torch.float32, *(LOW if path != "fused" else ())):
        results = []
        for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
            params = make_parameters(dtype, gaps=False)
            drive(LCAM(params, lr=lr, **PATHS[path]), params, 3)
            results.append(params)
        for params in results[1:]:
            torch.testing.assert_close(params, results[0], rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaps", "strides", "buffer", "buffer's dtype", "sparse", "dtype"])
def test_fused_refuses_what_torch_steps_wrongly(kind):
    q = nn.Parameter(torch.ones(8, 6)[::2, ::3] if kind == "gaps" else torch.ones(4, 2))
    q.grad = torch.ones(4, 2)
    optimizer = LCAM([q], fused=True)
    if kind == "strides":
        q.grad = torch.ones(2, 4).t()
    elif kind == "buffer":
        optimizer.state[q]["momentum_buffer"] = torch.ones(2, 4).t()
    elif kind == "buffer's dtype":
        optimizer.state[q]["momentum_buffer"] = torch.ones(4, 2, dtype=torch.float64)
    elif kind == "sparse":
        q.grad = torch.ones(4, 2).to_sparse()
    elif kind == "dtype":
        q = nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16))
        q.grad, optimizer = torch.ones_like(q), LCAM([q], fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True with a torch.* parameter of shape \(4, 2\) on the CPU;"):
        optimizer.step()
    assert torch.equal(q, torch.ones_like(q))


@pytest.mark.parametrize("kind", ["sparse", "complex", "mixed"])
def test_all_that_sgd_takes(kind):
    results = []
    for optimizer_of in (
        lambda q: LCAM(q, lr=0.1, low_loss_momentum=0.0, high_loss_momentum=0.0),
        lambda q: torch.optim.SGD(q, lr=0.1),
    ):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 3, sparse=kind != "complex")
        params = [*embedding.parameters(), nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))]
        params = {"sparse": params[:1], "complex": params[1:], "mixed": params}[kind]
        optimizer = optimizer_of(params)
        for rows in ([0, 1], [1, 4]):
            optimizer.zero_grad()
            embedding(torch.tensor(rows)).square().sum().backward()
            params[-1].grad = params[-1].grad if kind == "sparse" else params[-1].detach() * (0.5 + 0.25j)
            optimizer.step()
        results.append(params)
    assert identical(*results)


def test_groups_and_what_stands_in_them():
    """Each group starts at its own high_loss_momentum; no step changes any option of any group."""
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = LCAM([{"params": [a], "high_loss_momentum": 0.7}, {"params": [b]}], high_loss_momentum=0.8)
    optimizer.add_param_group({"params": [c], "low_loss_momentum": 0.1, "high_loss_momentum": 0.6, "lr": 0.5})
    assert [g["momentum"] for g in optimizer.param_groups] == [0.7, 0.8, 0.6]
    assert [g["low_loss_momentum"] for g in optimizer.param_groups] == [0.9, 0.9, 0.1]
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    drive(optimizer, [a, b, c], 3)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert isinstance(optimizer, torch.optim.SGD)
    assert (
        LCAM([{"params": [a], "loss_average": "epoch"}], loss_average="ema").param_groups[0]["loss_ema_decay"] is None
    )


def test_hooks_run_once_a_step():
    """Also where there is a torch SGD, whose own step then has hooks too."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    q = nn.Parameter(torch.ones(1))
    q.grad = torch.ones(1)
    optimizer, seen = LCAM([q]), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    assert optimizer.step(lambda: 7.0) == 7.0 and seen == ["pre", "post"]
