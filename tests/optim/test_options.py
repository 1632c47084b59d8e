# SPDX-License-Identifier: Apache-2.0
"""Options of both optimizers: the numbers and flags they accept, and the values they refuse and show."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from problems import TORCH, drive, make_parameters, relative_error
from torch import nn

from hf_nsf import LCAM, NSF, p_schedule

BOTH = [
    ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"), ({"lr": math.inf}, "lr=inf"),
    ({"lr": 10**400}, "Invalid lr: lr=1000"), ({"lr": torch.tensor(-1.0)}, "lr=tensor(-1.)"),
    ({"lr": torch.ones((), device="meta")}, "Invalid lr"), ({"lr": torch.ones(2)}, "Invalid lr"),
    ({"lr": "0.1"}, "lr='0.1'"), ({"lr": True}, "lr=True"), ({"lr": None}, "lr=None"), ({"lr": 1j}, "lr=1j"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"), ({"weight_decay": math.inf}, "weight_decay=inf"),
    ({"maximize": "false"}, "maximize='false'"), ({"maximize": None}, "maximize=None"), ({"maximize": 1}, "maximize=1"),
    ({"foreach": object}, "Invalid foreach"), ({"fused": 1}, "fused=1"), ({"foreach": "true"}, "foreach='true'"),
    ({"foreach": True, "fused": True}, "foreach=True, fused=True"),
]  # fmt: skip
OF_NSF = [
    ({"betas": (1.0, 0.9)}, "betas[0]=1.0"), ({"betas": (0.9, math.nan)}, "betas[1]=nan"),
    ({"betas": 0.9}, "betas=0.9"), ({"betas": (0.9,)}, "betas=(0.9,)"),
    ({"eps": -1e-8}, "eps=-1e-08"), ({"eps": 10**400}, "Invalid eps"),
    ({"kahan_sum": "false"}, "kahan_sum='false'"),
    ({"grafting": "big"}, "grafting='big', allowed is adam or none"), ({"grafting": None}, "grafting=None"),
]  # fmt: skip
OF_CYCLES = [
    ({"p": math.nan}, "p=nan"), ({"p": "half"}, "p='half'"), ({"p": torch.ones((), device="meta")}, "Invalid p"),
    ({"p": True}, "p=True"), ({"p": math.inf}, "p=inf"), ({"p": 3.0}, "p=3.0, allowed is a number from -1 to 1"),
    ({"p_min": -1.5}, "p_min=-1.5, allowed is a number from -1 to 1"), ({"p_max": 1.5}, "p_max=1.5"),
    ({"p_min": 1.0, "cycle_steps": 3}, "p_min=1.0"), ({"p": 0.1, "p_min": 0.0}, "p_min=0.0"),
    ({"p": 0.5, "cycle_steps": 3}, "cycle_steps=3"), ({"p": 0.5, "cycle_shape": "cosine"}, "cycle_shape='cosine'"),
    ({"cycles": 2, "cycle_steps": 3}, "cycle_steps=3"),
    ({"cycle_steps": 0}, "cycle_steps=0"), ({"cycle_steps": 1e-300}, "cycle_steps=1e-300"),
    ({"cycle_steps": "many"}, "cycle_steps='many'"), ({"cycles": -1, "total_steps": 5}, "cycles=-1"),
    ({"cycles": 1e308, "total_steps": 5}, "cycles=1e+308"),
    ({"cycle_steps": 3, "cycle_shape": "sine"}, "sine"), ({"cycle_shape": 3}, "cycle_shape=3"),
]  # fmt: skip
OF_LCAM = [
    ({"low_loss_momentum": 1.0}, "low_loss_momentum=1.0"), ({"high_loss_momentum": -0.1}, "high_loss_momentum=-0.1"),
    ({"high_loss_momentum": math.nan}, "nan"), ({"nesterov": True, "low_loss_momentum": 0.0}, "nesterov=True"),
    ({"nesterov": "yes"}, "nesterov='yes'"),
    ({"loss_average": "mean"}, "loss_average='mean', allowed is epoch or ema"),
    ({"loss_ema_decay": 0.9}, "loss_ema_decay=0.9"),
    ({"loss_average": "ema", "loss_ema_decay": 1}, "loss_ema_decay=1"),
]  # fmt: skip
BAD = [(cls, *case) for cls, cases in ((NSF, BOTH + OF_NSF + OF_CYCLES), (LCAM, BOTH + OF_LCAM)) for case in cases]


@pytest.mark.parametrize(("cls", "options", "shown"), BAD)
def test_bad_values_are_refused_and_shown(cls, options, shown):
    """In the constructor, in one of its groups, and in a group added later; the optimizer then stays unchanged.

    Those of a cycle by p_schedule, too.
    """
    q = nn.Parameter(torch.ones(1))
    optimizer = cls([nn.Parameter(torch.ones(1))])
    attempts = [
        lambda: cls([q], **options),
        lambda: cls([{"params": [q], **options}]),
        lambda: optimizer.add_param_group({"params": [q], **options}),
    ]
    if any(options is of_cycle for of_cycle, _ in OF_CYCLES):
        attempts.append(lambda: p_schedule([0], **options))
    for attempt in attempts:
        with pytest.raises(ValueError) as error:
            attempt()
        assert shown in str(error.value)
    assert len(optimizer.param_groups) == 1


def one_dim(x):
    return torch.tensor([x])


KINDS = [np.float32, np.float64, np.float16, torch.tensor, one_dim, Fraction]


@pytest.mark.parametrize("kind", KINDS, ids=["float32", "float64", "float16", "0-dim", "1-dim", "fraction"])
def test_numbers_of_all_kinds(kind):
    """They become plain floats in the groups, and so in checkpoints; lr may stay a tensor, as in torch."""
    tables = {
        NSF: {"lr": 0.5, "betas": (0.5, 0.25), "eps": 0.125, "weight_decay": 0.25, "p": -0.25},
        LCAM: {"lr": 0.5, "low_loss_momentum": 0.5, "high_loss_momentum": 0.25, "weight_decay": 0.25},
    }
    for cls, numbers in tables.items():
        if cls is LCAM and kind is one_dim and TORCH < (2, 9):
            continue  # torch's SGD of then takes no lr of one dimension
        given = {k: tuple(map(kind, v)) if isinstance(v, tuple) else kind(v) for k, v in numbers.items()}
        results = []
        for options in (numbers, given):
            params = make_parameters()
            optimizer = cls(params, **options)
            drive(optimizer, params, 3)
            results.append(params)
        assert relative_error(*results) <= 1e-12
        for name, value in optimizer.param_groups[0].items():
            if name in numbers and not (name == "lr" and isinstance(given["lr"], torch.Tensor)):
                assert value == numbers[name] and type(value) is type(numbers[name])
    cycle = {"p_min": kind(0.0), "cycles": kind(2), "total_steps": kind(8)}
    assert NSF([nn.Parameter(torch.ones(1))], **cycle).param_groups[0]["total_steps"] == 8.0


@pytest.mark.parametrize("cls", [NSF, LCAM])
def test_groups_hold_plain_scalars_that_steps_leave_alone(cls):
    """All kinds of checkpoints keep numbers, flags, text and None; the names are the constructor's."""
    params = make_parameters()
    (group,) = cls(params).param_groups
    names = set(cls.__init__.__annotations__) - {"params", "return"}
    assert names <= group.keys()
    flat = [x for v in group.values() for x in (v if isinstance(v, tuple) else (v,)) if not isinstance(v, list)]
    assert all(x is None or type(x) in (bool, int, float, str) for x in flat)
    optimizer = cls([{**group, "lr": 0.5}])
    before = {**optimizer.param_groups[0], "params": None}
    drive(optimizer, params, 2)
    assert {**optimizer.param_groups[0], "params": None} == before
