# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of NSF's compiled step (numba; the extra `fused`): loops over float32s, and kernels made of them.

A kernel is a C function of the address of a `JOB`. Threads that call it with the same job share out its chunks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

TILE = 256  # elements that go through all arithmetic in the first cache
_LINE = 64  # bytes of a cache line

# Adding in another order is allowed, so that the loops can use vectors; infinities and NaNs keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_EXACT = {"contract"}
_I32 = ir.IntType(32)


@intrinsic
def _bits(typing, x):  # type: ignore[no-untyped-def]
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], _I32)


@intrinsic
def _from_bits(typing, x):  # type: ignore[no-untyped-def]
    """The float32 that has the bits of an int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _octave(typing, x, root_half_bits):  # type: ignore[no-untyped-def]
    """The int32 e of a normal x > 0 = 2^e r with r in [2^-1/2, 2^1/2), given the bits of 2^-1/2.

    Written in machine operations, as numba's sums of int32 are int64, of which half as many fit in a vector.
    """
    return types.int32(types.float32, types.int32), lambda context, builder, sig, args: builder.ashr(
        builder.sub(builder.bitcast(args[0], _I32), args[1]), ir.Constant(_I32, 23)
    )


@intrinsic
def _times_two_to(typing, x, n):  # type: ignore[no-untyped-def]
    """`x 2^n` where it is normal; only the last 9 bits of n count."""
    return types.float32(types.float32, types.int32), lambda context, builder, sig, args: builder.bitcast(
        builder.add(builder.bitcast(args[0], _I32), builder.shl(args[1], ir.Constant(_I32, 23))), ir.FloatType()
    )


@intrinsic
def _over_two_to(typing, x, n):  # type: ignore[no-untyped-def]
    """`x 2^-n`, likewise."""
    return types.float32(types.float32, types.int32), lambda context, builder, sig, args: builder.bitcast(
        builder.sub(builder.bitcast(args[0], _I32), builder.shl(args[1], ir.Constant(_I32, 23))), ir.FloatType()
    )


@intrinsic
def _fetch_and_add(typing, address, n):  # type: ignore[no-untyped-def]
    """Add n to the int64 at an address, whatever other threads do; returns what was there."""
    return types.int64(types.int64, types.int64), lambda context, builder, sig, args: builder.atomic_rmw(
        "add", builder.inttoptr(args[0], ir.PointerType(ir.IntType(64))), args[1], "monotonic"
    )


def _prefetch(for_writing):  # type: ignore[no-untyped-def]
    """A function that asks for the cache line at an address, which may be any."""

    @intrinsic
    def prefetch(typing, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            line = builder.inttoptr(args[0], ir.PointerType(ir.IntType(8)))
            signature = ir.FunctionType(ir.VoidType(), [line.type, _I32, _I32, _I32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [line.type], signature)
            # Kept in all caches (3), as data (1).
            builder.call(function, [line, *(ir.Constant(_I32, n) for n in (int(for_writing), 3, 1))])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return prefetch


_fetch_to_read, _fetch_to_write = _prefetch(False), _prefetch(True)


def _pointer_to(element, machine_type):  # type: ignore[no-untyped-def]
    """A function that makes a pointer of an address."""

    @intrinsic
    def pointer(typing, address):  # type: ignore[no-untyped-def]
        return types.CPointer(element)(types.int64), lambda context, builder, sig, args: builder.inttoptr(
            args[0], ir.PointerType(machine_type)
        )

    return pointer


_float32s, _float64s = _pointer_to(types.float32, ir.FloatType()), _pointer_to(types.float64, ir.DoubleType())
_int64s = _pointer_to(types.int64, ir.IntType(64))

_f32, _f64, _i32 = np.float32, np.float64, np.int32
_ROOT_HALF = _i32(np.float32(math.sqrt(0.5)).view(np.int32))
_ROUND = _f32(1.5 * 2**23)  # t + _ROUND ends in the bits of the integer next to t
_ONE, _LEAST, _MOST = _f32(1), _f32(-125), _f32(127)
_BOUND = _f32(2.0**96)  # max ** 0.75 of the readable path: no inf meets a 0
_TINY, _HUGE = 1e-28, 1e36  # sums of squares in float32 that have lost nothing lie between
_INFINITY = _f32(np.inf)
_DEGREE = 8
_COEFFICIENTS = _DEGREE + 3  # with the two parts of the exponent


def _polynomial(function, low, high, degree):  # type: ignore[no-untyped-def]
    """Coefficients, lowest first, of the polynomial that equals a function at Chebyshev's points of [low, high]."""
    points = (low + high) / 2 + (high - low) / 2 * np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
    return np.linalg.solve(np.vander(points, increasing=True), function(points))


_E0, _E1, _E2, _E3, _E4, _E5 = (_f32(c) for c in _polynomial(np.exp2, -0.5, 0.5, 5))


def holds_at(p: float, step_scale: str) -> bool:
    """Whether :func:`_power` holds its accuracy at the exponent that it meets for a p."""
    return -1 <= (2 * p if step_scale == "raw" else 1 - 2 * p) <= 5


def power_of(exponent: float) -> np.ndarray:
    """What :func:`_power` needs: the polynomial of (1 + x)^exponent about 0, and the exponent in two parts."""
    polynomial = _polynomial(lambda x: (1 + x) ** exponent, math.sqrt(0.5) - 1, math.sqrt(2) - 1, _DEGREE)
    # 15 bits, whose products with an octave are exact.
    coarse = (np.array([exponent], dtype=_f32).view(_i32) & _i32(-512)).view(_f32)[0]
    return np.array([*polynomial, coarse, exponent - _f64(coarse)], dtype=_f32)


@njit(fastmath=_EXACT, error_model="numpy", forceinline=True)
def _power(x, c):  # type: ignore[no-untyped-def]
    """`x ** exponent` for a normal x > 0 and `c = power_of(exponent)`; the relative error is below 6e-7.

    x = 2^e r gives r^exponent, a polynomial of r - 1, times 2^(e exponent), that is 2^f 2^n with n an integer.
    """
    e = _octave(x, _ROOT_HALF)
    r = _over_two_to(x, e) - _ONE
    t = min(max(_f32(e) * c[9], _LEAST), _MOST)
    n = t + _ROUND
    f = (t - (n - _ROUND)) + _f32(e) * c[10]
    power = c[0] + r * (c[1] + r * (c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * (c[6] + r * (c[7] + r * c[8])))))))
    part = _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * _E5))))
    return power * _times_two_to(part, _bits(n))


# Each loop below runs over a tile. Several short ones are faster than a long one: divisions and roots take as long as
# all other operations of the first loop, and the power alone needs all registers. In between, a tile stays in cache.


@njit(fastmath=_FAST, error_model="numpy")
def _moments_and_step(g, m, v, a, d, sign, b1c, b2, b2c, root_c2, eps):  # type: ignore[no-untyped-def]
    """Update m and v; d = sqrt(v_hat) + eps and Adam's step a = m / d, without the correction of m; 0 where d is.

    Returns the sum of squares of a.
    """
    square = _f32(0)
    for i in range(g.size):
        gradient = g[i] * sign
        m[i] += (gradient - m[i]) * b1c
        v[i] = v[i] * b2 + gradient * gradient * b2c
        d[i] = np.sqrt(v[i]) * root_c2 + eps
        a[i] = _f32(0) if d[i] == _f32(0) else m[i] / d[i]
        square += a[i] * a[i]
    return square


@njit(fastmath=_FAST, error_model="numpy")
def _adam_step(m, v, a, d, root_c2, eps):  # type: ignore[no-untyped-def]
    """The same d and a from moments that are updated already."""
    for i in range(m.size):
        d[i] = np.sqrt(v[i]) * root_c2 + eps
        a[i] = _f32(0) if d[i] == _f32(0) else m[i] / d[i]


@njit(fastmath=_FAST, error_model="numpy")
def _weigh_exactly(a, d, times):  # type: ignore[no-untyped-def]
    """Make a the direction u = a d^times, times being 1 (p = 0) or 2 (p = -1/2). Returns the sum of u's squares."""
    square = _f32(0)
    for i in range(a.size):
        a[i] *= min(d[i] if times == 1 else d[i] * d[i], _BOUND)
        square += a[i] * a[i]
    return square


@njit(fastmath=_FAST, error_model="numpy")
def _weigh(a, d, power):  # type: ignore[no-untyped-def]
    """Make a the direction u = a d^(1-2p). Returns the sum of u's squares."""
    square = _f32(0)
    for i in range(a.size):
        a[i] *= min(_power(d[i], power), _BOUND)
        square += a[i] * a[i]
    return square


@njit(error_model="numpy")
def _exact(x, square):  # type: ignore[no-untyped-def]
    """The sum of squares of x: the float32 that is given, or one in float64 where that may have lost something."""
    if _TINY < square < _HUGE:
        return _f64(square)
    exact = 0.0
    for i in range(x.size):
        exact += _f64(x[i]) * _f64(x[i])
    return exact


@njit(forceinline=True)
def _moved(theta, kept, step, zero):  # type: ignore[no-untyped-def]
    """`kept theta + step`, rounded twice as in the other paths: the rounding of decay adds up over the steps.

    `zero` is the int32 0, which the compiler does not know: so it makes no multiply-add, which rounds once.
    """
    return _from_bits(_bits(theta * kept) ^ zero) + step


@njit(forceinline=True)
def _scaled(u, coarse, fine):  # type: ignore[no-untyped-def]
    """`u coarse fine` in that order: u and the factor may be huge or tiny where their product is not."""
    return (u * coarse) * fine


@njit(fastmath=_FAST, error_model="numpy")
def _move(theta, u, kept, coarse, fine, zero):  # type: ignore[no-untyped-def]
    """Theta <- kept theta + coarse fine u."""
    for i in range(theta.size):
        theta[i] = _moved(theta[i], kept, _scaled(u[i], coarse, fine), zero)


@njit(fastmath=_FAST, error_model="numpy")
def _moments_and_root(g, m, v, d, sign, b1c, b2, b2c, root_c2):  # type: ignore[no-untyped-def]
    """Update m and v; d = sqrt(v_hat), a normal number also where v is not."""
    for i in range(g.size):
        gradient = g[i] * sign
        m[i] += (gradient - m[i]) * b1c
        v[i] = v[i] * b2 + gradient * gradient * b2c
        d[i] = np.sqrt(v[i]) * root_c2


@njit(fastmath=_EXACT, error_model="numpy")
def _raw_weights(d, power, at_zero, at_infinity):  # type: ignore[no-untyped-def]
    """Make d v_hat^p, power being that of 2p."""
    for i in range(d.size):
        weight = _power(d[i], power)  # before the tests, so that it uses vectors
        weight = at_zero if d[i] == _f32(0) else weight
        d[i] = at_infinity if d[i] == _INFINITY else weight


@njit(fastmath=_FAST, error_model="numpy")
def _raw_move(theta, m, d, eps, kept, rate, zero):  # type: ignore[no-untyped-def]
    """Theta <- kept theta + rate m / (v_hat^p + eps)."""
    for i in range(theta.size):
        theta[i] = _moved(theta[i], kept, rate * (m[i] / (d[i] + eps)), zero)


@njit(forceinline=True)
def _part(tensors, k, low, high):  # type: ignore[no-untyped-def]
    """Elements low to high of tensor k, given where the addresses of the tensors stand."""
    return numba.carray(_float32s(_at(_int64s(tensors), k) + 4 * low), high - low)


@njit(forceinline=True)
def _at(pointer, k):  # type: ignore[no-untyped-def]
    return numba.carray(pointer, k + 1)[k]


@njit(forceinline=True)
def _fetch_tile(tensors, k, low, fetch):  # type: ignore[no-untyped-def]
    """Ask for the tile of tensor k that begins at element low, so that memory works while the power is computed."""
    address = _at(_int64s(tensors), k) + 4 * low
    for byte in range(0, 4 * TILE, _LINE):
        fetch(address + byte)


# What the kernels below work on; arrays are given by their addresses. Threads take chunks from `next`, `run` at a time.
JOB = np.dtype(
    [(name, np.int64) for name in ("next", "last", "run", "next_at", "owner", "lows", "highs", "places")]
    + [(name, np.int64) for name in ("theta", "g", "m", "v", "root_c2s", "rates", "u", "sums", "power")]
    + [(name, np.float32) for name in ("sign", "b1c", "b2", "b2c", "eps", "kept", "at_zero", "at_infinity")]
    + [("zero", np.int32), ("times", np.int32)]
)


@njit
def _chunks(next_at, run, last):  # type: ignore[no-untyped-def]
    """This thread's part of the chunks: it takes the next `run` of them, until they are up."""
    first = _fetch_and_add(next_at, run)
    while first < last:
        for c in range(first, min(first + run, last)):  # noqa: UP028 (numba has no `yield from`)
            yield c
        first = _fetch_and_add(next_at, run)


def grafted_first(pointer):  # type: ignore[no-untyped-def]
    """step_scale="adam": moments, directions, which stay where there is room, and the chunks' sums of squares."""
    job = numba.carray(pointer, 1)[0]
    power = numba.carray(_float32s(job.power), _COEFFICIENTS)
    room = np.empty((2, TILE), _f32)
    for c in _chunks(job.next_at, job.run, job.last):
        k, start, end = _at(_int64s(job.owner), c), _at(_int64s(job.lows), c), _at(_int64s(job.highs), c)
        place, root_c2 = _at(_int64s(job.places), c), _at(_float32s(job.root_c2s), k)
        a_square = u_square = 0.0
        for low in range(start, end, TILE):
            high = min(low + TILE, end)
            d, a = room[0, : high - low], room[1, : high - low]
            if place >= 0:
                a = numba.carray(_float32s(job.u + 4 * (place + low - start)), high - low)
            g, m, v = _part(job.g, k, low, high), _part(job.m, k, low, high), _part(job.v, k, low, high)
            square = _moments_and_step(g, m, v, a, d, job.sign, job.b1c, job.b2, job.b2c, root_c2, job.eps)
            if square != 0:
                a_square += _exact(a, square)
            _fetch_tile(job.g, k, high, _fetch_to_read)
            _fetch_tile(job.m, k, high, _fetch_to_write)
            _fetch_tile(job.v, k, high, _fetch_to_write)
            square = _weigh_exactly(a, d, job.times) if job.times != 0 else _weigh(a, d, power)
            if a_square != 0:
                u_square += _exact(a, square)
        sums = numba.carray(_float64s(job.sums), (c + 1, 2))
        sums[c, 0], sums[c, 1] = a_square, u_square


def grafted_totals(pointer):  # type: ignore[no-untyped-def]
    """One thread adds up the sums of each tensor's chunks, in order, and gives them to all of its chunks."""
    job = numba.carray(pointer, 1)[0]
    owner, sums = numba.carray(_int64s(job.owner), job.last), numba.carray(_float64s(job.sums), (job.last, 2))
    start = job.next
    for c in range(job.next + 1, job.last):
        if owner[c] == owner[start]:
            sums[start, 0] += sums[c, 0]
            sums[start, 1] += sums[c, 1]
        else:
            start = c
    for c in range(job.next + 1, job.last):
        if owner[c] == owner[c - 1]:
            sums[c, 0], sums[c, 1] = sums[c - 1, 0], sums[c - 1, 1]


def grafted_second(pointer):  # type: ignore[no-untyped-def]
    """step_scale="adam": the parameters move; directions that did not stay are made again."""
    job = numba.carray(pointer, 1)[0]
    power = numba.carray(_float32s(job.power), _COEFFICIENTS)
    room = np.empty((2, TILE), _f32)
    for c in _chunks(job.next_at, job.run, job.last):
        k, start, end = _at(_int64s(job.owner), c), _at(_int64s(job.lows), c), _at(_int64s(job.highs), c)
        place, root_c2 = _at(_int64s(job.places), c), _at(_float32s(job.root_c2s), k)
        sums = numba.carray(_float64s(job.sums), (c + 1, 2))
        ratio = 0.0 if sums[c, 0] == 0 else 1.0 if sums[c, 1] == 0 else math.sqrt(sums[c, 0] / sums[c, 1])
        factor = _at(_float64s(job.rates), k) * ratio
        exponent = min(max(math.frexp(factor)[1], -126), 127)
        coarse, fine = _f32(math.ldexp(1.0, exponent)), _f32(math.ldexp(factor, -exponent))
        if place >= 0:
            u = numba.carray(_float32s(job.u + 4 * place), end - start)
            _move(_part(job.theta, k, start, end), u, job.kept, coarse, fine, job.zero)
        else:
            for low in range(start, end, TILE):
                high = min(low + TILE, end)
                d, a = room[0, : high - low], room[1, : high - low]
                _adam_step(_part(job.m, k, low, high), _part(job.v, k, low, high), a, d, root_c2, job.eps)
                if job.times != 0:
                    _weigh_exactly(a, d, job.times)
                else:
                    _weigh(a, d, power)
                _move(_part(job.theta, k, low, high), a, job.kept, coarse, fine, job.zero)


def raw(pointer):  # type: ignore[no-untyped-def]
    """step_scale="raw": all of it at once."""
    job = numba.carray(pointer, 1)[0]
    power = numba.carray(_float32s(job.power), _COEFFICIENTS)
    room = np.empty(TILE, _f32)
    for c in _chunks(job.next_at, job.run, job.last):
        k, start, end = _at(_int64s(job.owner), c), _at(_int64s(job.lows), c), _at(_int64s(job.highs), c)
        root_c2, rate = _at(_float32s(job.root_c2s), k), _f32(_at(_float64s(job.rates), k))
        for low in range(start, end, TILE):
            high = min(low + TILE, end)
            d, m = room[: high - low], _part(job.m, k, low, high)
            g, v = _part(job.g, k, low, high), _part(job.v, k, low, high)
            _moments_and_root(g, m, v, d, job.sign, job.b1c, job.b2, job.b2c, root_c2)
            _fetch_tile(job.theta, k, low, _fetch_to_write)
            _fetch_tile(job.g, k, high, _fetch_to_read)
            _fetch_tile(job.m, k, high, _fetch_to_write)
            _fetch_tile(job.v, k, high, _fetch_to_write)
            _raw_weights(d, power, job.at_zero, job.at_infinity)
            _raw_move(_part(job.theta, k, low, high), m, d, job.eps, job.kept, rate, job.zero)


@functools.cache
def kernel(function: Any) -> Any:
    """Compile one of the above to a C function of the address of a job, once; its machine code is cached on disk."""
    signature = types.void(types.CPointer(numba.from_dtype(JOB)))
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # no folder that the cache can be written to, or no room there
        return numba.cfunc(signature, error_model="numpy")(function)
