# SPDX-License-Identifier: Apache-2.0
"""NSF's update on a CPU: loops compiled by numba (the extra `fused`), for float32 and bfloat16.

Threads take shares of the chunks of a bucket, one after the other. Sums are kept for each chunk and added in a fixed
order, so a step has the same bits for any number of threads.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import float32, float64, int32, njit, types, uint32
from numba.extending import intrinsic, overload
from torch import Tensor

from ..nsf_update import UNIT, Bucket
from .table import chunk_table

CHUNK = 1 << 15  # elements whose sums are kept together
SHARE = 32  # chunks that a thread takes at a time
TILE = 1 << 9  # elements whose squares are added in float32; tiles are added in float64
DEGREE = 8  # of the polynomial in _power
UPDATE, APPLY, WHOLE = range(3)
LIKE = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}  # what a dtype is in the loops
ZERO, ONE, HALF, TINY, HUGE = (np.float32(x) for x in (0, 1, 0.5, 1e-30, 1e36))
# Infinities and NaNs keep their meaning. Only sums may be added in another order.
FAST = {"contract", "nsz", "arcp"}
SUMS = {*FAST, "reassoc"}


class Numbers(NamedTuple):
    """Numbers of a step."""

    sign: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    inverse_root_c2: np.float32
    eps: np.float32
    decay_factor: np.float32
    rate: np.float32
    is_adam: np.bool_  # whether v_hat^p is sqrt(v_hat)
    low: np.int32  # limits of a base in _power, as bits
    high: np.int32


@intrinsic
def _pointer(typing, address, low, like):  # type: ignore[no-untyped-def]
    """A pointer to element `low` of the array at an address: numba has no cast for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        start = builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return builder.gep(start, [arguments[1]])

    return types.CPointer(like)(types.int64, types.int64, like), generate


@njit(forceinline=True)
def _part(address, low, size, like):  # type: ignore[no-untyped-def]
    return numba.carray(_pointer(address, low, like), size)


def _load(x): ...  # an element as a float32


def _round(x, like): ...  # a float32 as an element, rounded to nearest, ties to even


@overload(_load, jit_options={"forceinline": True})
def _load_of(x):  # type: ignore[no-untyped-def]
    def from_bfloat16(x):  # type: ignore[no-untyped-def]
        return np.uint32(uint32(x) << uint32(16)).view(np.float32)

    return (lambda x: x) if x == types.float32 else from_bfloat16


@overload(_round, jit_options={"forceinline": True})
def _round_of(x, like):  # type: ignore[no-untyped-def]
    def to_bfloat16(x, like):  # type: ignore[no-untyped-def]
        bits = np.float32(x).view(np.uint32)
        up = uint32(bits + uint32(0x7FFF) + uint32((bits >> uint32(16)) & uint32(1)))
        return np.uint16(uint32(0x7FC00000 if x != x else up) >> uint32(16))

    return (lambda x, like: x) if like == types.float32 else to_bfloat16


def _fit(low, high, degree):  # type: ignore[no-untyped-def]
    """Chebyshev points of [low, high], and the matrix from values there to coefficients, lowest power first."""
    points = (low + high) / 2 + (high - low) / 2 * np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
    return points, np.linalg.inv(np.vander(points, increasing=True))


POINTS, MATRIX = _fit(0.5**0.5 - 1, 2**0.5 - 1, DEGREE)
_EXP2_POINTS, _EXP2 = _fit(-0.5, 0.5, 5)
E0, E1, E2, E3, E4, E5 = (_EXP2 @ np.exp2(_EXP2_POINTS)).astype(np.float32)
ROUND, ROOT_HALF = np.float32(1.5 * 2**23), np.float32(0.5**0.5).view(np.int32)


@functools.lru_cache(64)
def power_of(exponent: float) -> tuple[np.float32, ...]:
    """Coefficients for :func:`_power`: the polynomial of (1 + r)^exponent about 0, and the exponent in two parts."""
    coarse = round(exponent * 2**14) / 2**14  # its products with an octave are exact
    return tuple(map(np.float32, (*(MATRIX @ (1 + POINTS) ** exponent), coarse, exponent - coarse)))


@njit(fastmath={"contract"}, error_model="numpy", forceinline=True)
def _power(x, n, c):  # type: ignore[no-untyped-def]
    """`x^exponent` for x >= 0, clamped to the limits in n, and `c = power_of(exponent)`.

    x = 2^k (1 + r). (1 + r)^exponent is a polynomial; 2^(k exponent) is 2^f 2^whole.
    """
    bits = min(max(np.float32(x).view(np.int32), n.low), n.high)  # positive numbers are ordered as their bits are
    k = int32(int32(bits - ROOT_HALF) >> 23)
    r = np.int32(bits - int32(k << 23)).view(np.float32) - ONE
    t = float32(k) * c[9]
    whole = t + ROUND
    f = (t - (whole - ROUND)) + float32(k) * c[10]
    root = c[0] + r * (c[1] + r * (c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * (c[6] + r * (c[7] + r * c[8])))))))
    part = E0 + f * (E1 + f * (E2 + f * (E3 + f * (E4 + f * E5))))
    return root * np.int32(np.float32(part).view(np.int32) + int32(np.float32(whole).view(np.int32) << 23)).view(
        np.float32
    )


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _direction(m, v, n, c):  # type: ignore[no-untyped-def]
    """Adam's step a = m / d, and u; both 0 where d = 0."""
    d = np.sqrt(v) * n.inverse_root_c2 + n.eps
    a = ZERO if d == ZERO else m / d
    return a, a * _power(d, n, c)


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _moments(g, m, v, n):  # type: ignore[no-untyped-def]
    # As torch.lerp, exact at both ends: from m for weights below 1/2, else from g.
    from_m = n.one_minus_beta1 < HALF
    weight = n.one_minus_beta1 if from_m else n.one_minus_beta1 - ONE
    gradient = _load(g) * n.sign
    return (gradient - m) * weight + (m if from_m else gradient), v * n.beta2 + gradient * n.one_minus_beta2 * gradient


@njit(fastmath=SUMS, error_model="numpy", forceinline=True)
def _squares(g, m, v, n, c):  # type: ignore[no-untyped-def]
    a_tile = u_tile = ZERO
    for i in range(len(m)):
        m[i], v[i] = _moments(g[i], m[i], v[i], n)
        a, u = _direction(m[i], v[i], n, c)
        a_tile += a * a
        u_tile += u * u
    if a_tile == ZERO or (TINY < a_tile < HUGE and TINY < u_tile < HUGE):
        return float64(a_tile), float64(u_tile)
    a_square = u_square = 0.0  # squares in float32 may have overflowed or underflowed
    for i in range(len(m)):
        a, u = _direction(m[i], v[i], n, c)
        a_square += float64(a) ** 2
        u_square += float64(u) ** 2
    return a_square, u_square


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _move(theta, comp, m, v, n, c, factor, whole, like, kahan):  # type: ignore[no-untyped-def]
    for i in range(len(m)):
        if whole:
            root = np.sqrt(v[i]) * n.inverse_root_c2
            weight = root if n.is_adam else _power(root, n, c)
            step = (ZERO if root + n.eps == ZERO else m[i] / (weight + n.eps)) * n.rate
        else:
            step = _direction(m[i], v[i], n, c)[1] * factor * factor
        value = _load(theta[i])
        if kahan:
            value += _load(comp[i])
        value = value * n.decay_factor - step
        theta[i] = _round(value, like)
        if kahan:
            comp[i] = _round(value - _load(theta[i]), like)


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    """Compile with numba's cache, or without it where no folder for it can be written."""
    try:
        compiled = njit(error_model="numpy", nogil=True, cache=True)(function)
    except RuntimeError:
        compiled = njit(error_model="numpy", nogil=True)(function)
    return compiled  # type: ignore[no-any-return]


@_compile
def _work(kind, addresses, n, c, factors, owner, lows, lengths, sums, begin, end, like, kahan):  # type: ignore[no-untyped-def]
    """Do one kind of work for the chunks from `begin` up to `end`."""
    for j in range(begin, end):
        k = owner[j]
        for low in range(lows[j], lows[j] + lengths[j], TILE):
            size = min(TILE, lows[j] + lengths[j] - low)
            m, v = _part(addresses[k, 2], low, size, ZERO), _part(addresses[k, 3], low, size, ZERO)
            g = _part(addresses[k, 1], low, size, like)
            if kind == WHOLE:
                for i in range(size):
                    m[i], v[i] = _moments(g[i], m[i], v[i], n)
            if kind == UPDATE:
                a_square, u_square = _squares(g, m, v, n, c)
                sums[j, 0] += a_square
                sums[j, 1] += u_square
            else:
                theta, comp = _part(addresses[k, 0], low, size, like), _part(addresses[k, 4], low, size, like)
                if kahan:
                    _move(theta, comp, m, v, n, c, factors[k], kind == WHOLE, like, True)
                elif kind == WHOLE:
                    _move(theta, comp, m, v, n, c, factors[k], True, like, False)
                else:
                    _move(theta, comp, m, v, n, c, factors[k], False, like, False)


def _run(kind: int, bucket: Bucket, factors: np.ndarray) -> np.ndarray:
    """Do one kind of work for all chunks of a bucket, on torch's number of threads; return the sums of chunks."""
    if kind != APPLY:
        bucket.table = bucket.addresses(), chunk_table(tuple(map(Tensor.numel, bucket.params)), CHUNK)
    s, (addresses, chunks) = bucket.scalars, bucket.table
    # If lengths are grafted, d is d / 32 in the loops, so a and u are 32 times too large.
    unit, exponent, reach = (1.0, 2 * s.p, 2.0**60) if kind == WHOLE else (UNIT, s.exponent, s.reach)
    moments = (-1 if s.maximize else 1, 1 - s.beta1, s.beta2, 1 - s.beta2)
    rest = (s.inverse_root_c2 / unit, s.eps / unit, s.decay_factor, s.rate)
    limits = np.array([1 / reach, reach], np.float32).view(np.int32)
    numbers = Numbers(*map(np.float32, (*moments, *rest)), exponent == 1, *limits)
    sums = np.zeros((len(chunks.owner), 2))
    tables = (addresses, numbers, power_of(exponent), factors.astype(np.float32), *chunks[:3], sums)
    like, kahan = LIKE[bucket.params[0].dtype], bucket.kahan_comps is not None
    shares = collections.deque(range(0, len(chunks.owner), SHARE))

    def take_shares() -> None:
        while shares:
            with contextlib.suppress(IndexError):  # another thread took the last one
                begin = shares.popleft()
                _work(kind, *tables, begin, min(begin + SHARE, len(chunks.owner)), like, kahan)

    threads = min(torch.get_num_threads(), len(shares))
    others = []
    with contextlib.suppress(RuntimeError):  # Python's main thread has ended, and this one does all
        others += [_pool().submit(take_shares) for _ in range(threads - 1)]
    take_shares()
    for other in others:
        other.result()
    return sums


def update_moments(bucket: Bucket) -> None:
    """As :func:`hf_nsf.optim.nsf_update.update_moments`."""
    sums = np.zeros((len(bucket.params), 2))
    parts = _run(UPDATE, bucket, sums[:, 0])
    np.add.at(sums, bucket.table[1].owner, parts)  # in order
    bucket.sums = torch.from_numpy(sums / UNIT**2)


def apply_update(bucket: Bucket) -> None:
    """As :func:`hf_nsf.optim.nsf_update.apply_update`."""
    _run(APPLY, bucket, bucket.factor_roots().numpy() / UNIT**0.5)


def whole_step(bucket: Bucket) -> None:
    """As :func:`hf_nsf.optim.nsf_update.whole_step`."""
    _run(WHOLE, bucket, np.zeros(len(bucket.params)))


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:  # which starts a thread where none is idle
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hf_nsf")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
