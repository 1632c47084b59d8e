# SPDX-License-Identifier: Apache-2.0
"""LCAM is torch's SGD, and the authors' loop, bit for bit on each of torch's paths."""

import pytest
import torch
from lcam_reference import sgd_by_formula, train_by_hand
from problems import classification_problem, drive, identical, make_parameters, relative_error, set_gradients
from torch import nn

from hf_nsf import LCAM, LossPhase

PATHS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"nesterov": True},
    {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True},
    {"maximize": True, "nesterov": True, "weight_decay": 0.1},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def test_is_torch_sgd_and_starts_in_the_high_phase():
    """The class, the group keys and the starting momentum of the contract."""
    optimizer = LCAM([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["low_loss_momentum"], group["high_loss_momentum"]) == (0.9, 0.95)
    assert group["momentum"] == 0.95 and group["dampening"] == 0
    assert group["lr"] == 1e-3 and group["weight_decay"] == 0 and group["nesterov"] is False


def parameters_for(path, dtype, seed=0):
    """All kinds; for `fused=True` only those whose gradients are laid out alike, as torch's kernel demands."""
    params = make_parameters(dtype, seed)
    return [q for q in params if q.is_contiguous()] if path.get("fused") else params


def torch_sgds(params, path, **options):
    """torch's SGD by the path that LCAM takes: without options the fused one, where parameter and gradient allow it."""
    if path or params[0].dtype == torch.bfloat16:
        return [torch.optim.SGD(params, **options, **path)]
    alike = [q for q in params if q.is_contiguous()]
    others = [q for q in params if not q.is_contiguous()]
    return [torch.optim.SGD(alike, fused=True, **options), torch.optim.SGD(others, **options)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_equal_momenta_are_sgd_bit_for_bit(path, options, dtype):
    """Over random gradients in several seeds, on each of torch's paths that is right."""
    low = dtype == torch.bfloat16
    if path.get("fused") and low:
        params = make_parameters(dtype, 0)
        optimizer = LCAM(params, **options, **path)
        with pytest.raises(RuntimeError, match="fused=True with a torch.bfloat16"):
            drive(optimizer, params, 1, 0)
        return
    for seed in range(3):
        ours, theirs = parameters_for(path, dtype, seed), parameters_for(path, dtype, seed)
        # What bfloat16's rounding drops is kept unless one asks for SGD: tests/precision/test_bf16.py.
        pair, plain = {"low_loss_momentum": 0.9, "high_loss_momentum": 0.9}, {"kahan": False} if low else {}
        lcam = LCAM(ours, lr=0.1, **pair, **plain, **options, **path)
        sgds = torch_sgds(theirs, path, lr=0.1, momentum=0.9, **options)
        states = [sgd.state for sgd in sgds]
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        for _ in range(20):
            set_gradients(ours, generators[0])
            set_gradients(theirs, generators[1])
            lcam.step()
            for sgd in sgds:
                sgd.step()
        assert identical(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            (state,) = [state[b] for state in states if b in state]
            assert torch.equal(lcam.state[a]["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_path_is_the_plain_loop_but_for_rounding(path, options, dtype):
    """A hundred updates, the momentum changing in between, beside torch's loop over single tensors."""
    ours, theirs = parameters_for(path, dtype), parameters_for(path, dtype)
    lcam = LCAM(ours, lr=0.05, **options, **path)
    sgd = torch.optim.SGD(theirs, lr=0.05, momentum=0.95, foreach=False, **options)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for index in range(100):
        mu = 0.9 if index % 7 < 3 else 0.95
        for optimizer, params, generator in zip((lcam, sgd), (ours, theirs), generators, strict=True):
            optimizer.param_groups[0]["momentum"] = mu
            set_gradients(params, generator)
            optimizer.step()
    assert relative_error(ours, theirs) <= (1e-6 if dtype == torch.float32 else 1e-14)


def ramp(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


ODD = {
    "a gradient laid out otherwise": lambda: (torch.ones(6, 4), ramp(4, 6).t()),
    "an expanded gradient": lambda: (torch.ones(6, 4), ramp(6, 1).expand(6, 4)),
    "a transposed parameter": lambda: (torch.ones(4, 6).t(), ramp(6, 4)),
    "gaps": lambda: (torch.ones(12, 8)[::2, ::2], ramp(12, 8)[::2, ::2]),
    "a gradient that is the opposite of its memory": lambda: (torch.ones(6, 4), torch._neg_view(ramp(6, 4))),
}


@pytest.mark.parametrize("odd", ODD)
def test_layouts_that_torchs_fused_step_reads_wrongly(odd):
    """By default they take the plain loop, and the others of their group the fused step; `fused=True` is refused."""

    def made(**path):
        theta, g = ODD[odd]()
        params = [nn.Parameter(theta), nn.Parameter(torch.ones(4, 4, 2, 2).to(memory_format=torch.channels_last))]
        params[0].grad, params[1].grad = g, params[1].detach().clone()
        return params, LCAM(params, lr=0.1, **path)

    (ours, lcam), (theirs, plain) = made(), made(foreach=False)
    for optimizer in (lcam, plain):
        for _ in range(3):
            optimizer.step()
    assert not identical(ours, [torch.ones_like(q) for q in ours]) and relative_error(ours, theirs) <= 1e-6
    params, fused = made(fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True with a torch.float32 parameter of shape \(6, 4\) on the CPU;"):
        fused.step()
    assert identical(params, [torch.ones_like(q) for q in params])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_step_is_the_step(dtype):
    """Dynamo runs an optimizer's `_init_group` while it compiles, and never again: nothing may be done in there."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        q = nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype))
        optimizer = LCAM([q], lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for index in range(6):
            q.grad = (3 * q.detach() + index).cos()
            step()
        results.append(q)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0.0)
    assert not torch.equal(results[0], torch.linspace(-1, 1, 50, dtype=dtype))


def test_hooks_run_once_a_step():
    """Also where there is a torch SGD, whose own step then has hooks too."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    q = nn.Parameter(torch.ones(1))
    q.grad = torch.ones(1)
    optimizer, seen = LCAM([q]), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    assert optimizer.step(lambda: 7.0) == 7.0 and seen == ["pre", "post"]


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 5e-4}], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("pair", [(0.9, 0.95), (0.95, 0.9)], ids=["left", "right"])
def test_the_authors_loop_bit_for_bit(pair, path, options):
    """Five epochs of real training with at least ten switches: same losses, momenta and weights."""
    for seed in range(2):
        low, high = pair
        theirs, epochs = classification_problem(seed)
        sgd = {**options, **(path or {"fused": True})}
        momenta, losses = train_by_hand(theirs, nn.functional.cross_entropy, epochs, low, high, 0.05, **sgd)
        assert sum(a != b for a, b in zip(momenta, momenta[1:], strict=False)) >= 10 and len(epochs) >= 4

        ours, epochs = classification_problem(seed)
        optimizer = LCAM(ours.parameters(), lr=0.05, low_loss_momentum=low, high_loss_momentum=high, **options, **path)
        phase, used, seen = LossPhase(optimizer), [], []
        for batches in epochs:
            phase.start_epoch()
            for x, y in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(ours(x), y)
                loss.backward()
                used.append(optimizer.param_groups[0]["momentum"])
                optimizer.step()
                phase.step(loss)
                seen.append(loss.item())
        assert seen == losses and used == momenta
        assert identical(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gradients_survive_the_step(path, options):
    """torch's own SGD(foreach=True, nesterov=True) without weight decay overwrites them."""
    params = parameters_for(path, torch.float32)
    optimizer = LCAM(params, lr=0.1, **options, **path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        set_gradients(params, generator)
        kept = [q.grad.clone() for q in params]
        optimizer.step()
        assert identical([q.grad for q in params], kept)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("low", [0.0, 0.5])
def test_changing_momenta_follow_the_formula(low, path):
    """`buf` goes on being updated in a phase of momentum 0."""
    q = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    optimizer = LCAM([q], lr=0.1, low_loss_momentum=low, high_loss_momentum=0.9, weight_decay=0.1, **path)
    phase = LossPhase(optimizer)
    generator = torch.Generator().manual_seed(0)
    grads, used = torch.randn(30, generator=generator, dtype=torch.float64), []
    for index, g in enumerate(grads):
        used.append(optimizer.param_groups[0]["momentum"])
        q.grad = g.reshape(1).clone()
        optimizer.step()
        phase.step(1.0 / (index + 1) if index % 3 else 9.0)
    assert {round(mu, 9) for mu in used} == {low, 0.9}
    expected = sgd_by_formula(1.5, grads.tolist(), used, 0.1, 0.1)
    assert q.item() == pytest.approx(expected, rel=1e-12)


def test_step_only_reads_momentum():
    """No step changes any option of any group."""
    params = make_parameters()
    optimizer = LCAM(params)
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    drive(optimizer, params, 3)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_parameter_whose_gradients_come_later(path):
    """torch's own SGD(fused=True) fails there."""
    results = []
    for make in (
        lambda q: LCAM(q, lr=0.1, low_loss_momentum=0.9, high_loss_momentum=0.9, **path),
        lambda q: torch.optim.SGD(q, lr=0.1, momentum=0.9, foreach=False),
    ):
        params = [nn.Parameter(torch.linspace(0, 1, 9, dtype=torch.float64)) for _ in range(2)]
        optimizer = make(params)
        for step in range(6):
            params[0].grad = (params[0].detach() + step).cos()
            params[1].grad = (params[1].detach() + step).sin() if step > 2 else None
            optimizer.step()
        results.append([q.detach() for q in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


def test_states_of_another_shape_are_refused():
    small, large = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(40))
    small.grad = torch.ones(5)
    theirs, ours = LCAM([small]), LCAM([large])
    theirs.step()
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(5,\) for a parameter of shape \(40,\)"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


def test_a_group_may_have_its_own_pair():
    """Its momentum starts at its own high_loss_momentum; missing values come from the defaults."""
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = LCAM([{"params": [a], "high_loss_momentum": 0.7}, {"params": [b]}], high_loss_momentum=0.8)
    optimizer.add_param_group({"params": [c], "low_loss_momentum": 0.1, "high_loss_momentum": 0.6, "lr": 0.5})
    assert [g["momentum"] for g in optimizer.param_groups] == [0.7, 0.8, 0.6]
    assert [g["low_loss_momentum"] for g in optimizer.param_groups] == [0.9, 0.9, 0.1]


def test_sparse_gradients_as_sgd_does():
    """An embedding with sparse=True trains as it does with SGD."""
    results = []
    for make in (
        lambda q: LCAM(q, lr=0.1, low_loss_momentum=0.0, high_loss_momentum=0.0),
        lambda q: torch.optim.SGD(q, lr=0.1),
    ):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 3, sparse=True)
        optimizer = make(embedding.parameters())
        for rows in ([0, 1], [1, 4]):
            optimizer.zero_grad()
            embedding(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
        results.append(embedding.weight.detach().clone())
    assert torch.equal(*results)


def test_complex_parameters_as_sgd_does():
    """SGD takes them, and so does LCAM."""
    results = []
    for make in (
        lambda q: LCAM(q, lr=0.1, low_loss_momentum=0.9, high_loss_momentum=0.9),
        lambda q: torch.optim.SGD(q, lr=0.1, momentum=0.9),
    ):
        q = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        optimizer = make([q])
        for _ in range(3):
            q.grad = q.detach() * (0.5 + 0.25j)
            optimizer.step()
        results.append(q.detach().clone())
    assert torch.equal(*results)
