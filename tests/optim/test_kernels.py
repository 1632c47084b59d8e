# SPDX-License-Identifier: Apache-2.0
"""Kernels prove themselves before they are used; numba's arithmetic, threads and cache."""

import concurrent.futures
import importlib.util
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from problems import identical, needs_numba
from torch import nn

from hf_nsf import NSF
from hf_nsf.optim import kernels, nsf_update
from hf_nsf.optim.kernels import EAGER

CPU = torch.device("cpu")


def parameter(dtype=torch.float32):
    q = nn.Parameter(torch.linspace(-1, 1, 9).to(dtype))
    q.grad = torch.linspace(1, 2, 9).to(dtype)
    return q


def fails(bucket):
    raise RuntimeError("no driver")


def does_not_compile(bucket):
    import numba

    numba.njit(lambda x: x.no_such_attribute)(1.0)


def apply_of_wrong_length(bucket):
    bucket.scalars.rate *= 1.001
    nsf_update.apply_update(bucket)


def apply_up_to_a_chunk(bucket):
    ends = [q[A_CHUNK:].clone() for q in bucket.params]
    nsf_update.apply_update(bucket)
    for q, end in zip(bucket.params, ends, strict=True):
        q[A_CHUNK:] = end


def update_with_nan(bucket):
    nsf_update.update_moments(bucket)
    bucket.sums.fill_(torch.nan)


A_CHUNK = 64
FAULTY = {
    "wrong length": {"apply_update": apply_of_wrong_length},
    "last chunk skipped": {"apply_update": apply_up_to_a_chunk},
    "NaN": {"update_moments": update_with_nan},
    "wrong whole step": {"whole_step": lambda bucket: None},
    "raises": {"update_moments": fails},
    "cannot compile": {"whole_step": does_not_compile},
}


@pytest.fixture
def offer(monkeypatch):
    """Offer a module of kernels, and forget proofs of others."""

    def offer(**functions):
        kernels.kernels_for.cache_clear()
        module = types.SimpleNamespace(CHUNK=A_CHUNK, **{**EAGER._asdict(), **functions})
        monkeypatch.setattr(kernels, "importlib", types.SimpleNamespace(import_module=lambda name: module))

    yield offer
    kernels.kernels_for.cache_clear()


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_kernels_are_caught_before_their_first_use(fault, dtype, offer):
    """One warning and the eager functions; with fused=True an error."""
    offer(**FAULTY[fault])
    ours, eager = parameter(dtype), parameter(dtype)
    with pytest.warns(UserWarning, match="failed their test and are not used") as record:
        for _ in range(2):
            NSF([ours], p=0.1).step()
    assert len(record) == 1
    for _ in range(2):
        NSF([eager], p=0.1, foreach=True).step()
    assert identical([ours], [eager])
    with pytest.raises(ValueError, match="fused=True .* they failed their test"):
        NSF([ours], fused=True)


def test_kernels_that_cannot_be_imported_are_done_without(offer, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'numba'")

    offer()
    monkeypatch.setattr(kernels, "importlib", types.SimpleNamespace(import_module=missing))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NSF([parameter()], p=0.1).step()
    with pytest.raises(ValueError, match=r"fused=True .* No module named 'numba' .*pip install"):
        NSF([parameter()], fused=True)


def test_right_kernels_are_proved_once(offer, monkeypatch):
    offer()
    asked, find_fault = [], kernels.find_fault
    monkeypatch.setattr(kernels, "find_fault", lambda *args: asked.append(args[1:]) or find_fault(*args))
    for p in (0.1, -0.5, 0.5):
        NSF([parameter(), parameter()], p=p, fused=True).step()
    assert asked == [(A_CHUNK, CPU, torch.float32, False)]


@needs_numba
def test_a_users_triton_interpreter_is_not_ours(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.kernels_for.cache_clear()
    found, _ = kernels.kernels_for(CPU, torch.float32, False)
    assert found.update_moments.__module__ == "hf_nsf.optim.kernels.cpu"
    found, why = kernels.kernels_for(torch.device("cuda"), torch.float32, False)
    assert found is None and "TRITON_INTERPRET" in why
    kernels.kernels_for.cache_clear()


@needs_numba
def test_power_is_as_exact_as_float32_allows():
    import numba
    import numpy as np

    from hf_nsf.optim.kernels import cpu

    @numba.njit
    def powers(x, n, c, out):
        for i in range(x.size):
            out[i] = cpu._power(x[i], n, c)

    for exponent in (-1.0, -0.5, 0.1, 0.8, 1.5, 2.0, 3.0):
        reach = 2.0 ** (114 / max(1, abs(exponent)))
        low, high = np.array([1 / reach, reach], np.float32).view(np.int32)
        numbers = cpu.Numbers(*[np.float32(0)] * 8, False, low, high)
        x = np.concatenate(([0, 1e-38, 1e38], np.logspace(-34, 34, 20_001))).astype(np.float32)
        out = np.empty_like(x)
        powers(x, numbers, cpu.power_of(exponent), out)
        exact = x.clip(*np.array([1 / reach, reach], np.float32)).astype(np.float64) ** exponent
        assert np.abs(out / exact - 1).max() < 6e-7, exponent


@needs_numba
@pytest.mark.parametrize("lr", [0.0, 2.0**-9, 2.0**-25, 0.1, 3e-8, 17.0])
def test_every_bfloat16_is_rounded_as_torch_rounds_it(lr):
    """With these options a step is lr to the last bit. All values: subnormal, infinite and NaN ones too."""
    theta = nn.Parameter(torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16))
    expected = (theta.detach().float() - lr).to(torch.bfloat16)
    theta.grad = torch.ones_like(theta)
    NSF([theta], lr=lr, p=0.5, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, kahan_sum=False, fused=True).step()
    assert torch.equal(theta.isnan(), expected.isnan())
    assert torch.equal(theta.nan_to_num(1e3, 1e4, -1e4), expected.nan_to_num(1e3, 1e4, -1e4))


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    from hf_nsf.optim.kernels import cpu

    monkeypatch.setattr(cpu, "CHUNK", 4)
    monkeypatch.setattr(cpu, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    optimizer = NSF([parameter()], p=0.1, fused=True)
    optimizer.step()  # the pool has its threads
    child = os.fork()
    if not child:
        optimizer.step()
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@needs_numba
def test_buckets_of_all_sizes_share_one_pool_of_threads(monkeypatch):
    from hf_nsf.optim.kernels import cpu

    made, executor = [], concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", lambda *a, **k: made.append(a) or executor(*a, **k))
    monkeypatch.setattr(cpu, "CHUNK", 4)
    monkeypatch.setattr(cpu, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    cpu._pool.cache_clear()
    for copies in (1, 2):
        NSF([parameter() for _ in range(copies)], p=0.1, fused=True).step()
    assert len(made) == 1


@needs_numba
def test_nothing_is_compiled_while_numbers_change():
    from numba import njit
    from numba.core import event

    NSF([parameter()], fused=True).step()
    with event.install_recorder("numba:compile") as recorder:
        for index, p in enumerate((-1.0, -0.3, 0.0, 0.5, 1.0)):
            for grafting in ("adam", "none"):
                NSF([parameter()], p=p, lr=1e-3 * index, grafting=grafting, fused=True).step()
        assert recorder.buffer == []
        njit(lambda x: x + 1)(1)
        assert recorder.buffer  # it would have seen one


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets")
@pytest.mark.filterwarnings("ignore:AnnAssign.__init__ missing")  # Triton 3.8 under Python 3.13
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_without_a_gpu(capability):
    """The numbers of a step are arguments, for which nothing is compiled again."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_nsf.optim.kernels import gpu

    def compiled(kernel, pointers, numbers=(), **constants):
        constants |= {"CHUNK": gpu.CHUNK, "BLOCK": gpu.BLOCK}
        signature = {**pointers, **dict.fromkeys(numbers, "fp32"), **dict.fromkeys(constants, "constexpr")}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
        source = ASTSource(kernel, signature, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gpu.NO_FUSION).asm

    assert compiled(gpu._add_up, {"table": "*i64", "parts": "*fp64", "sums": "*fp64"})["cubin"]
    pointers = {"table": "*i64", "owner": "*i32", "sums": "*fp64", "roots": "*fp64"}
    numbers = [name for name in gpu._step.arg_names if name.islower() and name not in pointers]
    assert len(numbers) == 10
    for work in ("update", "apply", "whole"):
        for dtype, kahan in ((torch.float32, False), (torch.bfloat16, work != "update")):
            asm = compiled(gpu._step, pointers, numbers, WORK=work, DTYPE=gpu.DTYPES[dtype], KAHAN=kahan)
            assert asm["cubin"]


THREAD = """
import threading, time, torch
from hf_nsf import NSF
torch.set_num_threads(2)
q = torch.nn.Parameter(torch.zeros(3_000_000))
q.grad = torch.ones_like(q)
optimizer = NSF([q], p=0.1)
def train():
    time.sleep(0.5)  # until the main thread has ended
    optimizer.step()
    print("stepped", bool((q != 0).all()))
threading.Thread(target=train).start()
"""
CACHE = """
import numba.core.caching
numba.core.caching.FunctionCache._impl_class._locator_classes = []  # no folder can be written
""" + THREAD.replace("3_000_000", "9")


@needs_numba
@pytest.mark.parametrize("script", [THREAD, CACHE], ids=["main thread ended", "no folder for a cache"])
def test_kernels_step_in_a_process_of_their_own(script):
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("stepped True\n", "")
