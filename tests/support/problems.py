# SPDX-License-Identifier: Apache-2.0
"""Parameters of all layouts, random gradients and one small training problem, shared by the tests."""

import importlib.util

import pytest
import torch
from torch import nn

from hf_nsf import LCAM, NSF

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# The ways to make a step. NSF's fused=True is numba's kernels on a CPU, LCAM's is torch's own.
PATHS = {"default": {}, "foreach": {"foreach": True}, "reference": {"foreach": False}, "fused": {"fused": True}}
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="NSF's fused=True needs numba")
NSF_PATHS = ["default", "foreach", "reference", pytest.param("fused", marks=needs_numba)]
NSF_CASES = [pytest.param("nsf", path, marks=needs_numba if path == "fused" else ()) for path in PATHS]
CASES = [*(("lcam", path) for path in PATHS), *NSF_CASES]


def make_nsf(params, **options):
    """NSF with a constant p if there is one in `options`, else with a short cycle."""
    cycle = {} if "p" in options else {"p_min": -0.25, "cycle_steps": 10}
    return NSF(params, **{"lr": 1e-2, **cycle, **options})


def make_lcam(params, **options):
    return LCAM(params, **{"lr": 1e-2, "weight_decay": 0.01, **options})


MAKERS = {"nsf": make_nsf, "lcam": make_lcam}


def make_parameters(dtype=torch.float64, seed=0, gaps=True):
    """Matrix, vector, one element, 0-dim, empty, channels-last and transposed parameters, and one with gaps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [draw(5, 7), draw(3), draw(1), draw(), draw(0)]
    tensors += [draw(2, 3, 2, 4).to(memory_format=torch.channels_last), draw(6, 4).t()]
    strided = draw(8, 6)[::2, ::3]
    return [nn.Parameter(tensor) for tensor in (*tensors, *([strided] if gaps else []))]


def set_gradients(params, generator, scale=1.0):
    """Give every parameter a random gradient of its layout: the same numbers in every dtype, but for rounding."""
    for q in params:
        values = scale * torch.randn(q.shape, generator=generator, dtype=torch.float64)
        q.grad = torch.empty_like(q).copy_(values)


def drive(optimizer, params, steps, seed=1, scale=1.0, skip=0):
    """Make updates `skip` to `steps` over the random gradients of `seed`, which survive them."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(steps):
        set_gradients(params, generator, scale)
        if index >= skip:
            kept = [q.grad.clone() for q in params]
            optimizer.step()
            assert identical([q.grad for q in params], kept), "the step changed gradients"
    return params


def relative_error(actual, expected):
    """Largest relative 2-norm of a difference, over tensors."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(actual, expected, strict=True) if b.numel()]
    return max(((a - b).norm() / b.norm().clamp_min(1e-300)).item() for a, b in pairs)


def values(optimizer, params):
    """What the parameters stand for: with Kahan sums, more than what they hold."""
    comps = [optimizer.state[q].get("kahan_comp") for q in params]
    pairs = zip(params, comps, strict=True)
    return [(q.detach().double() + (0 if comp is None else comp.double())).cpu() for q, comp in pairs]


def identical(actual, expected):
    """Bit for bit the same, tensor by tensor."""
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(actual, expected, strict=True))


def copies(params):
    """New parameters with the same values and layouts."""
    return [nn.Parameter(q.detach().clone()) for q in params]


def classification_problem(seed, epochs=5, batches=12):
    """A small network and, for each epoch, shuffled mini-batches of a noisy task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * 8, 6, generator=generator)
    y = ((x[:, 0] * x[:, 1] + 0.3 * torch.randn(len(x), generator=generator)) > 0).long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    shuffled = []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).split(8)
        shuffled.append([(x[i], y[i]) for i in order])
    return model, shuffled
