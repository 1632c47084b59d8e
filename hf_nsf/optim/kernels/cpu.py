# SPDX-License-Identifier: Apache-2.0
"""NSF's halves on a CPU: loops that numba compiles (the extra `fused`), one call a half for all tensors.

Threads take chunks of tensors one by one. The sums of the chunks are added in a fixed order, so that a step has the
same bits with any number of threads. The second half makes u again, which is faster than to keep it.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, float64, int32, njit, types
from numba.extending import intrinsic
from torch import Tensor

from ..nsf_update import Bucket
from .table import ADDRESSES, SCALARS, Chunks, addresses, chunk_table, scalars, sizes

logger = logging.getLogger(__name__)

CHUNK = 1 << 15  # elements of one piece of work
TILE = 1 << 9  # elements whose squares are added in float32; the rest is added in float64
# Vectors may add in another order; infinities and NaNs keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}

_DEGREE = 8
TENSORS = np.dtype(  # addresses of the tensors, then numbers of their step
    [(name, np.int64) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "kahan_comp")]
    + [(name, np.float32) for name in ("sign", "b1c", "b2", "b2c", "root_c2", "eps", "decay_factor", "rate", "shift")]
    + [("power", np.float32, _DEGREE + 3), ("plain", np.int32)]
)
JOB = [  # `next` is the first chunk that no thread has taken yet; `zero` is 0, see _moved; the last five are addresses
    *((name, np.int64) for name in ("next", "chunks", "work", "tensors", "owner", "low", "length", "sums")),
    ("zero", np.int32),
]
LIKE = {
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.float16: np.uint16,
}  # what stands for a dtype in loops
FIRST, SECOND, WHOLE = range(3)  # kinds of work

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def _pointer(typing, address, low, like):  # type: ignore[no-untyped-def]
    """An address and a number of elements as a pointer to what `like` is."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        start = builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return builder.gep(start, [arguments[1]])

    return types.CPointer(like)(types.int64, types.int64, like), generate


@intrinsic
def _records(typing, address):  # type: ignore[no-untyped-def]
    """An address as a pointer to TENSORS."""
    pointer = types.CPointer(numba.from_dtype(TENSORS))
    return pointer(types.int64), lambda context, builder, signature, arguments: builder.inttoptr(
        arguments[0], context.get_value_type(signature.return_type)
    )


@intrinsic
def _take(typing, job):  # type: ignore[no-untyped-def]
    """Add 1 to the int64 that a job begins with, whatever other threads do; returns what was there."""
    i64 = ir.IntType(64)
    return types.int64(job), lambda context, builder, signature, arguments: builder.atomic_rmw(
        "add", builder.bitcast(arguments[0], ir.PointerType(i64)), i64(1), "monotonic"
    )


# Conversions in integers, as LLVM's own of float16 need a CPU that has them.


def _from_bfloat16(b, x):  # type: ignore[no-untyped-def]
    return b.bitcast(b.shl(b.zext(x, _I32), _I32(16)), _F32)


def _to_bfloat16(b, x):  # type: ignore[no-untyped-def]
    bits = b.bitcast(x, _I32)
    odd = b.and_(b.lshr(bits, _I32(16)), _I32(1))
    rounded = b.lshr(b.add(bits, b.add(odd, _I32(0x7FFF))), _I32(16))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), _I32(0x7FC0), rounded), _I16)


def _from_float16(b, x):  # type: ignore[no-untyped-def]
    bits = b.zext(x, _I32)
    rest = b.shl(b.and_(bits, _I32(0x7FFF)), _I32(13))
    normal = b.add(rest, _I32(112 << 23))  # the difference of both exponents' biases; twice for infinities and NaNs
    finite = b.select(b.icmp_unsigned("<", rest, _I32(31 << 23)), normal, b.add(normal, _I32(112 << 23)))
    small = b.bitcast(b.fsub(b.bitcast(b.add(rest, _I32(113 << 23)), _F32), _F32(2.0**-14)), _I32)
    value = b.select(b.icmp_unsigned("<", rest, _I32(1 << 23)), small, finite)
    return b.bitcast(b.or_(value, b.shl(b.and_(bits, _I32(0x8000)), _I32(16))), _F32)


def _to_float16(b, x):  # type: ignore[no-untyped-def]
    bits = b.bitcast(x, _I32)
    rest = b.and_(bits, _I32(0x7FFFFFFF))
    odd = b.and_(b.lshr(rest, _I32(13)), _I32(1))
    normal = b.lshr(b.add(rest, b.add(odd, _I32(0xFFF - (112 << 23)))), _I32(13))
    small = b.sub(b.bitcast(b.fadd(b.bitcast(rest, _F32), _F32(0.5)), _I32), _I32(126 << 23))  # 1/2's ulp is 2^-24
    large = b.select(b.icmp_unsigned(">", rest, _I32(255 << 23)), _I32(0x7E00), _I32(0x7C00))
    value = b.select(b.icmp_unsigned("<", rest, _I32(113 << 23)), small, normal)
    value = b.select(b.icmp_unsigned("<", rest, _I32(143 << 23)), value, large)
    return b.trunc(b.or_(value, b.and_(b.lshr(bits, _I32(16)), _I32(0x8000))), _I16)


_WIDENED = {types.float32: lambda b, x: x, types.int16: _from_bfloat16, types.uint16: _from_float16}
_NARROWED = {types.float32: lambda b, x: x, types.int16: _to_bfloat16, types.uint16: _to_float16}


@intrinsic
def _widened(typing, x):  # type: ignore[no-untyped-def]
    """A float32, or a bfloat16 given as an int16, or a float16 given as a uint16: as a float32."""
    return types.float32(x), lambda context, builder, signature, arguments: _WIDENED[x](builder, arguments[0])


@intrinsic
def _narrowed(typing, x, like):  # type: ignore[no-untyped-def]
    """The inverse, rounded to nearest, ties to even; the dtype is that of `like`."""
    return like(types.float32, like), lambda context, builder, signature, arguments: _NARROWED[like](
        builder, arguments[0]
    )


@intrinsic
def _is_kahan(typing, kind):  # type: ignore[no-untyped-def]
    """A constant, so that loops without Kahan sums have no branches: int8 for Kahan sums."""
    flag = ir.IntType(1)(kind == types.int8)
    return types.boolean(kind), lambda context, builder, signature, arguments: flag


def _interpolation(low: float, high: float, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev's points of [low, high], and the matrix that makes coefficients, lowest first, of values there."""
    points = (low + high) / 2 + (high - low) / 2 * np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
    return points, np.linalg.inv(np.vander(points, increasing=True))


_POINTS, _MATRIX = _interpolation(0.5**0.5 - 1, 2**0.5 - 1, _DEGREE)
_EXP2_POINTS, _EXP2_MATRIX = _interpolation(-0.5, 0.5, 5)
E0, E1, E2, E3, E4, E5 = (_EXP2_MATRIX @ np.exp2(_EXP2_POINTS)).astype(np.float32)
ZERO, ONE, LEAST, MOST, TINY, HUGE = (np.float32(x) for x in (0, 1, -125, 126, 1e-28, 1e36))
ROUND = np.float32(1.5 * 2**23)  # t + ROUND ends in the bits of the integer next to t
ZERO_32 = np.int32(0)
ROOT_HALF = np.float32(0.5**0.5).view(np.int32)


@functools.lru_cache(64)
def power_of(exponent: float) -> np.ndarray:
    """What :func:`_power` needs: the polynomial of (1 + r)^exponent about 0, and the exponent in two parts."""
    coarse = round(exponent * 2**14) / 2**14  # its products with an octave are exact, also after adding a shift
    return np.array([*(_MATRIX @ (1 + _POINTS) ** exponent), coarse, exponent - coarse], np.float32)


@njit(fastmath={"contract"}, error_model="numpy", forceinline=True)
def _power(x, c, shift):  # type: ignore[no-untyped-def]
    """`x^exponent 2^shift` for a normal x > 0 and `c = power_of(exponent)`, held within about [2^-126, 2^127].

    x = 2^k (1 + r) gives (1 + r)^exponent, a polynomial, times 2^(k exponent + shift), which is 2^f 2^n with n an
    integer. Each int32() undoes that numba's sums of int32s are int64s, of which half as many fit in a vector.
    """
    bits = np.float32(x).view(np.int32)
    k = int32(int32(bits - ROOT_HALF) >> 23)
    r = np.int32(bits - int32(k << 23)).view(np.float32) - ONE
    t = min(max(float32(k) * c[9] + shift, LEAST), MOST)
    n = t + ROUND
    f = (t - (n - ROUND)) + float32(k) * c[10]
    root = c[0] + r * (c[1] + r * (c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * (c[6] + r * (c[7] + r * c[8])))))))
    part = E0 + f * (E1 + f * (E2 + f * (E3 + f * (E4 + f * E5))))
    return root * np.int32(np.float32(part).view(np.int32) + int32(np.float32(n).view(np.int32) << 23)).view(np.float32)


@njit(forceinline=True)
def _part(address, low, size, like):  # type: ignore[no-untyped-def]
    return numba.carray(_pointer(address, low, like), size)


@njit(forceinline=True)
def _coefficients(tensor):  # type: ignore[no-untyped-def]
    c = tensor.power
    return c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10]


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _adam(m, v, root_c2, eps):  # type: ignore[no-untyped-def]
    """Adam's step a = m / d, m not being corrected, and d; a = 0 where d = 0."""
    d = np.sqrt(v) * root_c2 + eps
    return ZERO if d == ZERO else m / d, d


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _first(tensor, sums, low, length, like):  # type: ignore[no-untyped-def]
    """Update m and v; sum the squares of a and of u = a d^(1-2p) 2^shift."""
    sign, b1c, b2, b2c = tensor.sign, tensor.b1c, tensor.b2, tensor.b2c
    root_c2, eps, shift, c = tensor.root_c2, tensor.eps, tensor.shift, _coefficients(tensor)
    a_square = u_square = 0.0
    for start in range(low, low + length, TILE):
        size = min(TILE, low + length - start)
        g = _part(tensor.grad, start, size, like)
        m, v = _part(tensor.exp_avg, start, size, ZERO), _part(tensor.exp_avg_sq, start, size, ZERO)
        a_tile = u_tile = ZERO
        for i in range(size):
            gradient = _widened(g[i]) * sign
            m[i] += (gradient - m[i]) * b1c
            v[i] = v[i] * b2 + gradient * gradient * b2c
            a, d = _adam(m[i], v[i], root_c2, eps)
            u = a * _power(d, c, shift)
            a_tile += a * a
            u_tile += u * u
        if a_tile == ZERO or (TINY < a_tile < HUGE and TINY < u_tile < HUGE):
            a_square += a_tile
            u_square += u_tile
        else:  # float32 may have lost something
            for i in range(size):
                a, d = _adam(m[i], v[i], root_c2, eps)
                a_square += float64(a) * float64(a)
                u_square += (float64(a) * float64(_power(d, c, shift))) ** 2
    sums[0], sums[1] = a_square, u_square


@njit(error_model="numpy", forceinline=True)
def _move(theta, comp, kahan, i, decay_factor, step, zero, like):  # type: ignore[no-untyped-def]
    """Move: theta[i] <- decay_factor theta[i] + step; comp[i] keeps what rounding drops of it.

    The product is rounded before the step is added, as in the eager path: this rounding adds up over the steps.
    `zero`, unknown to LLVM, keeps it from becoming part of a fused multiply-add.
    """
    value = _widened(theta[i])
    if kahan:
        value += _widened(comp[i])
    value = np.int32(np.float32(value * decay_factor).view(np.int32) ^ zero).view(np.float32) + step
    theta[i] = _narrowed(value, like)
    if kahan:
        comp[i] = _narrowed(value - _widened(theta[i]), like)


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _second(tensor, low, length, zero, like, kahan):  # type: ignore[no-untyped-def]
    """Move theta by the step rate a d^(1-2p) 2^shift."""
    root_c2, eps, shift, c = tensor.root_c2, tensor.eps, tensor.shift, _coefficients(tensor)
    decay_factor, rate = tensor.decay_factor, tensor.rate
    theta, comp = _part(tensor.param, low, length, like), _part(tensor.kahan_comp, low, length, like)
    m, v = _part(tensor.exp_avg, low, length, ZERO), _part(tensor.exp_avg_sq, low, length, ZERO)
    for i in range(length):
        a, d = _adam(m[i], v[i], root_c2, eps)
        _move(theta, comp, kahan, i, decay_factor, rate * (a * _power(d, c, shift)), zero, like)


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _whole(tensor, low, length, zero, like, kahan):  # type: ignore[no-untyped-def]
    """All at once: update m and v, and move theta by the step rate m / (v_hat^p + eps)."""
    sign, b1c, b2, b2c = tensor.sign, tensor.b1c, tensor.b2, tensor.b2c
    root_c2, eps, c, plain = tensor.root_c2, tensor.eps, _coefficients(tensor), tensor.plain != 0
    decay_factor, rate = tensor.decay_factor, tensor.rate
    for start in range(low, low + length, TILE):
        size = min(TILE, low + length - start)
        g = _part(tensor.grad, start, size, like)
        theta, comp = _part(tensor.param, start, size, like), _part(tensor.kahan_comp, start, size, like)
        m, v = _part(tensor.exp_avg, start, size, ZERO), _part(tensor.exp_avg_sq, start, size, ZERO)
        for i in range(size):
            gradient = _widened(g[i]) * sign
            m[i] += (gradient - m[i]) * b1c
            v[i] = v[i] * b2 + gradient * gradient * b2c
        for i in range(size):  # a loop of its own: one over all five would not be vectorized
            root = np.sqrt(v[i]) * root_c2
            weight = root if plain else _power(root, c, ZERO)
            step = rate * (ZERO if root + eps == ZERO else m[i] / (weight + eps))
            _move(theta, comp, kahan, i, decay_factor, step, zero, like)


def _work(pointer):  # type: ignore[no-untyped-def]
    """What each thread runs: it takes the next chunk until they are up."""
    job = numba.carray(pointer, 1)[0]
    chunks, owner = job.chunks, _part(job.owner, 0, job.chunks, ZERO_32)
    lows, lengths = _part(job.low, 0, chunks, 0), _part(job.length, 0, chunks, 0)
    sums = numba.carray(_pointer(job.sums, 0, 0.0), (chunks, 2))
    c = _take(pointer)
    while c < chunks:
        tensor = numba.carray(_records(job.tensors), owner[c] + 1)[owner[c]]
        if job.work == FIRST:
            _first(tensor, sums[c], lows[c], lengths[c], job.like)
        elif job.work == SECOND:
            _second(tensor, lows[c], lengths[c], job.zero, job.like, _is_kahan(job.kahan))
        else:
            _whole(tensor, lows[c], lengths[c], job.zero, job.like, _is_kahan(job.kahan))
        c = _take(pointer)


@functools.cache
def kernel(dtype: torch.dtype, kahan: bool) -> tuple[Any, np.dtype]:
    """Compile a C function of the address of a job, and return it with the dtype of such a job.

    Its machine code is cached on disk where that can be. The kinds of a job's last fields tell the loops what a
    parameter is, so that each dtype has machine code of its own, compiled when it is first met.
    """
    job = np.dtype([*JOB, ("like", LIKE[dtype]), ("kahan", np.int8 if kahan else np.uint8)])
    signature = types.void(types.CPointer(numba.from_dtype(job)))
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(_work), job
    except Exception as error:  # no folder that the cache can be written to, no room there, or a damaged file in it
        logger.warning(f"NSF compiles its step without numba's cache: {error!r}")
        return numba.cfunc(signature, error_model="numpy")(_work), job


@functools.cache
def available(device_type: str = "cpu") -> bool:
    """Whether numba compiles the loops; if it does not, the log says why."""
    try:
        kernel(torch.float32, False)
    except Exception as error:  # whatever numba fails with, the eager halves make the same steps
        logger.warning(f"NSF's kernels do not compile here, the eager halves are used: {error!r}")
        return False
    return True


def first_half(buckets: list[Bucket]) -> Tensor:
    """As :func:`hf_nsf.optim.nsf_update.first_half`."""
    tensors = _tensors(buckets, halves=True)
    # A power of 2 for each tensor keeps the squares of usual directions, d being small, within float32.
    tensors["shift"] = shift = np.rint(8 * tensors["power"][:, -2:].sum(1))
    chunks, sums = _run(buckets, tensors, FIRST)
    totals = [np.bincount(chunks.owner, weights=column, minlength=len(tensors)) for column in sums.T]
    return torch.from_numpy(np.stack([totals[0], np.ldexp(totals[1], -2 * shift.astype(int))], axis=1))


def second_half(buckets: list[Bucket], sums: Tensor) -> None:
    """As :func:`hf_nsf.optim.nsf_update.second_half`."""
    tensors = _tensors(buckets, halves=True)
    a, u = sums.numpy().T
    ratio = np.sqrt(np.divide(a, u, out=np.ones_like(a), where=u != 0))
    # The exponent goes into the power: the factor may be outside of float32 where its product with u is not.
    tensors["rate"], tensors["shift"] = np.frexp(tensors["rate"] * ratio)
    _run(buckets, tensors, SECOND)


def whole_step(buckets: list[Bucket]) -> None:
    """As :func:`hf_nsf.optim.nsf_update.whole_step`."""
    _run(buckets, _tensors(buckets, halves=False), WHOLE)


def _tensors(buckets: list[Bucket], halves: bool) -> np.ndarray:
    """What the loops know of each tensor."""
    tensors = np.zeros(sum(len(bucket.params) for bucket in buckets), TENSORS)
    for name, column in zip(ADDRESSES, addresses(buckets).T, strict=True):
        tensors[name] = column
    for name, column in zip(SCALARS, scalars(buckets, halves).T, strict=True):
        if name == "exponent":
            exponents, of = np.unique(column, return_inverse=True)
            tensors["power"] = np.array([power_of(float(exponent)) for exponent in exponents])[of]
            tensors["plain"] = column == 1
        else:
            tensors[name] = column
    return tensors


def _run(buckets: list[Bucket], tensors: np.ndarray, work: int) -> tuple[Chunks, np.ndarray]:
    """Do one kind of work for all chunks; returns them and the two sums of each."""
    chunks = chunk_table(sizes(buckets), CHUNK)
    sums = np.zeros((len(chunks.owner), 2))
    arrays = (tensors, chunks.owner, chunks.low, chunks.length, sums)
    function, dtype = kernel(buckets[0].params[0].dtype, buckets[0].kahan_comps is not None)
    job = np.array([(0, len(chunks.owner), work, *(array.ctypes.data for array in arrays), 0, 0, 0)], dtype)
    run_on_threads(function.address, job.ctypes.data, min(torch.get_num_threads(), len(chunks.owner)))
    return chunks, sums


def run_on_threads(function: int, argument: int, threads: int) -> None:
    """Call a C function of one pointer on each of some threads, which share out the work themselves.

    These are the threads of torch's OpenMP library where it has GNU's entry point (LLVM's and Intel's have it too on
    Linux): after their work they go on turning for a while, and threads of our own would fight with them for the cores.
    """
    if threads > 1 and (parallel := _gomp_parallel()) is not None:
        parallel(function, argument, threads, 0)
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    others = [_pool(threads - 1).submit(call, argument) for _ in range(threads - 1)]
    call(argument)
    for other in others:
        other.result()


@functools.cache
def _gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the library that torch has loaded, or None."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not there; Windows
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="hf_nsf")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
