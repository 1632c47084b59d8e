# SPDX-License-Identifier: Apache-2.0
"""LCAM is torch's SGD, and the authors' loop, bit for bit."""

import pytest
import torch
from lcam_reference import sgd_by_formula, train_by_hand
from problems import classification_problem, drive, identical, make_parameters, set_gradients
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
        ours, theirs = make_parameters(dtype, seed), make_parameters(dtype, seed)
        # What bfloat16's rounding drops is kept unless one asks for SGD: tests/precision/test_bf16.py.
        pair, plain = {"low_loss_momentum": 0.9, "high_loss_momentum": 0.9}, {"kahan": False} if low else {}
        lcam = LCAM(ours, lr=0.1, **pair, **plain, **options, **path)
        sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, **options, **path)
        drive(lcam, ours, 20, seed)
        drive(sgd, theirs, 20, seed)
        assert identical(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(lcam.state[a]["momentum_buffer"], sgd.state[b]["momentum_buffer"])


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 5e-4}], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("pair", [(0.9, 0.95), (0.95, 0.9)], ids=["left", "right"])
def test_the_authors_loop_bit_for_bit(pair, path, options):
    """Five epochs of real training with at least ten switches: same losses, momenta and weights."""
    for seed in range(2):
        low, high = pair
        theirs, epochs = classification_problem(seed)
        momenta, losses = train_by_hand(theirs, nn.functional.cross_entropy, epochs, low, high, 0.05, **options, **path)
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
    params = make_parameters(torch.float32)
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
