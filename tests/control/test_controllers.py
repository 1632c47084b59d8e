# SPDX-License-Identifier: Apache-2.0
"""The two controllers against hand-written values and against the authors' loop."""

import math

import pytest
import torch
from torch import nn

from hf_nsf import LCAM, NSF, LossPhase, PCycle, p_schedule


def lcam(**options):
    return LCAM([nn.Parameter(torch.ones(1))], low_loss_momentum=0.8, high_loss_momentum=0.9, **options)


def momentum(optimizer):
    return {group["momentum"] for group in optimizer.param_groups}


def problem(seed):
    torch.manual_seed(seed)
    x = torch.randn(96, 6)
    y = (x.prod(1) > 0).long()
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    return model, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 96, 8)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("theirs_by", "ours_by"), [({"fused": True}, {}), ({}, {"fused": False})], ids=["fused", "loop"]
)
def test_lcam_is_the_authors_loop_bit_for_bit(theirs_by, ours_by, seed):
    theirs, batches = problem(seed)
    ours, _ = problem(seed)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **theirs_by)
    pair = {"low_loss_momentum": 0.8, "high_loss_momentum": 0.9}
    optimizer = LCAM(ours.parameters(), lr=0.1, weight_decay=5e-4, **pair, **ours_by)
    phase, switches = LossPhase(optimizer), 0
    for _ in range(5):
        total = 0.0
        phase.start_epoch()
        for index, (x, y) in enumerate(batches):
            for model, opt in ((theirs, sgd), (ours, optimizer)):
                opt.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                opt.step()
                if opt is sgd:
                    total += loss.item()
                    chosen = 0.8 if loss.item() < total / (index + 1) else 0.9
                    switches += chosen != sgd.param_groups[0]["momentum"]
                    sgd.param_groups[0]["momentum"] = chosen
                else:
                    phase.step(loss)
            assert momentum(optimizer) == {sgd.param_groups[0]["momentum"]}
    assert switches >= 10
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_phases_by_hand():
    optimizer = lcam()
    phase = LossPhase(optimizer)
    phase.start_epoch()
    assert momentum(optimizer) == {0.9}
    # means: 2, 1.5, 2, 2 (equal is high), 1.8
    for loss, expected in ((2.0, 0.9), (1.0, 0.8), (3.0, 0.9), (2.0, 0.9), (1.0, 0.8)):
        phase.step(loss)
        assert momentum(optimizer) == {expected}
    before = dict(optimizer.param_groups[0])
    for loss, skipped in ((math.nan, False), (math.inf, False), (0.0, True)):
        phase.step(loss, skipped=skipped)
        assert optimizer.param_groups[0] == before
    phase.start_epoch()
    assert momentum(optimizer) == {0.8}  # the mean restarts, the momentum does not
    phase.step(0.1)
    assert momentum(optimizer) == {0.9}


def test_moving_average_by_hand_runs_through_epochs():
    optimizer = lcam()
    phase = LossPhase(optimizer, loss_average="ema", loss_ema_decay=0.5)
    seen = []
    for loss in (4.0, 2.0, 3.0, 2.5):
        phase.start_epoch()
        phase.step(torch.tensor(loss))
        seen.append((optimizer.param_groups[0]["loss_mean"], optimizer.param_groups[0]["momentum"]))
    assert seen == [(4.0, 0.9), (3.0, 0.8), (3.0, 0.9), (2.75, 0.8)]


def test_state_stands_in_every_group_and_goes_on_after_loading():
    def make():
        optimizer = lcam()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "low_loss_momentum": 0.5})
        return optimizer, LossPhase(optimizer)

    first, phase = make()
    for loss in (2.0, 1.0):
        phase.step(loss)
    assert [g["momentum"] for g in first.param_groups] == [0.8, 0.5]
    second, _ = make()
    second.load_state_dict(first.state_dict())
    again = LossPhase(second)
    for loss in (1.2, 1.7, 1.4):
        phase.step(loss)
        again.step(loss)
        for a, b in zip(first.param_groups, second.param_groups, strict=True):
            assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
            assert a["loss_count"] >= 3


SHAPES = {
    "cosine": [0.5, 0.0, -0.5, 0.0],
    "triangular": [0.5, 0.0, -0.5, 0.0],
    "sawtooth": [0.5, 0.25, 0.0, -0.25],
    "square": [0.5, 0.5, -0.5, -0.5],
}


@pytest.mark.parametrize(("shape", "values"), SHAPES.items())
def test_cycles_by_hand(shape, values):
    options = {"p_min": -0.5, "p_max": 0.5, "cycle_shape": shape}
    for period in ({"cycle_steps": 4}, {"cycles": 2, "total_steps": 8}):
        assert p_schedule(range(8), **options, **period) == pytest.approx(values * 2, abs=1e-15)
        optimizer = NSF([nn.Parameter(torch.ones(1))])
        cycle = PCycle(optimizer, **options, **period)
        used = []
        for _ in range(8):
            used.append(optimizer.param_groups[0]["p"])
            cycle.step()
        assert used == p_schedule(range(8), **options, **period)


def test_every_cycle_begins_at_p_max_however_its_period_rounds():
    """100 updates in 6 cycles have one at update 50, though 50 mod (100 / 6) is not 0 in floating point."""
    for total in range(2, 130):
        for cycles in range(1, min(total, 24) + 1):
            begins = [k for k in range(total) if k * cycles % total == 0]
            for shape in SHAPES:
                found = p_schedule(begins, p_min=-0.25, p_max=0.5, cycles=cycles, total_steps=total, cycle_shape=shape)
                assert found == [0.5] * len(begins), (total, cycles, shape)


def test_constant_and_tensor_p():
    assert p_schedule(range(3), p=-0.1) == [-0.1] * 3
    optimizer = NSF([nn.Parameter(torch.ones(1))], p=torch.tensor(0.5))
    tensor = optimizer.param_groups[0]["p"]
    PCycle(optimizer, p_min=0.0, cycle_steps=2).step()
    assert optimizer.param_groups[0]["p"] is tensor and tensor.item() == 0.0


def test_a_loaded_cycle_goes_on():
    first, second = (NSF([nn.Parameter(torch.ones(1))]) for _ in range(2))
    cycle = PCycle(first, cycle_steps=7)
    for _ in range(10):
        cycle.step()
    second.load_state_dict(first.state_dict())
    assert PCycle(second, cycle_steps=7).last_p == cycle.last_p == p_schedule([10], cycle_steps=7)[0]


BAD = [
    ({}, "period"), ({"cycles": 2}, "total_steps"), ({"cycles": 2, "cycle_steps": 3}, "cycle_steps=3"),
    ({"p": 0.5, "cycle_steps": 3}, "cycle_steps=3"), ({"p": 0.1, "p_min": 0.0}, "p_min=0.0"),
    ({"p_min": 1.0, "cycle_steps": 3}, "p_min=1.0"), ({"p_max": math.nan, "cycle_steps": 3}, "p_max=nan"),
    ({"cycle_steps": 0}, "cycle_steps=0"), ({"cycles": -1, "total_steps": 5}, "cycles=-1"),
    ({"cycle_steps": 3, "cycle_shape": "sine"}, "sine"), ({"p": math.inf}, "p=inf"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "shown"), BAD)
def test_bad_cycles_are_refused(options, shown):
    with pytest.raises(ValueError) as error:
        PCycle(NSF([nn.Parameter(torch.ones(1))]), **options)
    assert shown in str(error.value)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"loss_average": "mean"}, "mean"),
        ({"loss_ema_decay": 0.9}, "0.9"),
        ({"loss_average": "ema", "loss_ema_decay": 1}, "=1"),
    ],
)
def test_bad_phases_are_refused(options, shown):
    with pytest.raises(ValueError) as error:
        LossPhase(lcam(), **options)
    assert shown in str(error.value)


def test_the_wrong_optimizer_is_refused():
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="SGD"):
        LossPhase(sgd)
    with pytest.raises(ValueError, match="SGD"):
        PCycle(sgd, cycle_steps=2)
