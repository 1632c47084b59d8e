# SPDX-License-Identifier: Apache-2.0
"""What must hold of both optimizers, over random gradients in several seeds."""

import copy
import pickle

import pytest
import torch
from nsf_reference import REFERENCES
from torch import nn

from hf_nsf import LCAM, NSF, p_schedule

SHAPES = [(5, 7), (3,), (), (0,), (4, 1, 2)]
P = [0.5, 0.25, 0.0, -0.25, -0.5, 1.0]


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    return [*params, nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype).t())]


def drive(optimizer, params, steps=100, seed=1, scale=0.01, start=0):
    generator = torch.Generator().manual_seed(seed)
    for index in range(steps):
        for q in params:
            grad = scale * torch.randn(q.shape, generator=generator, dtype=torch.float64)
            q.grad = grad.to(q.dtype)
        if index >= start:
            kept = [q.grad.clone() for q in params]
            optimizer.step()
            assert all(torch.equal(q.grad, k) for q, k in zip(params, kept, strict=True))
    return params


def worst(ours, theirs):
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_nsf_at_one_half_is_adamw(path, options, dtype, bound):
    for seed in range(3):
        a, b = parameters(dtype, seed), parameters(dtype, seed)
        drive(NSF(a, lr=1e-2, p=0.5, **options, **path), a, seed=seed)
        drive(torch.optim.AdamW(b, lr=1e-2, **{"weight_decay": 0.01, **options}), b, seed=seed)
        assert worst(a, b) <= bound


@pytest.mark.parametrize("step_scale", ["raw", "adam"])
@pytest.mark.parametrize("p", [*P, "cycled"])
@pytest.mark.parametrize("foreach", [True, False])
def test_formulas_in_pythons_own_floats(p, foreach, step_scale):
    """An independent reference, coordinate by coordinate, with p fixed and with p rewritten before each step."""
    knobs = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        grads = torch.randn(60, 3, 4, generator=generator, dtype=torch.float64)
        exponents = p_schedule(range(60), p_min=-0.5, p_max=0.5, cycle_steps=17) if p == "cycled" else [p] * 60
        q = nn.Parameter(start.clone())
        optimizer = NSF([q], step_scale=step_scale, foreach=foreach, **knobs)
        for exponent, g in zip(exponents, grads, strict=True):
            optimizer.param_groups[0]["p"] = exponent
            q.grad = g.clone()
            optimizer.step()
        expected = REFERENCES[step_scale](start.flatten().tolist(), grads.flatten(1).tolist(), exponents, **knobs)
        assert q.flatten().tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("p", P)
def test_every_step_has_the_length_of_adams(p, foreach):
    params = parameters()
    optimizer = NSF(params, lr=1.0, p=p, weight_decay=0.0, foreach=foreach)
    generator = torch.Generator().manual_seed(3)
    for t in range(1, 6):
        for q in params:
            q.grad = torch.randn(q.shape, generator=generator, dtype=torch.float64)
        before = [q.detach().clone() for q in params]
        optimizer.step()
        for q, old in zip(params, before, strict=True):
            s = optimizer.state[q]
            adam = (s["exp_avg"] / (1 - 0.9**t)) / ((s["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)
            assert (q.detach() - old).norm().item() == pytest.approx(adam.norm().item(), rel=1e-9)


@pytest.mark.parametrize("p", P)
def test_adam_scale_direction_is_m_hat_over_v_hat_to_the_p(p):
    q = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    optimizer = NSF([q], lr=1.0, p=p, weight_decay=0.0, eps=1e-12)
    drive(optimizer, [q], steps=5, scale=1.0)
    before = q.detach().clone()
    drive(optimizer, [q], steps=6, scale=1.0, start=5)
    m, v = optimizer.state[q]["exp_avg"], optimizer.state[q]["exp_avg_sq"]
    step, u = before - q.detach(), m / v.pow(p)
    assert torch.allclose(step / step.norm(), u / u.norm(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("p", P)
def test_invariance_to_the_gradients_scale(p):
    results = []
    for scale in (1.0, 1024.0, 2.0**-10):
        params = parameters(torch.float64)
        drive(NSF(params, p=p, eps=0.0), params, scale=scale)
        results.append(params)
    assert worst(results[1], results[0]) < 1e-12 and worst(results[2], results[0]) < 1e-12


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
@pytest.mark.parametrize("p", [*P, -1.0])
def test_extreme_gradients_stay_finite(p, scale, eps, foreach):
    q = nn.Parameter(torch.ones(6))
    optimizer = NSF([q], p=p, eps=eps, weight_decay=0.0, foreach=foreach)
    for seed in range(5):
        q.grad = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * scale
        q.grad[0] = 0
        optimizer.step()
    assert torch.isfinite(q).all() and q[0] == 1
    if scale == 0:
        assert torch.equal(q, torch.ones(6))


@pytest.mark.parametrize("step_scale", ["adam", "raw"])
@pytest.mark.parametrize("p", P)
def test_foreach_and_single_tensor_in_lockstep(p, step_scale):
    def mixed():
        return [q for dtype in (torch.float32, torch.float64, torch.bfloat16) for q in parameters(dtype)]

    a, b, c = mixed(), mixed(), mixed()
    for params, foreach in ((a, True), (b, False), (c, None)):
        unused = nn.Parameter(torch.ones(2))
        optimizer = NSF([*params, unused], lr=1e-2, p=p, step_scale=step_scale, foreach=foreach)
        drive(optimizer, params)
        assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    assert worst(a, b) < 1e-6 and worst(c, b) < 1e-6


@pytest.mark.parametrize("p", [0.5, -0.25])
def test_bfloat16_keeps_float32_moments_and_small_updates(p):
    exact, low = parameters(torch.float32), parameters(torch.bfloat16)
    for e, q in zip(exact, low, strict=True):
        e.data.copy_(q.data.float())
    naive = [nn.Parameter(q.detach().clone()) for q in low]
    # Gradients that do not change sign, and steps far below the rounding of bfloat16.
    for params, kahan in ((exact, None), (low, None), (naive, False)):
        optimizer = NSF(params, lr=1e-5, p=p, weight_decay=0.0, kahan=kahan)
        for _ in range(500):
            for q in params:
                q.grad = torch.full_like(q, 0.1)
            optimizer.step()
        for q in params:
            assert optimizer.state[q]["exp_avg"].dtype == torch.float32
    lost, kept = worst(naive, exact), worst(low, exact)
    assert kept < 5e-3 and kept < lost


@pytest.mark.parametrize("maker", [lambda q: NSF(q, lr=1e-2, p=-0.25), lambda q: LCAM(q, lr=1e-2)], ids=["nsf", "lcam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_exactly(maker, dtype, tmp_path):
    whole, part = parameters(dtype), parameters(dtype)
    drive(maker(whole), whole, steps=20)
    first = maker(part)
    drive(first, part, steps=10)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = maker(part)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    if isinstance(second, NSF):
        assert second.state[part[0]]["exp_avg"].dtype == torch.float32
    drive(second, part, steps=20, start=10)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("left", [set(), {"step"}, {"exp_avg", "exp_avg_sq"}, {"step", "exp_avg"}], ids=sorted)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nsf_starts_anew_where_a_loaded_state_is_empty_or_incomplete(dtype, left):
    params = parameters(dtype)
    first = NSF(params, lr=1e-2, p=0.1)
    drive(first, params, steps=3)
    state, kept = copy.deepcopy(first.state_dict()), copy.deepcopy(first.state_dict())
    state["state"][0] = {name: value for name, value in state["state"][0].items() if name in left}
    del kept["state"][0]  # of a parameter that had no gradient yet
    results = []
    for each in (state, kept):
        ours = [q.detach().clone().requires_grad_() for q in params]
        second = NSF(ours, lr=1e-2, p=0.1)
        second.load_state_dict(each)
        drive(second, ours, steps=2)
        results.append(ours)
        assert [int(second.state[q]["step"]) for q in ours[:2]] == [2, 5]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("maker", [lambda q: NSF(q, p=0.1), lambda q: LCAM(q)], ids=["nsf", "lcam"])
def test_pickle_deepcopy_and_old_states(maker):
    params = parameters()
    optimizer = maker(params)
    drive(optimizer, params, steps=3)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        theirs = [q for group in other.param_groups for q in group["params"]]
        drive(other, theirs, steps=3, seed=2)
        assert all(q.isfinite().all() for q in theirs)
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        for newer in ("kahan", "step_scale", "low_loss_momentum", "high_loss_momentum"):
            group.pop(newer, None)
    optimizer.load_state_dict(old)
    drive(optimizer, params, steps=3)


def test_tensor_lr_and_p_options_of_groups_and_closure():
    a, b = parameters(), parameters()
    drive(NSF(a, lr=torch.tensor(1e-2, dtype=torch.float64), p=torch.tensor(-0.25, dtype=torch.float64)), a)
    optimizer = NSF([{"params": b[:2], "p": -0.25}], lr=1e-2)
    optimizer.add_param_group({"params": b[2:], "p": -0.25, "step_scale": "adam"})
    drive(optimizer, b)
    assert worst(a, b) < 1e-12
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0


BAD = [
    (NSF, {"lr": -1.0}, "lr=-1.0"), (NSF, {"lr": float("nan")}, "lr=nan"), (NSF, {"betas": (1.0, 0.9)}, "1.0"),
    (NSF, {"betas": 0.9}, "betas=0.9"), (NSF, {"eps": -1e-8}, "eps=-1e-08"), (NSF, {"weight_decay": -0.1}, "-0.1"),
    (NSF, {"p": float("nan")}, "p=nan"), (NSF, {"p": "half"}, "p='half'"), (NSF, {"step_scale": "big"}, "big"),
    (NSF, {"fused": True, "foreach": True}, "fused=True"), (LCAM, {"lr": -1.0}, "lr=-1.0"),
    (LCAM, {"low_loss_momentum": 1.0}, "low_loss_momentum=1.0"), (LCAM, {"high_loss_momentum": -0.1}, "-0.1"),
    (LCAM, {"high_loss_momentum": float("nan")}, "nan"), (LCAM, {"foreach": True, "fused": True}, "foreach=True"),
    (LCAM, {"nesterov": True, "low_loss_momentum": 0.0}, "nesterov=True"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options", "shown"), BAD)
def test_bad_values_are_shown(cls, options, shown):
    with pytest.raises(ValueError) as error:
        cls([nn.Parameter(torch.ones(1))], **options)
    assert shown in str(error.value)


@pytest.mark.parametrize("cls", [NSF, LCAM])
def test_unknown_options_are_refused(cls):
    with pytest.raises(TypeError, match="momentun"):
        cls([nn.Parameter(torch.ones(1))], momentun=0.9)


def test_sparse_and_complex_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="complex64"):
        NSF([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        NSF(embedding.parameters()).step()


def test_momentum_zero_in_one_phase_is_the_formula():
    q = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = LCAM([q], lr=1.0, low_loss_momentum=0.5, high_loss_momentum=0.0)
    buf = theta = 0.0
    for index, g in enumerate((1.0, 2.0, 3.0, 4.0)):
        mu = 0.5 if index % 2 else 0.0
        from hf_nsf.optim.lcam import phase_momentum

        optimizer.param_groups[0]["momentum"] = phase_momentum(optimizer.param_groups[0], low=bool(index % 2))
        q.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        buf = mu * buf + g
        theta -= buf
    assert q.item() == theta
