# SPDX-License-Identifier: Apache-2.0
"""The formula and the properties of the method in every implementation of NSF: eager, reference, numba, Triton.

Triton decides when it is imported whether it interprets, so one test runs its cases in a process of their own. On a
machine with a GPU they run compiled, too.
"""

import copy
import functools
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from nsf_reference import nsf_reference
from problems import drive, identical, make_parameters, needs_numba, relative_error, set_gradients, values
from torch import nn

from hf_nsf import NSF, p_schedule
from hf_nsf.optim import nsf, nsf_update
from hf_nsf.optim.kernels import EAGER, REFERENCE, Implementation
from hf_nsf.optim.nsf import GRAFTINGS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
can_run_triton = INTERPRETED or HAS_TRITON and torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not can_run_triton, reason="needs a GPU, or to interpret")
KERNELS = [pytest.param("numba", marks=needs_numba), pytest.param("triton", marks=needs_triton)]
MODULES = {"numba": "cpu", "triton": "gpu"}
SMALL = 32  # elements of a chunk
PS = (0.5, 0.25, 0.0, -0.25, -0.5, -0.75, -1.0, 0.75, 1.0, 0.1)
STEPS = 25
if INTERPRETED:  # which is slow
    PS, STEPS = (0.5, 0.1, -0.25, -1.0), 4
CYCLE = {"p_min": -0.5, "p_max": 0.5, "cycle_steps": 17, "cycle_shape": "triangular"}
OPTIONS = (
    {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0, "maximize": True},
    {"lr": 1e-2, "betas": (0.0, 0.9), "eps": 0.0, "weight_decay": 0.1},
)
# Of bfloat16 and float16, values are the parameters and their Kahan sums, rounded below the last place of both.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-4, torch.float16: 5e-6}
DTYPES = {"numba": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}


def implementation(name, monkeypatch, chunk):
    """An implementation, with chunks of so many elements, or of their real size."""
    if name not in MODULES:
        cut = EAGER if chunk is None else Implementation._make(functools.partial(f, numel=chunk) for f in EAGER)
        return {"eager": cut, "reference": REFERENCE}[name]
    module = importlib.import_module(f"hf_nsf.optim.kernels.{MODULES[name]}")
    for constant, value in (("CHUNK", chunk), ("BLOCK", chunk), ("SHARE", 1)):
        if chunk and hasattr(module, constant):
            monkeypatch.setattr(module, constant, value)
    return Implementation(module.update_moments, module.apply_update, module.whole_step)


def use(name, monkeypatch, chunk=SMALL):
    """Have NSF step all tensors with one implementation; by default with the one that it chooses for each."""
    if name != "default":
        chosen = implementation(name, monkeypatch, chunk)
        monkeypatch.setattr(nsf, "choose", lambda group, s, row: chosen)


@pytest.fixture(params=["default", "eager", "reference", *KERNELS])
def name(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


def on_device(name, tensors):
    """Parameters of these values, on the device of the implementation."""
    device = "cuda" if name == "triton" and not INTERPRETED else "cpu"
    return [nn.Parameter(tensor.detach().to(device)) for tensor in tensors]


def parameters(name, dtype=torch.float32):
    """All layouts, but for gaps where kernels are used."""
    return on_device(name, make_parameters(dtype, gaps=name not in MODULES))


@functools.cache
def expected(dtype, p, option, grafting, gaps, steps):
    """The oracle's parameters after the same gradients, as tensors."""
    params = make_parameters(dtype, gaps=gaps)
    start, generator, grads = [q.detach().double() for q in params], torch.Generator().manual_seed(1), []
    for _ in range(steps):
        set_gradients(params, generator)
        grads.append([q.grad.double() for q in params])
    exponents = p_schedule(range(steps), **(CYCLE if p == "cycle" else {"p": p}))
    results = []
    for index, first in enumerate(start):
        lists = [g[index].flatten().tolist() for g in grads]
        result = nsf_reference(first.flatten().tolist(), lists, exponents, grafting, **OPTIONS[option])
        results.append(torch.tensor(result, dtype=torch.float64).view(first.shape))
    return results


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_steps_follow_the_formula(name, dtype, grafting):
    """In low precision with Kahan sums to the precision of two numbers, without them to one rounding."""
    if dtype not in DTYPES.get(name, BOUNDS):
        pytest.skip("there are no kernels for it")
    low = dtype in (torch.bfloat16, torch.float16)
    cases = [(p, index % 3) for index, p in enumerate(PS)]
    if not INTERPRETED:
        cases += [("cycle", 1), (1e-46, 2), (0.25, 1), (0.5, 1), (-0.25, 0), (-0.25, 1), (-0.25, 2), (0.5, 2)]
    for p, option in cases:
        most = 4 if p in (-0.75, -1.0) else STEPS  # there the rounding of v counts up to three times in a step
        for kahan_sum, steps in ((None, most), (False, 1)) if low else ((None, most),):
            params = parameters(name, dtype)
            own = {**(CYCLE if p == "cycle" else {"p": p}), "kahan_sum": kahan_sum, **OPTIONS[option]}
            optimizer = NSF(params, grafting=grafting, **own)
            drive(optimizer, params, steps)
            exact = expected(dtype, p, option, grafting, name not in MODULES, steps)
            bound = BOUNDS[dtype] if kahan_sum is None else 2 * torch.finfo(dtype).eps
            assert relative_error(values(optimizer, params), exact) <= bound, own
            moments = {optimizer.state[q][moment].dtype for q in params for moment in ("exp_avg", "exp_avg_sq")}
            assert moments == {torch.promote_types(dtype, torch.float32)}
            assert all(optimizer.state[q]["step"] == steps for q in params)


@pytest.mark.parametrize("spike", [None, 1e13, 1e17, 1e18, 1e25])
def test_every_step_has_the_length_of_adams(name, spike):
    """Of random gradients, or of ones and a huge one: at 1e25 its square overflows, and Adam does not move it."""
    for p in PS:
        params = on_device(name, [torch.zeros(50), torch.zeros(7, 5)])
        set_gradients(params, torch.Generator().manual_seed(1))
        for q in params if spike else ():
            q.grad.fill_(1.0).view(-1)[3] = spike
        NSF(params, p=p, lr=1.0, weight_decay=0.0).step()
        for q in params:
            g = q.grad.double() * (q.grad.abs() < 1e19)
            length = (g / (g.abs() + 1e-8)).norm().item()
            assert q.detach().double().norm().item() == pytest.approx(length, rel=2e-6), p


def test_multiplying_all_gradients_changes_nothing(name):
    """In float32, where squares leave the range of float32 before the gradients do."""
    for p in PS:
        results = []
        for scale in (1.0, 1e-12, 1e-8, 1e12):
            if scale == 1e-12 and p < -0.5:
                continue  # beyond the range of the weights
            params = on_device(name, [torch.zeros(50)])
            drive(NSF(params, p=p, lr=1.0, eps=0.0, weight_decay=0.0), params, 2, scale=scale)
            results.append(params)
        assert all(relative_error(other, results[0]) <= 2e-5 for other in results[1:]), p


@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_zero_gradients_move_nothing(name, grafting):
    """All of one tensor, and some of another; without eps, or with one that is 0 in float32, too."""
    for p in PS:
        for eps in (1e-8, 1e-50, 0.0):
            params = on_device(name, [torch.ones(50), torch.ones(40)])
            for q in params:
                q.grad = torch.zeros_like(q)
            params[1].grad[3] = 1.0
            optimizer = NSF(params, p=p, eps=eps, grafting=grafting, lr=0.1, weight_decay=0.0)
            optimizer.step()
            optimizer.step()
            still, moved = (q.detach().cpu() for q in params)
            assert torch.equal(still, torch.ones(50)) and torch.equal(moved[4:], torch.ones(36)), (p, eps)
            assert moved[3].isfinite() and moved[3] < 1, (p, eps)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("grafting", "p"), [("adam", 0.25), ("adam", -1.0), ("adam", 0.5), ("none", 0.25), ("none", -0.5)]
)
def test_nonfinite_gradient_stays_in_its_tensor(name, grafting, p, value):
    """It spoils the whole tensor if the length is grafted, else its coordinate."""
    params = on_device(name, [torch.ones(50), torch.ones(40)])
    for q in params:
        q.grad = torch.ones_like(q)
    params[0].grad[7] = value
    NSF(params, p=p, grafting=grafting).step()
    bad, other = (~q.isfinite() for q in params)
    assert not other.any()
    if grafting == "adam" and p != 0.5:
        assert bad.all()
    else:
        assert not bad[:7].any() and not bad[8:].any() and (bad[7] or value == math.inf)


def test_beta1_zero_keeps_small_gradients(name):
    """m is g to the last bit, as torch.lerp has it."""
    (q,) = params = on_device(name, [torch.ones(8)])
    optimizer = NSF(params, p=0.25, betas=(0.0, 0.999))
    for g in (1.0, 1e-8):
        q.grad = torch.full_like(q, g)
        optimizer.step()
        assert (optimizer.state[q]["exp_avg"] == torch.tensor(g)).all()


def test_sums_are_those_that_apply_update_reads(name, monkeypatch):
    """Four times the square of Adam's length makes a step of twice the length, as for the sums of shards."""
    chosen, results = nsf.choose, []
    for factor in (1.0, 4.0):

        @functools.cache
        def changed(made, factor=factor):
            def update_moments(bucket):
                made.update_moments(bucket)
                assert bucket.sums.dtype == torch.float64 and bucket.sums.shape == (len(bucket.params), 2)
                bucket.sums[:, 0] *= factor

            return made._replace(update_moments=update_moments)

        monkeypatch.setattr(nsf, "choose", lambda *args, changed=changed: changed(chosen(*args)))
        params = on_device(name, [torch.zeros(41), torch.zeros(8, 3), torch.zeros(())])
        results.append(drive(NSF(params, p=0.0, lr=0.25, weight_decay=0.0), params, 1))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_the_same_bits_again_after_a_break_and_without_elements(name, grafting):
    whole, params = (on_device(name, make_parameters(torch.float32, gaps=False)) for _ in range(2))
    first, second = (NSF(each, p=0.1, grafting=grafting) for each in (whole, params))
    drive(first, whole, 4)
    drive(second, params, 2)
    second = copy.deepcopy(second)
    params = drive(second, second.param_groups[0]["params"], 4, skip=2)
    assert identical(whole, params)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert identical(*([own.state[q][moment] for q in some] for own, some in ((first, whole), (second, params))))
    empty = on_device(name, [torch.ones(0), torch.ones(3, 0)])
    drive(NSF(empty, p=0.1, grafting=grafting), empty, 1)


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("name", ["default", "eager", *KERNELS])
def test_large_tensors_are_cut_into_the_same_step(name, grafting, monkeypatch):
    """Chunks of their real size, the last one short, off alignment too; with gaps or transposed, pieces of rows."""
    n = 2 * {"numba": 1 << 15, "triton": 1 << 13}.get(name, nsf_update.PIECE) + 5
    results = []
    for used, dtype in ((name, torch.float32), ("reference", torch.float64)):
        use(used, monkeypatch, chunk=None)
        generator = torch.Generator().manual_seed(3)
        shapes = ((n,), (n,), (2, 2, n // 4), (n // 2, 4), (n // 2, 2))
        a, b, c, d, e = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        params = on_device(used, [a, b, c] if name in MODULES else [a, b, c, d[:, ::2], e.t()])
        params[1].data = params[1].data[1:]
        results.append([q.cpu() for q in drive(NSF(params, p=0.1, grafting=grafting), params, 2)])
    assert relative_error(*results) <= 1e-6


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("freed", ["param", "grad"])
def test_freed_memory_is_refused_by_kernels(name, freed, monkeypatch):
    use(name, monkeypatch)
    (q,) = params = on_device(name, [torch.ones(41)])
    q.grad = torch.ones_like(q)
    (q if freed == "param" else q.grad).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        NSF(params, p=0.25).step()


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs triton; this is the inner run")
def test_triton_interpreted_passes_all_cases():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton", __file__]
    command += ["-o", "filterwarnings="]  # those of numpy inside Triton's interpreter, which old versions give
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
