# SPDX-License-Identifier: Apache-2.0
"""LCAM is torch's SGD bit for bit on each of torch's paths, with a momentum that others may change between steps."""

import pytest
import torch
from lcam_reference import sgd_by_formula
from problems import PATHS, identical, make_parameters, set_gradients
from torch import nn

from hf_nsf import LCAM, LossPhase

OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"nesterov": True},
    {"nesterov": True, "weight_decay": 0.1},
    {"nesterov": True, "maximize": True},
]


CASES = [(path, dtype) for path in PATHS for dtype in (torch.float32, torch.float64, torch.bfloat16)]
CASES.remove(("fused", torch.bfloat16))  # torch's fused kernel differs from run to run on a CPU


@pytest.mark.parametrize(("path", "dtype"), CASES, ids=str)
def test_equal_momenta_are_sgd_bit_for_bit(path, dtype):
    """All layouts and options, whatever the momentum is rewritten to, with a tensor as learning rate too."""
    gaps = path != "fused"  # torch's fused kernel fails there
    for index, options in enumerate(OPTIONS):
        ours, theirs = make_parameters(dtype, gaps=gaps), make_parameters(dtype, gaps=gaps)
        lr = torch.tensor(0.1) if index % 2 else 0.1
        lcam = LCAM(ours, lr=lr, low_loss_momentum=0.9, high_loss_momentum=0.9, **options, **PATHS[path])
        sgd = torch.optim.SGD(theirs, lr=lr, momentum=0.9, **options, **PATHS[path])
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        for step in range(12):
            momentum = 0.5 if step % 7 < 3 else 0.9
            for optimizer, params, generator in zip((lcam, sgd), (ours, theirs), generators, strict=True):
                optimizer.param_groups[0]["momentum"] = momentum
                set_gradients(params, generator)
                if step < 2 and path != "fused":  # nor does it know first gradients of single parameters
                    params[0].grad = None
                optimizer.step()
        assert identical(ours, theirs), options
        buffers = [[optimizer.state[q]["momentum_buffer"] for q in params] for optimizer, params in
                   ((lcam, ours), (sgd, theirs))]  # fmt: skip
        assert identical(*buffers), options


@pytest.mark.parametrize("path", PATHS)
def test_changing_momenta_follow_the_formula(path):
    """The buffer is updated in a phase of momentum 0, too."""
    for low in (0.0, 0.5):
        q = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        momenta = {"low_loss_momentum": low, "high_loss_momentum": 0.9}
        optimizer = LCAM([q], lr=0.1, weight_decay=0.1, **momenta, **PATHS[path])
        phase = LossPhase(optimizer)
        grads, used = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64), []
        for index, g in enumerate(grads):
            used.append(optimizer.param_groups[0]["momentum"])
            q.grad = g.reshape(1).clone()
            optimizer.step()
            phase.step(1.0 / (index + 1) if index % 3 else 9.0)
        assert {round(mu, 9) for mu in used} == {low, 0.9}
        assert q.item() == pytest.approx(sgd_by_formula(1.5, grads.tolist(), used, 0.1, 0.1), rel=1e-12)


def test_each_group_starts_at_its_own_high_loss_momentum():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = LCAM([{"params": [a], "high_loss_momentum": 0.7}, {"params": [b]}], high_loss_momentum=0.8)
    optimizer.add_param_group({"params": [c], "low_loss_momentum": 0.1, "high_loss_momentum": 0.6, "lr": 0.5})
    assert [g["momentum"] for g in optimizer.param_groups] == [0.7, 0.8, 0.6]
    assert [g["low_loss_momentum"] for g in optimizer.param_groups] == [0.9, 0.9, 0.1]
    own = LCAM([{"params": [a], "loss_average": "epoch"}], loss_average="ema")
    assert own.param_groups[0]["loss_ema_decay"] is None
