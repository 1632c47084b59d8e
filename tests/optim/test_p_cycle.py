# SPDX-License-Identifier: Apache-2.0
"""NSF's exponent: the values of each shape, the periods, and that it follows each parameter's own updates."""

import copy
import warnings

import pytest
import torch
from problems import NSF_PATHS, PATHS, identical
from torch import nn

from hf_nsf import NSF, p_schedule

SHAPES = {
    "cosine": [0.5, 0.25, -0.25, -0.5, -0.25, 0.25],
    "triangular": [0.5, 1 / 6, -1 / 6, -0.5, -1 / 6, 1 / 6],
    "sawtooth": [0.5, 1 / 3, 1 / 6, 0.0, -1 / 6, -1 / 3],
    "square": [0.5, 0.5, 0.5, -0.5, -0.5, -0.5],
}


def parameter():
    q = nn.Parameter(torch.linspace(-1, 1, 9))
    q.grad = torch.linspace(1, 2, 9)
    return q


@pytest.mark.parametrize(("shape", "values"), SHAPES.items())
def test_values_of_each_shape(shape, values):
    options = {"p_min": -0.5, "p_max": 0.5, "cycle_shape": shape}
    for period in ({"cycle_steps": 6}, {"cycles": 3, "total_steps": 18}):
        assert p_schedule(range(24), **options, **period) == pytest.approx(values * 4, abs=1e-15)
        optimizer, used = NSF([parameter()], **options, **period), []
        assert optimizer.last_p == 0.5
        for _ in range(24):
            optimizer.step()
            used.append(optimizer.last_p)
        assert used == p_schedule(range(24), **options, **period)
    assert p_schedule(range(4), p=-0.1) == [-0.1] * 4


def test_last_p_is_that_of_the_first_group_with_gradients():
    """Where only biases are trained, a Trainer's first group is empty."""
    optimizer = NSF([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [parameter()], "p_min": -0.5}])
    used = [optimizer.step() or optimizer.last_p for _ in range(60)]
    assert used == p_schedule(range(60), p_min=-0.5)
    assert NSF([parameter()], cycles=4).last_p == 0.5  # before a Trainer has set total_steps


def test_a_restarted_cycle_is_that_of_a_new_training():
    """After loading, too, and for groups that were frozen or come later; the moments and counters stay."""
    cycle = {"cycles": 1.5, "total_steps": 10}
    optimizer = NSF([parameter()], **cycle)
    for _ in range(7):
        optimizer.step()
    optimizer.restart_cycle()
    loaded = NSF([parameter()], **cycle)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.add_param_group({"params": [parameter()]})
    for each in (optimizer, loaded):
        used = [each.step() or each.last_p for _ in range(10)]
        assert used == p_schedule(range(10), **cycle) and next(iter(each.state.values()))["step"] == 17
    assert optimizer.param_groups[1]["first_step"] == 0
    optimizer.restart_cycle()
    assert [group["first_step"] for group in optimizer.param_groups] == [17, 10]


def test_a_restarted_cycle_begins_anew_for_what_was_frozen():
    """As where a head was trained alone at first."""
    body, cycle = parameter(), {"cycles": 1.5, "total_steps": 10}
    gradient, body.grad = body.grad, None
    optimizer = NSF([body, parameter()], **cycle)
    for _ in range(10):
        optimizer.step()
    optimizer.restart_cycle()
    body.grad = gradient
    used = [optimizer.step() or optimizer.last_p for _ in range(10)]
    assert used == p_schedule(range(10), **cycle) and optimizer.state[body]["step"] == 10


@pytest.mark.parametrize(
    ("options", "period"),
    [({}, 100), ({"total_steps": 1600}, 100), ({"total_steps": 64}, 8), ({"total_steps": 16}, 8),
     ({"total_steps": 15}, 15), ({"total_steps": 3}, 3), ({"total_steps": 60, "cycles": 30}, 2),
     ({"total_steps": 60, "cycle_steps": 7}, 7), ({"cycle_steps": 2.5}, 5)],
)  # fmt: skip
def test_periods(options, period):
    """By default from p_max = 1/2 to p_min = 1/4 by a cosine, with at least 8 updates a cycle where possible."""
    found = p_schedule(range(4 * period), **options)
    assert found[0] == max(found) == 0.5 and found[:period] * 4 == pytest.approx(found, abs=1e-12)
    assert period <= 5 or found[: period // 2 + 1] == sorted(found[: period // 2 + 1], reverse=True)
    if period % 2 == 0 and "cycles" not in options:
        assert found[period // 2] == min(found) == 0.25


def test_cycles_begin_at_p_max_however_the_period_rounds():
    """100 updates in 6 cycles have one at update 50, though 50 mod (100 / 6) is not 0 in floating point."""
    for total in range(2, 130, 3):
        for cycles in range(1, min(total, 24) + 1):
            begins = [k for k in range(total) if k * cycles % total == 0]
            for shape in SHAPES:
                found = p_schedule(begins, p_min=-0.25, p_max=0.5, cycles=cycles, total_steps=total, cycle_shape=shape)
                assert found == [0.5] * len(begins), (total, cycles, shape)


@pytest.mark.parametrize("path", NSF_PATHS)
def test_p_follows_each_parameters_own_updates(path):
    """As a constant rewritten before each step does, for gradients that come late and are missing at times, too."""
    cycle = {"p_min": -0.25, "p_max": 0.5, "cycle_steps": 5}
    first, late = parameter(), parameter()
    optimizer = NSF([first, late], **cycle, **PATHS[path])
    for t in range(20):
        late.grad = torch.linspace(1, 2, 9) if t > 3 and t % 3 else None
        optimizer.step()
        assert optimizer.last_p == p_schedule([t], **cycle)[0]
    for updates, q in ((20, first), (11, late)):
        alone = parameter()
        rewritten = NSF([alone], p=0.0, **PATHS[path])
        for p in p_schedule(range(updates), **cycle):
            rewritten.param_groups[0]["p"] = p
            rewritten.step()
        assert identical([alone], [q]) and optimizer.state[q]["step"] == updates


def test_the_total_may_come_later():
    """The Trainer's callback fills it in; without it, cycles mean nothing."""
    optimizer = NSF([parameter()], cycles=2)
    for attempt in (optimizer.step, lambda: p_schedule([0], cycles=2)):
        with pytest.raises(ValueError, match="cycles=2.0 needs total_steps"):
            attempt()
    assert optimizer.state_dict()["state"][0]["step"] == 0
    loading = NSF([parameter()], lr=0.0, cycles=2)  # as torch.distributed.checkpoint steps while it loads
    loading.step()
    assert torch.equal(loading.param_groups[0]["params"][0], parameter())
    optimizer.param_groups[0]["total_steps"] = 12
    used = []
    for _ in range(12):
        optimizer.step()
        used.append(optimizer.last_p)
    assert used == p_schedule(range(12), cycles=2, total_steps=12)


def test_groups_have_cycles_of_their_own():
    names = ("p", "cycle_steps", "cycles", "p_max")
    table = [
        ({"p": 0.1}, (0.1, None, None, None)), ({"cycle_steps": 6}, (None, 6, None, 0.5)),
        ({"cycles": 3, "total_steps": 30}, (None, None, 3, 0.5)), ({"p_max": 1.0}, (None, 4, None, 1.0)),
        ({}, (None, 4, None, 0.5)),
    ]  # fmt: skip
    optimizer = NSF([{"params": [parameter()], **own} for own, _ in table[:-1]], cycle_steps=4)
    optimizer.add_param_group({"params": [parameter()], **table[-1][0]})
    for group, (_, expected) in zip(optimizer.param_groups, table, strict=True):
        assert tuple(group[name] for name in names) == expected
    constant = NSF([{"params": [parameter()], **own} for own in ({"cycle_steps": 5}, {}, {"total_steps": 9})], p=0.2)
    found = [(group["p"], group["cycle_steps"]) for group in constant.param_groups]
    assert found == [(None, 5), (0.2, None), (0.2, None)]


def test_short_periods_are_warned_of_once():
    for options in ({"cycle_steps": 3}, {"cycles": 4, "total_steps": 15}):
        optimizer = NSF([{"params": [parameter()]}, {"params": [parameter()]}], **options)
        with pytest.warns(UserWarning, match="period of 3") as record:
            optimizer.step()
            optimizer.step()
        assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"cycle_steps": 4}, {"p": 0.3}, {"total_steps": 3}):  # the last: nobody has asked for a cycle
            NSF([parameter()], **options).step()
