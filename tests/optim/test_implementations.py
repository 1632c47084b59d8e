# SPDX-License-Identifier: Apache-2.0
"""Every implementation of NSF's update against the formula: eager, reference, numba, Triton.

Triton decides when it is imported whether it interprets, so one test runs its cases in a process of their own. On a
machine with a GPU they run compiled, too.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from nsf_reference import nsf_reference
from problems import needs_numba

from hf_nsf.optim import nsf_update
from hf_nsf.optim.kernels import EAGER, REFERENCE, Implementation
from hf_nsf.optim.nsf_update import Bucket, Scalars

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
NAMES = ["eager", "reference", pytest.param("numba", marks=needs_numba)]
can_run_triton = INTERPRETED or HAS_TRITON and torch.cuda.is_available()
NAMES += [pytest.param("triton", marks=pytest.mark.skipif(not can_run_triton, reason="needs a GPU, or to interpret"))]
PS = (0.5, 0.25, 0.0, -0.25, -0.5, -0.75, -1.0, 0.75, 1.0, 0.1)
if INTERPRETED:  # which is slow
    PS = (0.5, 0.1, -0.25, -1.0)
SHAPES = ((41,), (0,), (8, 3), (), (1,))
SMALL = 32  # elements of a chunk
START = Scalars(0.25, 2.0**-6, 0.9, 0.999, 1e-8, 2.0**-3, False, "adam", 1)
OPTIONS = (
    {},
    {"maximize": True, "weight_decay": 0.0, "beta1": 0.3, "beta2": 0.95},
    {"eps": 0.0, "beta1": 0.0, "beta2": 0.9},
)


class Stepper:
    """An implementation, with chunks of a few elements, and the device of its tensors."""

    def __init__(self, name, monkeypatch):
        self.name, self.device = name, "cuda" if name == "triton" and not INTERPRETED else "cpu"
        if name in ("numba", "triton"):
            module = importlib.import_module(f"hf_nsf.optim.kernels.{'cpu' if name == 'numba' else 'gpu'}")
            for constant, value in (("CHUNK", SMALL), ("BLOCK", SMALL), ("SHARE", 1)):
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, value)
            self.functions = Implementation(module.update_moments, module.apply_update, module.whole_step)
        elif name == "eager":
            self.functions = Implementation._make(functools.partial(function, numel=SMALL) for function in EAGER)
        else:
            self.functions = REFERENCE

    def step(self, bucket):
        if bucket.scalars.needs_norms:
            self.functions.update_moments(bucket)
            self.functions.apply_update(bucket)
        else:
            self.functions.whole_step(bucket)


@pytest.fixture
def stepper(request, monkeypatch):
    return Stepper(request.param, monkeypatch)


every = pytest.mark.parametrize("stepper", NAMES, indirect=True)


def make_bucket(stepper, s, dtype=torch.float32, kahan=False, shapes=SHAPES, fill=torch.randn):
    """Random parameters with zero state."""
    torch.manual_seed(7)
    params = [fill(shape).to(stepper.device, dtype) for shape in shapes]
    moments = [[torch.zeros_like(q, dtype=torch.float32) for q in params] for _ in range(2)]
    comps = [torch.zeros_like(q) for q in params] if kahan else None
    return Bucket(s, [], params, [torch.zeros_like(q) for q in params], *moments, comps)


def drive(stepper, bucket, steps=4, scale=1.0, first=1):
    """Step over random gradients; return those of each tensor in float64. The gradients survive the steps."""
    generator, seen = torch.Generator().manual_seed(1), [[] for _ in bucket.params]
    for t in range(1, steps + 1):
        drawn = [scale * torch.randn(q.shape, generator=generator) for q in bucket.grads]
        bucket.grads = [value.to(q) for value, q in zip(drawn, bucket.params, strict=True)]
        kept = [g.clone() for g in bucket.grads]
        bucket.scalars = dataclasses.replace(bucket.scalars, t=t)
        if t >= first:
            stepper.step(bucket)
        assert all(map(torch.equal, bucket.grads, kept))
        for grads, g in zip(seen, bucket.grads, strict=True):
            grads.append(g.double().flatten().tolist())
    return seen


def values(bucket):
    """The parameters with their Kahan sums."""
    comps = bucket.kahan_comps or [torch.zeros_like(q) for q in bucket.params]
    return [(q.double() + comp.double()).flatten().cpu() for q, comp in zip(bucket.params, comps, strict=True)]


def everything(bucket):
    return [*bucket.params, *bucket.exp_avgs, *bucket.exp_avg_sqs, *(bucket.kahan_comps or [])]


def check(stepper, s, bound, dtype=torch.float32, kahan=False, scale=1.0, steps=4, **options):
    """The formula in Python's floats, for the same gradients."""
    bucket = make_bucket(stepper, s, dtype, kahan, **options)
    start = values(bucket)
    seen = drive(stepper, bucket, steps, scale)
    names = {"lr": s.lr, "betas": (s.beta1, s.beta2), "eps": s.eps, "weight_decay": s.weight_decay}
    for actual, theta, grads in zip(values(bucket), start, seen, strict=True):
        exact = nsf_reference(theta.tolist(), grads, [s.p] * steps, s.grafting, **names, maximize=s.maximize)
        exact = torch.tensor(exact, dtype=torch.float64)
        assert (actual - exact).norm() <= bound * exact.norm(), (s, dtype, (actual - exact).norm() / exact.norm())


@every
@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_steps_follow_the_formula(stepper, grafting):
    for index, p in enumerate(PS):
        check(stepper, dataclasses.replace(START, p=p, grafting=grafting, **OPTIONS[index % 3]), 1e-6)
    for options in OPTIONS:
        check(stepper, dataclasses.replace(START, p=-0.25, grafting=grafting, **options), 1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_the_formula(stepper, dtype):
    """With Kahan sums to the precision of two numbers, without them to one rounding."""
    if stepper.name == "numba" and dtype == torch.float16:
        pytest.skip("there are no numba kernels for float16")
    for grafting in ("adam", "none"):
        for p in (0.25, 0.5, -0.5):
            s = dataclasses.replace(START, p=p, grafting=grafting)
            # The interpreter cuts bfloat16 off where a GPU rounds.
            check(stepper, s, {torch.bfloat16: 1e-4, torch.float16: 1e-5}[dtype], dtype, kahan=True)
            check(stepper, s, 2 * torch.finfo(dtype).eps, dtype, steps=1)


@every
@pytest.mark.parametrize("spike", [None, 1e13, 1e17, 1e18, 1e25])
def test_every_step_has_the_length_of_adams(stepper, spike):
    """Of random gradients, or of ones and a huge one: at 1e25 its square overflows, and Adam does not move it."""
    for p in PS:
        s = dataclasses.replace(START, p=p, lr=1.0, weight_decay=0.0)
        bucket = make_bucket(stepper, s, shapes=((50,), (7, 5)), fill=torch.zeros)
        if spike is None:
            drive(stepper, bucket, 1)
        else:
            for g in bucket.grads:
                g.fill_(1.0).view(-1)[3] = spike
            stepper.step(bucket)
        for theta, g in zip(bucket.params, bucket.grads, strict=True):
            g = g.double() * (g.abs() < 1e19)
            length = (g / (g.abs() + s.eps)).norm().item()
            assert theta.double().norm().item() == pytest.approx(length, rel=2e-6), p


@every
def test_multiplying_all_gradients_changes_nothing(stepper):
    """In float32, where squares leave the range of float32 before the gradients do."""
    for p in PS:
        results = []
        for scale in (1.0, 1e-12, 1e-8, 1e12):
            if scale == 1e-12 and p < -0.5:
                continue  # beyond the range of the weights
            s = dataclasses.replace(START, p=p, lr=1.0, eps=0.0, weight_decay=0.0)
            bucket = make_bucket(stepper, s, shapes=((50,),), fill=torch.zeros)
            drive(stepper, bucket, 2, scale)
            results.append(values(bucket))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                assert (a - b).norm() <= 2e-5 * b.norm(), (p, (a - b).norm() / b.norm())


@every
def test_zero_gradients_move_nothing(stepper):
    """All of one tensor, and some of another; without eps, too."""
    for grafting in ("adam", "none"):
        for p in PS:
            for eps in (1e-8, 0.0):
                s = dataclasses.replace(START, p=p, eps=eps, grafting=grafting, lr=0.1, weight_decay=0.0)
                bucket = make_bucket(stepper, s, shapes=((50,), (40,)), fill=torch.ones)
                bucket.grads[1][3] = 1.0
                for t in (1, 2):
                    bucket.scalars = dataclasses.replace(s, t=t)
                    stepper.step(bucket)
                still, moved = (q.cpu() for q in bucket.params)
                assert torch.equal(still, torch.ones(50)) and torch.equal(moved[4:], torch.ones(36)), s
                assert moved[3].isfinite() and moved[3] < 1, s


@every
def test_nonfinite_gradient_stays_in_its_tensor(stepper):
    """It spoils the whole tensor if the length is grafted, else its coordinate."""
    for grafting, p in (("adam", 0.25), ("adam", -1.0), ("adam", 0.5), ("none", 0.25), ("none", -0.5)):
        for value in (math.nan, math.inf):
            bucket = make_bucket(stepper, dataclasses.replace(START, p=p, grafting=grafting), shapes=((50,), (40,)))
            for g in bucket.grads:
                g.fill_(1.0)
            bucket.grads[0][7] = value
            stepper.step(bucket)
            hit, other = bucket.params
            bad = ~hit.isfinite()
            assert other.isfinite().all()
            if bucket.scalars.needs_norms:
                assert bad.all()
            else:
                assert not bad[:7].any() and not bad[8:].any() and (bad[7] or value == math.inf)


@every
def test_beta1_zero_keeps_small_gradients(stepper):
    """m is g to the last bit, as torch.lerp has it."""
    s = dataclasses.replace(START, beta1=0.0)
    bucket = make_bucket(stepper, s, shapes=((8,),))
    for t, g in ((1, 1.0), (2, 1e-8)):
        bucket.scalars = dataclasses.replace(s, t=t)
        bucket.grads[0].fill_(g)
        stepper.step(bucket)
        assert (bucket.exp_avgs[0] == torch.tensor(g)).all()


@every
def test_sums_are_those_that_apply_update_reads(stepper):
    """Four times the square of Adam's length makes a step of twice the length, as for the sums of shards."""
    results = []
    for factor in (1.0, 4.0):
        bucket = make_bucket(stepper, dataclasses.replace(START, p=0.0, weight_decay=0.0), fill=torch.zeros)
        torch.manual_seed(2)
        bucket.grads = [torch.randn(q.shape).to(q) for q in bucket.params]
        stepper.functions.update_moments(bucket)
        assert bucket.sums.dtype == torch.float64 and bucket.sums.shape == (len(SHAPES), 2)
        bucket.sums[:, 0] *= factor
        stepper.functions.apply_update(bucket)
        results.append(values(bucket))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=0)


@every
def test_the_same_bits_again_after_a_break_and_without_elements(stepper):
    for grafting in ("adam", "none"):
        s = dataclasses.replace(START, grafting=grafting, p=0.1)
        whole, broken = (make_bucket(stepper, s) for _ in range(2))
        drive(stepper, whole, 4)
        drive(stepper, broken, 2)
        drive(stepper, broken, 4, first=3)
        assert all(map(torch.equal, everything(whole), everything(broken)))
        stepper.step(make_bucket(stepper, s, shapes=((0,), (3, 0))))


@every
@pytest.mark.parametrize("offset", [0, 1])
def test_chunks_of_their_real_size_on_and_off_alignment(stepper, offset, monkeypatch):
    monkeypatch.undo()
    if stepper.name == "eager":
        stepper.functions = EAGER
    size = {"numba": 1 << 15, "triton": 1 << 13}.get(stepper.name, nsf_update.PIECE)
    bucket = make_bucket(stepper, START, shapes=((size + 3 + offset,), (size + offset,)))
    for tensors in (bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs):
        tensors[:] = [tensor[offset:] for tensor in tensors]
    other = Bucket(START, [], *([q.clone() for q in each] for each in (
        bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs)))  # fmt: skip
    drive(stepper, bucket, 1)
    other.grads = [g.clone() for g in bucket.grads]
    REFERENCE.update_moments(other)
    REFERENCE.apply_update(other)
    for a, b in zip(values(bucket), values(other), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@every
@pytest.mark.parametrize("name", ["params", "grads"])
def test_freed_memory_is_refused_by_kernels(stepper, name):
    if stepper.name in ("eager", "reference"):
        pytest.skip("torch itself refuses it")
    bucket = make_bucket(stepper, START)
    getattr(bucket, name)[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        stepper.step(bucket)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_triton_interpreted_passes_all_cases():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton", __file__]
    command += ["-o", "filterwarnings="]  # those of numpy inside Triton's interpreter, which old versions give
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
