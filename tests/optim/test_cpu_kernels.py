# SPDX-License-Identifier: Apache-2.0
"""NSF's numba kernels against the formula in float64, and against the eager halves where rounding is part of a step."""

import dataclasses
import itertools
import os

import pytest
import torch

from hf_nsf.optim import nsf_update
from hf_nsf.optim.nsf_update import Bucket, Scalars

numba = pytest.importorskip("numba")
np = pytest.importorskip("numpy")
cpu = pytest.importorskip("hf_nsf.optim.kernels.cpu")

PS = (0.5, 0.25, 0.0, -0.25, -0.5, 1.0, 0.1, 1e-46)
GRAFTINGS = ("adam", "none")
OPTIONS = ({}, {"maximize": True, "weight_decay": 0.0}, {"eps": 0.0, "beta1": 0.8, "beta2": 0.95, "lr": 2.0**-8})
LOW = (torch.bfloat16, torch.float16)
SHAPES = ((41,), (0,), (8, 8), (), (333,), (1,))
START = Scalars(0.25, 2.0**-10, 0.9, 0.999, 1e-8, 2.0**-3, False, "adam", 1)  # 1 - eta lambda is exact


class Tensors:
    """A bucket for each of some scalars, and steps with random gradients."""

    def __init__(self, scalars, dtype=torch.float32, kahan=False, shapes=SHAPES, fill=torch.randn):
        torch.manual_seed(7)
        self.buckets = []
        for s in scalars:
            params = [fill(shape).to(dtype) for shape in shapes]
            moments = [[torch.zeros(shape, dtype=torch.float32) for shape in shapes] for _ in range(2)]
            comps = [torch.zeros_like(q) for q in params] if kahan else None
            self.buckets.append(Bucket(params, [torch.zeros_like(q) for q in params], *moments, comps, s))

    def to(self, dtype):
        """The same in another dtype, for a reference."""
        other = object.__new__(Tensors)
        lists = ("params", "grads", "exp_avgs", "exp_avg_sqs")
        other.buckets = [
            dataclasses.replace(
                b, **{name: [q.to(dtype) for q in getattr(b, name)] for name in lists}, kahan_comps=None
            )
            for b in self.buckets
        ]
        return other

    def drive(self, step, steps=20, skip=0, scale=1.0):
        generator = torch.Generator().manual_seed(1)
        for t in range(1, steps + 1):
            for bucket in self.buckets:
                for param, grad in zip(bucket.params, bucket.grads, strict=True):
                    values = scale * torch.randn(grad.shape, generator=generator)
                    grad.copy_(values if param.dtype != torch.float64 else values.to(self.rounding).double())
                bucket.scalars = dataclasses.replace(bucket.scalars, t=t)
            if t > skip:
                step(self.buckets)
        return self

    rounding = torch.float32  # what gradients are rounded to before they become float64

    def values(self):
        """The parameters with what rounding dropped of them."""
        return [
            q.double() + (b.kahan_comps[i].double() if b.kahan_comps else 0)
            for b in self.buckets
            for i, q in enumerate(b.params)
        ]

    def everything(self):
        return [
            q for b in self.buckets for some in (b.params, b.exp_avgs, b.exp_avg_sqs, b.kahan_comps or []) for q in some
        ]


def kernels(buckets):
    """Every bucket by the kernels: one call a half, or one for all that need none."""
    for needed in (True, False):
        some = [bucket for bucket in buckets if bucket.scalars.needs_norms == needed]
        if some and needed:
            cpu.second_half(some, cpu.first_half(some))
        elif some:
            cpu.whole_step(some)


def eager(buckets):
    for bucket in buckets:
        if bucket.scalars.needs_norms:
            nsf_update.second_half([bucket], nsf_update.first_half([bucket], None), None)
        else:
            nsf_update.whole_step([bucket], None)


def formula(buckets):
    """METHOD's formula, one tensor at a time, in the dtype of the tensors."""
    for b in buckets:
        s = b.scalars
        for theta, grad, m, v in zip(b.params, b.grads, b.exp_avgs, b.exp_avg_sqs, strict=True):
            g = -grad if s.maximize else grad
            m.mul_(s.beta1).add_((1 - s.beta1) * g)
            v.mul_(s.beta2).add_((1 - s.beta2) * g * g)
            m_hat, v_hat = m / (1 - s.beta1**s.t), v / (1 - s.beta2**s.t)
            d = v_hat**s.p + s.eps if s.grafting == "none" else v_hat.sqrt() + s.eps
            step = a = torch.where(d == 0, 0.0, m_hat / d)
            if s.grafting == "adam":
                u = torch.where(d == 0, 0.0, a * d ** (1 - 2 * s.p))
                step = u * (1 if u.norm() == 0 else a.norm() / u.norm())
            theta.mul_(1 - s.lr * s.weight_decay).sub_(s.lr * step)


def identical(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual.everything(), expected.everything(), strict=True))


def assert_close(actual, expected, bound):
    for a, b in zip(actual.values(), expected.values(), strict=True):
        assert a.shape == b.shape and torch.isfinite(b).all()
        assert (a - b).norm() <= bound * b.norm(), (a, b)


def scalars(**options):
    return dataclasses.replace(START, **options)


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 32)


def grid(grafting):
    return [scalars(p=p, grafting=grafting, **options) for p in PS for options in OPTIONS]


@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_float32_is_the_formula(grafting, _small_chunks):
    """Buckets of all exponents and options in one call, in tensors of several chunks."""
    tensors = Tensors(grid(grafting))
    exact = tensors.to(torch.float64)
    assert_close(tensors.drive(kernels, 30), exact.drive(formula, 30), 1e-6)


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("kahan", [True, False])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_the_eager_path(dtype, kahan, grafting, _small_chunks):
    actual, expected = (Tensors(grid(grafting), dtype, kahan).drive(step, 10) for step in (kernels, eager))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(actual.values(), expected.values(), strict=True))
    # Where a float32 lies at the border between two roundings, an element may have the other one.
    assert_close(actual, expected, 1e-5 if kahan else 1e-4)
    if kahan:
        exact = Tensors(grid(grafting), dtype, kahan).to(torch.float64)
        exact.rounding = dtype
        assert_close(actual, exact.drive(formula, 10), 1e-4 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shapes", [((3 * (1 << 15) + 700,), (1 << 15,), (5,)), ((511,), (512,), (513,))])
@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_chunks_and_tiles_of_their_real_size(grafting, shapes):
    tensors = Tensors([scalars(grafting=grafting)], shapes=shapes)
    exact = tensors.to(torch.float64)
    assert_close(tensors.drive(kernels, 5), exact.drive(formula, 5), 1e-6)


@pytest.mark.parametrize("lr", [1e-2, 1e-30])
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e12])
def test_extreme_gradients(scale, lr):
    """The parameters start at 0 and are all step. The factor of u, lr ||a|| / ||u||, may leave the range of float32."""
    grafted = [scalars(p=p, lr=lr, eps=1e-30, weight_decay=0.0) for p in (0.25, -0.25, -0.5, 1.0, 0.0)]
    tensors = Tensors(grafted, shapes=((20,), (333,)), fill=torch.zeros)
    exact = tensors.to(torch.float64)
    assert_close(tensors.drive(kernels, scale=scale), exact.drive(formula, scale=scale), 3e-6)


def test_sums_are_those_of_the_eager_path():
    tensors, expected = (Tensors([scalars(p=p) for p in (0.25, -0.5, 1.0)]) for _ in range(2))
    for scale in (1e-12, 1.0, 1e12):
        sums: list = []
        tensors.drive(lambda buckets, sums=sums: sums.append(cpu.first_half(buckets)), 1, scale=scale)
        expected.drive(lambda buckets, sums=sums: sums.append(nsf_update.first_half(buckets)), 1, scale=scale)
        assert sums[0].dtype == torch.float64
        torch.testing.assert_close(*sums, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zeros_move_nothing(eps, dtype):
    """Of three tensors, all gradients of one are zero, and all but one of another."""
    every = [scalars(p=p, grafting=x, eps=eps, lr=0.1, weight_decay=0.0) for p, x in itertools.product(PS, GRAFTINGS)]
    tensors = Tensors(every, dtype, fill=torch.ones, shapes=((100,), (70,), ()))
    for t in (1, 2):
        for bucket in tensors.buckets:
            bucket.scalars = dataclasses.replace(bucket.scalars, t=t)
            bucket.grads[1][3] = 1.0
        kernels(tensors.buckets)
    for bucket in tensors.buckets:
        assert torch.equal(bucket.params[0], torch.ones(100).to(dtype)) and bucket.params[2] == 1
        assert torch.equal(bucket.params[1][4:], torch.ones(66).to(dtype))
        assert bucket.params[1][3].isfinite() and bucket.params[1][3] < 1, bucket.scalars


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_a_number_is_seen_and_lets_no_other_element_loose(dtype, value):
    every = [scalars(p=p, grafting=x) for p, x in itertools.product((0.25, -0.5, 1.0, 0.5), GRAFTINGS)]
    tensors = Tensors(every, dtype, shapes=((50,), (70,)), fill=torch.ones, kahan=dtype != torch.float32)
    for bucket in tensors.buckets:
        bucket.grads[0].fill_(1e3)[7] = value
        bucket.grads[1].fill_(1.0)
    kernels(tensors.buckets)
    for bucket in tensors.buckets:
        bad = ~bucket.params[0].isfinite()
        assert bad.all() if bucket.scalars.needs_norms else bad[7] or value == float("inf")
        assert bucket.params[1].isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("lr", [0.0, 2.0**-9, 2.0**-25, 0.1, 3e-8, 17.0])
def test_every_value_is_rounded_as_torch_rounds_it(dtype, lr):
    """With these options a step is lr to the last bit. All values of the dtype, subnormal and infinite ones too."""
    options = scalars(p=0.5, lr=lr, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    theta = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    expected = (theta.float() - lr).to(dtype)
    bucket = Bucket([theta], [torch.ones_like(theta)], [torch.zeros(2**16)], [torch.zeros(2**16)], None, options)
    kernels([bucket])
    assert torch.equal(theta.isnan(), expected.isnan())
    assert torch.equal(theta.nan_to_num(1e3, 1e4, -1e4), expected.nan_to_num(1e3, 1e4, -1e4))


def test_the_decay_is_rounded_before_the_step_is_added():
    for grafting, p in (("adam", 0.5), ("none", 0.5), ("adam", 0.25)):
        options = scalars(p=p, grafting=grafting, beta1=0.0, beta2=0.0, eps=0.0, lr=0.01)
        tensors = Tensors([options], shapes=((4096,),))
        bucket = tensors.buckets[0]
        bucket.grads[0].fill_(1.0)
        expected = bucket.params[0] * options.decay_factor - options.lr
        kernels([bucket])
        if p == 0.5:  # the step is lr to the last bit
            assert torch.equal(bucket.params[0], expected)
        torch.testing.assert_close(bucket.params[0], expected, rtol=1e-6, atol=1e-8)


def test_the_power_is_as_exact_as_it_says():
    @numba.njit
    def powers(x, c, shift, out):
        for i in range(x.size):
            out[i] = cpu._power(x[i], c, shift)

    x = np.logspace(-25, 25, 100_001).astype(np.float32)
    for exponent, shift in ((-1.0, 0), (-0.5, 9), (0.1, -7), (0.8, 40), (1.5, -60), (2.0, 16), (1.0, 0)):
        out = np.empty_like(x)
        powers(x, tuple(cpu.power_of(exponent)), np.float32(shift), out)
        exact = x.astype(np.float64) ** exponent * 2.0**shift
        inside = (exact > 1e-36) & (exact < 1e37)
        assert np.abs(out[inside] / exact[inside] - 1).max() < 5e-7
        assert np.isfinite(out).all() and (out > 0).all()


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_any_threads_and_after_a_break(dtype, grafting, monkeypatch, _small_chunks):
    every = [scalars(p=0.1, grafting=grafting), scalars(p=-0.5, grafting=grafting, weight_decay=0.0)]
    kahan = dtype != torch.float32
    whole = Tensors(every, dtype, kahan).drive(kernels, 10)
    broken = Tensors(every, dtype, kahan).drive(kernels, 5)
    assert identical(broken.drive(kernels, 10, skip=5), whole)
    used, pool = [], cpu._pool
    monkeypatch.setattr(cpu, "_pool", lambda threads: used.append(threads) or pool(threads))
    for threads, openmp in ((2, True), (3, True), (2, False), (3, False)):
        torch.set_num_threads(threads)
        if not openmp:
            monkeypatch.setattr(cpu, "_gomp_parallel", lambda: None)
        assert identical(Tensors(every, dtype, kahan).drive(kernels, 10), whole)
    assert {1, 2} <= set(used)


def test_torchs_own_threads_are_found():
    if torch.backends.openmp.is_available() and os.uname().sysname == "Linux":
        assert cpu._gomp_parallel() is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_child_has_threads_of_its_own(monkeypatch, _small_chunks):
    monkeypatch.setattr(cpu, "_gomp_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = Tensors([START]).drive(kernels, 3)  # the pool has its thread
    buckets = Tensors([START])
    buckets.drive(lambda _: None, 1)
    child = os.fork()
    if not child:
        kernels(buckets.buckets)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert identical(Tensors([START]).drive(kernels, 3), expected)


def test_nothing_is_compiled_while_numbers_change():
    from numba.core import event

    kernels(Tensors([START, scalars(p=0.5)]).buckets)
    made = cpu.kernel.cache_info().misses
    with event.install_recorder("numba:compile") as recorder:
        for index, p in enumerate(np.linspace(-0.5, 1, 20)):
            for grafting in GRAFTINGS:
                Tensors([scalars(p=float(p), lr=1e-3 * index, grafting=grafting)]).drive(kernels, 2)
        assert recorder.buffer == [] and cpu.kernel.cache_info().misses == made
        numba.njit(lambda x: x + 1)(1)
        assert recorder.buffer  # it would have seen one


def test_only_empty_tensors_are_nothing_to_do():
    for grafting in GRAFTINGS:
        tensors = Tensors([scalars(grafting=grafting)], shapes=((0,), (3, 0)))
        kernels(tensors.buckets)
    assert torch.equal(cpu.first_half(tensors.buckets), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["params", "grads", "kahan_comps"])
def test_freed_memory_is_refused(name):
    buckets = Tensors([START], torch.bfloat16, kahan=True).buckets
    getattr(buckets[0], name)[4].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        kernels(buckets)


def test_a_damaged_cache_is_compiled_anew(monkeypatch, tmp_path, caplog):
    """A step must neither fail nor change its bits."""
    expected = Tensors([START]).drive(kernels, 3)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    kernel = cpu.kernel.__wrapped__
    kernel(torch.float32, False)  # writes the files
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".nbi", ".nbc"} and not caplog.records
    for damaged, keep in (({".nbi", ".nbc"}, 0.0), ({".nbc"}, 0.5)):
        for path, content in files.items():
            path.write_bytes(content[: int(keep * len(content))] if path.suffix in damaged else content)
        made = kernel(torch.float32, False)
        assert "without numba's cache" in caplog.text
        caplog.clear()
        monkeypatch.setattr(cpu, "kernel", lambda *_, made=made: made)
        assert identical(Tensors([START]).drive(kernels, 3), expected)


def test_without_a_folder_for_the_cache_nothing_is_cached(monkeypatch, caplog):
    calls = []

    def cfunc(signature, cache=False, **_):
        calls.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: "compiled"

    monkeypatch.setattr(cpu.numba, "cfunc", cfunc)
    assert cpu.kernel.__wrapped__(torch.float32, False)[0] == "compiled" and calls == [True, False]
    assert "no locator" in caplog.text


def test_loops_that_do_not_compile_are_not_available(monkeypatch, caplog):
    assert cpu.available()

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu, "kernel", fails)
    assert not cpu.available.__wrapped__() and "no compiler" in caplog.text
