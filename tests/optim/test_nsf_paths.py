# SPDX-License-Identifier: Apache-2.0
"""Every path of NSF in lockstep with the readable one, and what a step allocates."""

import copy
import functools
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from problems import drive, identical, make_parameters, relative_error
from torch import nn

import hf_nsf.optim.nsf as nsf
import hf_nsf.optim.nsf_blocked as blocked
from hf_nsf import NSF
from hf_nsf.optim import torch_threads

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the fused path needs numba")
PATHS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
NAMES = ["default", "foreach", pytest.param("fused", marks=needs_numba)]
READABLE = {"foreach": False}
P = (0.5, 0.25, 0.0, -0.25, -0.5, 1.0, 0.1)
OPTIONS = ({}, {"maximize": True, "weight_decay": 0.0}, {"eps": 0.0, "betas": (0.8, 0.95)})
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    """Blocks so small that a few hundred elements are many of them, of which the scratch keeps two."""
    monkeypatch.setattr(blocked, "BLOCK", 64)
    monkeypatch.setattr(blocked, "SMALL", 40)
    monkeypatch.setattr(blocked, "KEPT_BYTES", 1024)
    if nsf.compiled_loops():
        monkeypatch.setattr(nsf.compiled_loops(), "CHUNK", 32)
        monkeypatch.setattr(nsf.compiled_loops(), "BATCH", 100)
        monkeypatch.setattr(nsf.compiled_loops(), "KEPT", 224)


def parameters(dtype, dense=False):
    """All layouts, or the same values without gaps and in the layout of their gradients, as fused=True needs them."""
    generator = torch.Generator().manual_seed(7)
    large = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) for n in (41, 64, 333)]
    params = make_parameters(dtype) + large
    return [nn.Parameter(q.detach().contiguous()) for q in params] if dense else params


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_path_is_the_readable_one(dtype, p, step_scale, path):
    if path == "fused" and dtype == torch.float64:
        with pytest.raises(ValueError, match="fused=True with a torch.float64 parameter"):
            NSF(parameters(dtype), fused=True)
        return
    for index, options in enumerate(OPTIONS):
        ours = trained(dtype, p, step_scale, index, **PATHS[path])
        assert relative_error(ours, readable(dtype, p, step_scale, index)) <= BOUNDS[dtype], options


def trained(dtype, p, step_scale, option, **chosen):
    params = parameters(dtype, dense="fused" in chosen)
    drive(NSF(params, lr=1e-3, p=p, step_scale=step_scale, **OPTIONS[option], **chosen), params, steps=100)
    return params


@functools.cache
def readable(*case):
    """The same for all paths that are held against it."""
    return trained(*case, **READABLE)


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e12])
@pytest.mark.parametrize("p", [0.25, -0.25, -0.5, 1.0, -2.0, 3.0])
def test_float32_at_extreme_gradients(p, scale, path):
    """Against float64, where no square overflows or underflows; the parameters start at 0 and are all step."""
    ours, exact = [[nn.Parameter(torch.zeros(n, dtype=d)) for n in (20, 333)] for d in (torch.float32, torch.float64)]
    for params, chosen in ((ours, PATHS[path]), (exact, READABLE)):
        drive(NSF(params, lr=1e-2, p=p, eps=1e-30, **chosen), params, steps=20, scale=scale)
    assert relative_error(ours, exact) < 2e-5


@pytest.mark.parametrize("path", NAMES)
def test_tensor_lr_and_p_that_change(path):
    results, dtype = [], torch.float32 if path == "fused" else torch.float64
    for kind, chosen in ((float, PATHS[path]), (torch.tensor, PATHS[path]), (float, READABLE)):
        params = parameters(dtype, dense="fused" in chosen)
        optimizer = NSF(params, lr=kind(1e-3), **chosen)
        for index, p in enumerate(P * 3):
            optimizer.param_groups[0]["p"] = kind(p)
            drive(optimizer, params, steps=index + 1, skip=index)
        results.append(params)
    assert relative_error(results[0], results[2]) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert relative_error(results[1], results[2]) < 1e-6  # the tensors are float32


def test_a_state_goes_from_path_to_path():
    whole, switched = parameters(torch.float32, dense=True), parameters(torch.float32, dense=True)
    state = None
    paths = [PATHS["default"], READABLE, PATHS["foreach"], *([PATHS["fused"]] if nsf.compiled_loops() else [])]
    drive(NSF(whole, p=0.1, **READABLE), whole, steps=10 * len(paths))
    for index, chosen in enumerate(paths):
        optimizer = NSF(switched, p=0.1, **chosen)
        if state is not None:
            optimizer.load_state_dict(state)
            optimizer.param_groups[0].update(foreach=chosen.get("foreach"), fused=chosen.get("fused"))
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
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_allocates_no_more_than_its_scratch(fused, p, step_scale, monkeypatch):
    """What torch allocates in a step, and what is kept after it: numbers, however large the parameters."""
    monkeypatch.undo()
    monkeypatch.setattr(blocked, "KEPT_BYTES", 4 << 20)
    if nsf.compiled_loops():
        monkeypatch.setattr(nsf.compiled_loops(), "KEPT", 1 << 20)
    params = [nn.Parameter(torch.zeros(n)) for n in (6_000_000, 300_000, 1000)]
    for q in params:
        q.grad = torch.ones_like(q)
    optimizer = NSF(params, p=p, step_scale=step_scale, fused=fused)
    optimizer.step()
    optimizer._scratch = blocked.Scratch()
    optimizer._compiled = None
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    total = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert total < 8 << 20  # the parameters alone have 24 MiB
    kept = optimizer._scratch.nbytes + (optimizer._compiled.nbytes if optimizer._compiled else 0)
    assert (p == 0.5) == (kept == 0) and kept <= 6 << 20


def test_directions_in_two_dtypes_share_their_memory():
    scratch = blocked.Scratch()
    for dtype, size in ((torch.float32, 1000), (torch.float64, 700), (torch.float32, 1200)):
        scratch.take("u", dtype, size)
    assert scratch.nbytes == 5600


@needs_numba
def test_the_plan_of_many_parameters_is_small(monkeypatch):
    monkeypatch.undo()
    loops = nsf.compiled_loops()
    compiled = loops.CompiledNSF(blocked.Scratch())
    compiled._plans[()] = plan = loops.Plan((500_000_000, 4096) * 20)
    assert compiled.nbytes < 8 << 20 and plan.scratch == loops.KEPT
    assert (plan.highs - plan.lows).sum() == sum(plan.sizes)
    assert (plan.highs > plan.lows).all() and (plan.places + plan.highs - plan.lows <= loops.KEPT).all()


@pytest.mark.parametrize("step_scale", ["adam", "raw"])
def test_blocks_of_their_real_size_are_the_whole(step_scale, monkeypatch):
    """Several blocks, the last of them partial, a tensor for whose directions there is no room, and gathered ones."""
    monkeypatch.undo()
    monkeypatch.setattr(blocked, "KEPT_BYTES", 4 * blocked.BLOCK)
    results, generator = [], torch.Generator().manual_seed(3)
    start = [torch.randn(n, generator=generator) for n in (2 * blocked.BLOCK + 5, blocked.SMALL + 1, blocked.SMALL, 7)]
    for chosen in ({"fused": False}, READABLE):
        params = [nn.Parameter(x.clone()) for x in start]
        drive(NSF(params, lr=1e-3, p=0.1, step_scale=step_scale, **chosen), params, steps=10)
        results.append(params)
    assert relative_error(*results) <= 1e-6


@needs_numba
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
def test_fused_tiles_and_chunks_are_the_whole(step_scale, monkeypatch):
    """Several chunks of several tiles, the last of them partial, and a tensor for whose directions there is no room."""
    monkeypatch.undo()
    loops = nsf.compiled_loops()
    monkeypatch.setattr(loops, "KEPT", 3 * loops.CHUNK)
    results, generator = [], torch.Generator().manual_seed(3)
    start = [
        torch.randn(n, generator=generator) for n in (5 * loops.CHUNK + loops.kernels.TILE + 1, loops.CHUNK - 1, 7)
    ]
    for chosen in (PATHS["fused"], READABLE):
        params = [nn.Parameter(x.clone()) for x in start]
        drive(NSF(params, lr=1e-3, p=0.1, step_scale=step_scale, **chosen), params, steps=10)
        results.append(params)
    assert relative_error(*results) <= 1e-6


@needs_numba
@pytest.mark.parametrize(
    ("step_scale", "p"), [("adam", 2.5), ("adam", -1.9), ("adam", -3.0), ("raw", -1.0), ("raw", 2.4)]
)
def test_fused_at_unusual_exponents(step_scale, p):
    """Inside the range where the loops hold and outside of it, where other paths step in."""
    loops, results = nsf.compiled_loops(), []
    assert loops.holds_at(p, step_scale) == (p in (-1.9, 2.4))
    for chosen in (PATHS["fused"], READABLE):
        params = parameters(torch.float32, dense=True)
        drive(NSF(params, lr=1e-3, p=p, step_scale=step_scale, **chosen), params, steps=20)
        results.append(params)
    assert relative_error(*results) <= 1e-6


@needs_numba
def test_the_power_is_as_exact_as_it_says():
    kernels = nsf.compiled_loops().kernels
    x = torch.logspace(-25, 25, 100_001, dtype=torch.float32).numpy()
    for exponent in (-1.0, -0.5, 0.1, 0.8, 1.5, 3.0, 5.0):
        wanted = x.astype("float64") ** exponent
        inside = (wanted > 1e-36) & (wanted < 1e36)
        power = kernels.power_of(exponent)
        found = [kernels._power(value, power) for value in x[inside]]
        assert (abs(found / wanted[inside] - 1) < 6e-7).all()


@needs_numba
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
def test_fused_steps_have_the_same_bits_with_any_number_of_threads(step_scale):
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        params = parameters(torch.float32, dense=True)
        drive(NSF(params, lr=1e-3, p=0.1, step_scale=step_scale, fused=True), params, steps=20)
        results.append(params)
    torch.set_num_threads(threads)
    assert identical(*results)


@needs_numba
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
def test_nothing_is_compiled_again_while_p_cycles(step_scale):
    from numba.core import event

    assert nsf.compiled_loops().is_ready(step_scale)
    made = nsf.compiled_loops().kernels.kernel.cache_info().misses
    with event.install_recorder("numba:compile") as recorder:
        for kind, lr in ((float, 1e-3), (torch.tensor, torch.tensor(1e-3))):
            params = parameters(torch.float32, dense=True)
            optimizer = NSF([{"params": params[:3], "weight_decay": 0.0}, {"params": params[3:]}], lr=lr, fused=True)
            for index, p in enumerate(P * 2):
                for group in optimizer.param_groups:
                    group.update(p=kind(p), step_scale=step_scale)
                drive(optimizer, params, steps=index + 1, skip=index)
        assert recorder.buffer == [] and nsf.compiled_loops().kernels.kernel.cache_info().misses == made
        compile_something()
        assert recorder.buffer  # it would have seen one


def compile_something():
    import numba

    return numba.njit(lambda x: x + 1)(1)


@needs_numba
def test_large_optimizers_are_compiled_unless_told_not_to(monkeypatch):
    loops, used = nsf.compiled_loops(), []
    step = loops.CompiledNSF.step
    monkeypatch.setattr(loops.CompiledNSF, "step", lambda *a, **k: used.append(1) or step(*a, **k))
    assert loops.is_ready("adam")
    for least, fused, expected in ((nsf.COMPILED_FROM, None, 0), (100, None, 1), (100, False, 0), (10**9, True, 1)):
        monkeypatch.setattr(nsf, "COMPILED_FROM", least)
        used.clear()
        params = parameters(torch.float32, dense=True)
        drive(NSF(params, p=0.1, fused=fused), params, steps=1)
        assert len(used) == expected, (least, fused)
        drive(copy.deepcopy(NSF(params, p=0.5, fused=fused)), params, steps=1)
        assert len(used) == expected  # AdamW's step is torch's


def test_without_numba_true_is_refused_and_none_is_the_blocked_path(monkeypatch):
    monkeypatch.setattr(nsf, "compiled_loops", lambda: None)
    monkeypatch.setattr(nsf, "COMPILED_FROM", 1)
    with pytest.raises(ValueError, match="fused=True needs numba"):
        NSF(parameters(torch.float32, dense=True), fused=True)
    ours, theirs = parameters(torch.float32, dense=True), parameters(torch.float32, dense=True)
    for params, chosen in ((ours, {}), (theirs, {"foreach": False})):
        drive(NSF(params, p=0.1, **chosen), params, steps=5)
    assert relative_error(ours, theirs) <= 1e-6


@needs_numba
def test_a_tensor_without_gradients_and_zeros_move_nothing():
    params = [nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(50))]
    for p, step_scale in itertools.product((-0.5, 0.0, 0.25), ("adam", "raw")):
        optimizer = NSF(params, p=p, step_scale=step_scale, weight_decay=0.0, fused=True, lr=0.1)
        params[0].grad, params[1].grad = torch.zeros(100), torch.zeros(70)
        params[1].grad[3] = 1.0
        params[2].grad = None
        optimizer.step()
        assert torch.equal(params[0], torch.ones(100)) and torch.equal(params[2], torch.ones(50))
        assert params[1][3] != 1 and torch.equal(params[1][4:], torch.ones(66))
        params[1].data.fill_(1.0)


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
def test_what_is_not_a_number_is_not_hidden(step_scale, value, path):
    results = []
    for chosen in (PATHS[path], READABLE):
        params = [nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(70))]
        optimizer = NSF(params, p=0.1, step_scale=step_scale, **chosen)
        for q in params:
            q.grad = torch.ones_like(q)
        params[0].grad[5] = value
        optimizer.step()
        results.append(params)
    (ours, other), (theirs, _) = results
    assert not ours[5].isfinite() and torch.equal(ours.isfinite(), theirs.isfinite()) and other.isfinite().all()


@pytest.mark.parametrize("path", ["readable", *NAMES])
def test_what_is_not_a_number_lets_no_other_element_loose(path):
    """Without a length there is no step: with p = -1/2, directions would be a million times Adam's step here."""
    q = nn.Parameter(torch.zeros(50))
    q.grad = torch.full_like(q, 1e3)
    q.grad[7] = float("nan")
    NSF([q], lr=1.0, p=-0.5, weight_decay=0.0, **{**PATHS, "readable": READABLE}[path]).step()
    assert not q.detach().isfinite().any()


@pytest.mark.parametrize("path", NAMES)
def test_layouts_without_gaps_are_stepped_in_place_and_gaps_refused_where_they_cannot_be(path, monkeypatch):
    used = []
    walk_alike = nsf.walk_alike
    monkeypatch.setattr(nsf, "walk_alike", lambda *tensors: used.append(walk_alike(*tensors)) or used[-1])
    last = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    results = []
    for chosen in (PATHS[path], READABLE):
        params = [nn.Parameter(last.clone()), nn.Parameter(torch.ones(6, 4).t())]
        optimizer = NSF(params, p=0.1, **chosen)
        for step in range(5):
            for q in params:
                q.grad = (q.detach() * step).cos()
                assert q.grad.stride() == q.stride()
            optimizer.step()
        results.append(params)
    assert relative_error(*results) <= 1e-6 and used == ([] if path == "foreach" else 10 * [True])
    gaps = nn.Parameter(torch.ones(8, 6)[::2, ::3])
    gaps.grad = torch.ones_like(gaps)
    optimizer = NSF([gaps], p=0.1, **PATHS[path])
    if path == "fused":
        with pytest.raises(RuntimeError, match=r"fused=True with a parameter of shape \(4, 2\) that has gaps"):
            optimizer.step()
        assert torch.equal(gaps, torch.ones(4, 2))
    else:
        optimizer.step()
        assert (gaps < 1).all()


@pytest.mark.parametrize("path", NAMES)
def test_gradients_that_are_not_what_their_memory_says(path):
    results = []
    for chosen in (PATHS[path], READABLE):
        params = [nn.Parameter(torch.ones(50)) for _ in range(2)]
        params[0].grad, params[1].grad = torch._neg_view(torch.ones(50)), torch._efficientzerotensor(50)
        optimizer = NSF(params, p=0.1, weight_decay=0.0, **chosen)
        if path == "fused" and chosen is PATHS[path]:
            with pytest.raises(RuntimeError, match="fused=True with a parameter"):
                optimizer.step()
            return
        optimizer.step()
        results.append(params)
    assert relative_error(*results) <= 1e-6
    assert (results[0][0] > 1).all() and torch.equal(results[0][1], torch.ones(50))


@pytest.mark.parametrize("path", ["readable", *NAMES])
def test_states_of_another_shape_are_refused(path):
    """A larger vocabulary, for one; nothing outside of a tensor is ever written."""
    chosen = {**PATHS, "readable": READABLE}[path]
    small, large = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(40))
    small.grad, large.grad = torch.ones(5), torch.ones(40)
    theirs, ours = NSF([small], p=0.1, **chosen), NSF([large], p=0.1, **chosen)
    theirs.step()
    with pytest.raises(ValueError, match=r"exp_avg of shape \(5,\) for a parameter of shape \(40,\)"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    around = torch.zeros(60)
    ours.state[large] = {"step": torch.zeros(()), "exp_avg": around[:5], "exp_avg_sq": torch.zeros(5)}
    with pytest.raises(RuntimeError):
        ours.step()
    assert torch.equal(around[5:], torch.zeros(55))


# At p = 1/2 the other paths are torch's fused AdamW, which tells autograd nothing.
@pytest.mark.parametrize(
    ("path", "p"), [("readable", 0.5), ("foreach", 0.5), *itertools.product(["readable", "default", "foreach"], [0.1])]
)
def test_autograd_sees_that_parameters_have_changed(path, p):
    _check_that_autograd_sees_a_step(path, p)


@needs_numba
def test_autograd_sees_what_the_compiled_loops_have_changed():
    _check_that_autograd_sees_a_step("fused", 0.1)


def _check_that_autograd_sees_a_step(path, p):
    q = nn.Parameter(torch.ones(10))
    loss = (q * q).sum()
    loss.backward(retain_graph=True)
    optimizer = NSF([q], p=p, **{**PATHS, "readable": READABLE}[path])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("step_scale", ["adam", "raw"])
@pytest.mark.parametrize("p", [0.5, 0.1])
def test_several_lists_of_the_multi_tensor_path_are_the_whole(p, step_scale, monkeypatch):
    monkeypatch.setattr(nsf, "MULTI", 100)
    results = []
    for chosen in (PATHS["foreach"], READABLE):
        params = parameters(torch.float32)
        drive(NSF(params, p=p, step_scale=step_scale, **chosen), params, steps=20)
        results.append(params)
    assert relative_error(*results) <= 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    code = """
import os
from hf_nsf.optim import torch_threads
assert torch_threads._pool(1).submit(int, 3).result() == 3
child = os.fork()
if not child:
    os._exit(torch_threads._pool(1).submit(int, 5).result(timeout=60))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@needs_numba
def test_empty_tensors_alone_are_nothing_to_do():
    empty = nn.Parameter(torch.ones(0))
    empty.grad = torch.ones(0)
    optimizer = NSF([empty], p=0.1, fused=True)
    optimizer.step()
    assert optimizer.state[empty]["step"] == 1


@needs_numba
def test_loops_that_do_not_compile_are_not_used(monkeypatch):
    loops = nsf.compiled_loops()

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(loops, "is_ready", loops.is_ready.__wrapped__)
    monkeypatch.setattr(loops.kernels, "kernel", fails)
    ours, theirs = parameters(torch.float32, dense=True), parameters(torch.float32, dense=True)
    for params, chosen in ((ours, {"fused": True}), (theirs, READABLE)):
        drive(NSF(params, p=0.1, **chosen), params, steps=5)
    assert relative_error(ours, theirs) <= 1e-6


@needs_numba
def test_where_nothing_can_be_cached_the_loops_are_compiled_all_the_same(monkeypatch):
    kernels = nsf.compiled_loops().kernels
    cfunc = kernels.numba.cfunc

    def uncached(*args, cache=False, **kwargs):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(*args, **kwargs)

    monkeypatch.setattr(kernels.numba, "cfunc", uncached)
    assert kernels.kernel.__wrapped__(kernels.grafted_totals).address != 0


def test_a_group_added_later_counts(monkeypatch):
    monkeypatch.setattr(nsf, "COMPILED_FROM", 10)
    monkeypatch.setattr(nsf, "compiled_loops", lambda: None)
    optimizer = NSF([nn.Parameter(torch.ones(4))], p=0.1)
    optimizer._compiles(optimizer.param_groups[0], 0.1)
    assert optimizer._elements == 4
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    optimizer._compiles(optimizer.param_groups[0], 0.1)
    assert optimizer._elements == 11


@needs_numba
@pytest.mark.parametrize("step_scale", ["adam", "raw"])
def test_without_an_openmp_library_python_threads_serve(step_scale, monkeypatch):
    results, used = [], []
    pool = torch_threads._pool
    for found in (torch_threads.gomp_parallel(), None):
        monkeypatch.setattr(torch_threads, "gomp_parallel", lambda found=found: found)
        monkeypatch.setattr(torch_threads, "_pool", lambda threads: used.append(threads) or pool(threads))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        params = parameters(torch.float32, dense=True)
        drive(NSF(params, lr=1e-3, p=0.1, step_scale=step_scale, fused=True), params, steps=20)
        results.append(params)
    assert identical(*results) and set(used) == {2}


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="torch on Linux, with OpenMP"
)
def test_torchs_own_threads_are_found():
    assert torch_threads.gomp_parallel() is not None
