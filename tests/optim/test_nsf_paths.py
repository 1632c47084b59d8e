# SPDX-License-Identifier: Apache-2.0
"""Every path of NSF in lockstep with the readable one, and what a step allocates."""

import itertools

import pytest
import torch
from problems import drive, identical, make_parameters, relative_error
from torch import nn

import hf_nsf.optim.nsf_blocked as blocked
from hf_nsf import NSF

PATHS = {"default": {}, "foreach": {"foreach": True}}
READABLE = {"foreach": False}
P = (0.5, 0.25, 0.0, -0.25, -0.5, 1.0, 0.1)
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    """Blocks so small that a few hundred elements are many of them, of which the scratch keeps two."""
    monkeypatch.setattr(blocked, "BLOCK", 64)
    monkeypatch.setattr(blocked, "SMALL", 40)
    monkeypatch.setattr(blocked, "KEPT_BYTES", 1024)


def parameters(dtype):
    generator = torch.Generator().manual_seed(7)
    large = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) for n in (41, 64, 333)]
    return make_parameters(dtype) + large


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_path_is_the_readable_one(dtype, p, step_scale, path):
    for options in ({}, {"maximize": True, "weight_decay": 0.0}, {"eps": 0.0, "betas": (0.8, 0.95)}):
        ours, theirs = parameters(dtype), parameters(dtype)
        for params, chosen in ((ours, PATHS[path]), (theirs, READABLE)):
            drive(NSF(params, lr=1e-3, p=p, step_scale=step_scale, **options, **chosen), params, steps=100)
        assert relative_error(ours, theirs) <= BOUNDS[dtype]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e12])
@pytest.mark.parametrize("p", [0.25, -0.25, -0.5, 1.0])
def test_float32_at_extreme_gradients(p, scale, path):
    """Against float64, where no square overflows or underflows; the parameters start at 0 and are all step."""
    ours, exact = [[nn.Parameter(torch.zeros(n, dtype=d)) for n in (20, 333)] for d in (torch.float32, torch.float64)]
    for params, chosen in ((ours, PATHS[path]), (exact, READABLE)):
        drive(NSF(params, lr=1e-2, p=p, eps=1e-30, **chosen), params, steps=20, scale=scale)
    assert relative_error(ours, exact) < 2e-5


@pytest.mark.parametrize("path", PATHS)
def test_tensor_lr_and_p_that_change(path):
    results = []
    for kind, chosen in ((float, PATHS[path]), (torch.tensor, PATHS[path]), (float, READABLE)):
        params = parameters(torch.float64)
        optimizer = NSF(params, lr=kind(1e-3), **chosen)
        for index, p in enumerate(P * 3):
            optimizer.param_groups[0]["p"] = kind(p)
            drive(optimizer, params, steps=index + 1, skip=index)
        results.append(params)
    assert relative_error(results[0], results[2]) < 1e-12
    assert relative_error(results[1], results[2]) < 1e-6  # the tensors are float32


def test_a_state_goes_from_path_to_path():
    whole, switched = parameters(torch.float32), parameters(torch.float32)
    drive(NSF(whole, p=0.1, **READABLE), whole, steps=30)
    state = None
    for index, chosen in enumerate((PATHS["default"], READABLE, PATHS["foreach"])):
        optimizer = NSF(switched, p=0.1, **chosen)
        if state is not None:
            optimizer.load_state_dict(state)
            optimizer.param_groups[0]["foreach"] = chosen.get("foreach")
        drive(optimizer, switched, steps=10 * index + 10, skip=10 * index)
        state = optimizer.state_dict()
    assert relative_error(switched, whole) <= 1e-6


def test_steps_that_differ_between_small_tensors():
    results = []
    for chosen in (PATHS["default"], READABLE):
        params = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(4)]
        optimizer = NSF(params, lr=1e-2, p=0.1, **chosen)
        for t, index in itertools.product(range(12), range(4)):
            params[index].grad = torch.arange(5, dtype=torch.float64) - t
            if t % (index + 1):
                params[index].grad = None
            if index == 3:
                optimizer.step()
        results.append(params)
    assert relative_error(*results) < 1e-13
    assert not identical(results[0][:1], results[0][1:2])


@pytest.mark.parametrize("step_scale", ["adam", "raw"])
@pytest.mark.parametrize("p", [0.5, 0.1])
def test_a_step_allocates_no_more_than_its_scratch(p, step_scale, monkeypatch):
    monkeypatch.undo()
    params = [nn.Parameter(torch.zeros(n)) for n in (6_000_000, 300_000, 1000)]
    for q in params:
        q.grad = torch.ones_like(q)
    optimizer = NSF(params, p=p, step_scale=step_scale)
    optimizer.step()
    monkeypatch.setattr(blocked, "KEPT_BYTES", 4 << 20)
    optimizer._scratch = blocked.Scratch()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    total = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert total < 8 << 20  # the parameters alone have 24 MiB
