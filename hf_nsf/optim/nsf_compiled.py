# SPDX-License-Identifier: Apache-2.0
"""The NSF step on a CPU as two compiled loops over all tensors (numba; the extra `fused`), for float32.

The first loop updates m and v and computes the directions u and, for the length of Adam's step, the sums of squares of
`m / d` and u; the second moves the parameters. Tensors go through both in batches that stay in cache. Work is dealt to
the threads in chunks whose sums are added in a fixed order, so that a step has the same bits with any number of
threads. Only this module imports numba, and `nsf.py` imports this module only for a step that uses it.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

logger = logging.getLogger(__name__)

TILE = 256  # elements that go through all arithmetic in the first cache
CHUNK = 1 << 13  # elements of one piece of work
BATCH = 1 << 19  # elements of tensors that go through both loops together
KEPT = 12 << 20  # elements whose directions are kept (48 MiB); those of what is beyond are computed twice

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
def _pointer(typing, address):  # type: ignore[no-untyped-def]
    """An address as a pointer."""
    pointer = types.CPointer(types.float32)
    return pointer(types.int64), lambda context, builder, sig, args: builder.inttoptr(
        args[0], ir.PointerType(ir.FloatType())
    )


_f32, _f64, _i32 = np.float32, np.float64, np.int32
_ROOT_HALF = _i32(np.float32(math.sqrt(0.5)).view(np.int32))
_ROUND = _f32(1.5 * 2**23)  # t + _ROUND ends in the bits of the integer next to t
_ONE, _LEAST, _MOST = _f32(1), _f32(-125), _f32(127)
_BOUND = _f32(2.0**96)  # max ** 0.75 of the readable path: no inf meets a 0
_TINY, _HUGE = 1e-28, 1e36  # sums of squares in float32 that have lost nothing lie between
_INFINITY = _f32(np.inf)
_DEGREE = 8


def _polynomial(function, low, high, degree):  # type: ignore[no-untyped-def]
    """Coefficients, lowest first, of the polynomial that equals a function at Chebyshev's points of [low, high]."""
    points = (low + high) / 2 + (high - low) / 2 * np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
    return np.linalg.solve(np.vander(points, increasing=True), function(points))


_E0, _E1, _E2, _E3, _E4, _E5 = (_f32(c) for c in _polynomial(np.exp2, -0.5, 0.5, 5))


def holds_at(p: float, step_scale: str) -> bool:
    """Whether :func:`_power` holds its accuracy at the exponent that it meets for a p."""
    return -1 <= (2 * p if step_scale == "raw" else 1 - 2 * p) <= 5


def _power_of(exponent: float) -> np.ndarray:
    """What :func:`_power` needs: the polynomial of (1 + x)^exponent about 0, and the exponent in two parts."""
    polynomial = _polynomial(lambda x: (1 + x) ** exponent, math.sqrt(0.5) - 1, math.sqrt(2) - 1, _DEGREE)
    # 15 bits, whose products with an octave are exact.
    coarse = (np.array([exponent], dtype=_f32).view(_i32) & _i32(-512)).view(_f32)[0]
    return np.array([*polynomial, coarse, exponent - _f64(coarse)], dtype=_f32)


@njit(fastmath=_EXACT, error_model="numpy", forceinline=True)
def _power(x, c):  # type: ignore[no-untyped-def]
    """`x ** exponent` for a normal x > 0 and `c = _power_of(exponent)`; the relative error is below 6e-7.

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
def _weigh(a, d, power):  # type: ignore[no-untyped-def]
    """Make a the direction u = a d^(1-2p). Returns the sum of squares of u."""
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
def _part(address, low, high):  # type: ignore[no-untyped-def]
    """Elements low to high of the float32s at an address."""
    return numba.carray(_pointer(address + 4 * low), (high - low,))


@njit(parallel=True, cache=True, error_model="numpy")
def _grafted_step(
    batches, addresses, owner, lows, highs, places, u, sums, sign, b1c, b2, b2c, root_c2s, eps, power, kept, rates, zero
):  # type: ignore[no-untyped-def]
    """All tensors of a group for step_scale="adam". A batch is a range of chunks that share the scratch u."""
    for batch in range(batches.size - 1):
        first, last = batches[batch], batches[batch + 1]
        for c in prange(first, last):
            k, start, place = owner[c], lows[c], places[c]
            room = np.empty((2, TILE), _f32)
            a_square = u_square = 0.0
            for low in range(start, highs[c], TILE):
                high = min(low + TILE, highs[c])
                d = room[0, : high - low]
                a = u[place + low - start : place + high - start] if place >= 0 else room[1, : high - low]
                g, m, v = (
                    _part(addresses[1, k], low, high),
                    _part(addresses[2, k], low, high),
                    _part(addresses[3, k], low, high),
                )
                square = _moments_and_step(g, m, v, a, d, sign, b1c, b2, b2c, root_c2s[k], eps)
                if square != 0:
                    a_square += _exact(a, square)
                square = _weigh(a, d, power)
                if a_square != 0:
                    u_square += _exact(a, square)
            sums[c, 0], sums[c, 1] = a_square, u_square
        # The total of a tensor goes to its first chunk, from where all of its chunks take it.
        start = first
        for c in range(first + 1, last):
            if owner[c] == owner[start]:
                sums[start, 0] += sums[c, 0]
                sums[start, 1] += sums[c, 1]
            else:
                start = c
        for c in range(first + 1, last):
            if owner[c] == owner[c - 1]:
                sums[c, 0], sums[c, 1] = sums[c - 1, 0], sums[c - 1, 1]
        for c in prange(first, last):
            k, start, place = owner[c], lows[c], places[c]
            ratio = 0.0 if sums[c, 0] == 0 else math.sqrt(sums[c, 0] / sums[c, 1]) if sums[c, 1] > 0 else 1.0
            factor = rates[k] * ratio
            exponent = min(max(math.frexp(factor)[1], -126), 127)
            coarse, fine = _f32(math.ldexp(1.0, exponent)), _f32(math.ldexp(factor, -exponent))
            if place >= 0:
                theta = _part(addresses[0, k], start, highs[c])
                _move(theta, u[place : place + highs[c] - start], kept, coarse, fine, zero)
                continue
            room = np.empty((2, TILE), _f32)
            for low in range(start, highs[c], TILE):
                high = min(low + TILE, highs[c])
                d, a = room[0, : high - low], room[1, : high - low]
                m, v = _part(addresses[2, k], low, high), _part(addresses[3, k], low, high)
                _adam_step(m, v, a, d, root_c2s[k], eps)
                _weigh(a, d, power)
                _move(_part(addresses[0, k], low, high), a, kept, coarse, fine, zero)


@njit(parallel=True, cache=True, error_model="numpy")
def _raw_step(
    addresses, owner, lows, highs, sign, b1c, b2, b2c, root_c2s, eps, power, at_zero, at_infinity, kept, rates, zero
):  # type: ignore[no-untyped-def]
    """All tensors of a group for step_scale="raw"."""
    for c in prange(owner.size):
        k = owner[c]
        room = np.empty(TILE, _f32)
        for low in range(lows[c], highs[c], TILE):
            high = min(low + TILE, highs[c])
            d = room[: high - low]
            g, m, v = (
                _part(addresses[1, k], low, high),
                _part(addresses[2, k], low, high),
                _part(addresses[3, k], low, high),
            )
            _moments_and_root(g, m, v, d, sign, b1c, b2, b2c, root_c2s[k])
            _raw_weights(d, power, at_zero, at_infinity)
            _raw_move(_part(addresses[0, k], low, high), m, d, eps, kept, rates[k], zero)


class Plan:
    """How tensors of given sizes are dealt to chunks and batches."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        counts = [-(-size // CHUNK) for size in sizes]
        self.owner = np.repeat(np.arange(len(sizes)), counts)
        starts = np.cumsum([0, *counts])
        self.lows = (np.arange(len(self.owner)) - starts[self.owner]) * CHUNK
        self.highs = np.minimum(self.lows + CHUNK, np.asarray(sizes, dtype=np.int64)[self.owner])
        batches, self.places, room = [0], np.full(len(self.owner), -1), 0
        self.scratch = 0
        for index, size in enumerate(sizes):
            if room and room + size > BATCH:
                batches.append(int(starts[index]))
                room = 0
            chunks = slice(int(starts[index]), int(starts[index + 1]))
            places = room + self.lows[chunks]
            self.places[chunks] = np.where(places + CHUNK <= KEPT, places, -1)
            room += counts[index] * CHUNK
            self.scratch = min(max(self.scratch, room), KEPT)
        self.batches = np.array([*batches, len(self.owner)])
        self.sums = np.zeros((len(self.owner), 2))


class CompiledNSF:
    """Steps lists of tensors and keeps what can be used again: the plan of the last sizes, and the scratch."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._u = np.empty(0, dtype=np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        plans = self._plans.values()
        return self._u.nbytes + sum(
            x.nbytes for plan in plans for x in vars(plan).values() if isinstance(x, np.ndarray)
        )

    def step(
        self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], lr: float, p: float
    ) -> None:
        """Step float32 parameters on the CPU, all contiguous, with the group's options.

        Args:
            params: parameters with gradients.
            states: their states.
            group: where betas, eps, weight_decay, step_scale and maximize stand.
            lr: learning rate.
            p: exponent.
        """
        torch._foreach_add_([state["step"] for state in states], 1)
        work = [(q, q.grad, s["exp_avg"], s["exp_avg_sq"], s["step"]) for q, s in zip(params, states, strict=True)]
        work = [item for item in work if item[0].numel()]
        if not work:
            return
        sizes = tuple(item[0].numel() for item in work)
        plan = self._plans.get(sizes)
        if plan is None:
            if len(self._plans) > 8:  # gradients that come and go
                self._plans.clear()
            plan = self._plans[sizes] = Plan(sizes)
        addresses = np.array([[x.data_ptr() for x in item[:4]] for item in work], dtype=np.int64).T.copy()  # type: ignore[union-attr]
        t = torch.stack([item[4] for item in work]).numpy().astype(np.float64)
        b1, b2 = group["betas"]
        rates = -lr / (1 - b1**t)
        root_c2s = (1 / np.sqrt(1 - b2**t)).astype(np.float32)
        sign = _f32(-1 if group["maximize"] else 1)
        moments = (sign, _f32(1 - b1), _f32(b2), _f32(1 - b2), root_c2s, _f32(group["eps"]))
        kept = _f32(1 - lr * group["weight_decay"])
        chunks = (plan.owner, plan.lows, plan.highs)
        with _threads():
            if group["step_scale"] == "raw":
                at_zero, at_infinity = (_f32(x) for x in ((0, np.inf) if p > 0 else (1, 1) if p == 0 else (np.inf, 0)))
                _raw_step(
                    addresses, *chunks, *moments, _power_of(2 * p), at_zero, at_infinity, kept, rates.astype(_f32),
                    _i32(0),
                )  # fmt: skip
            else:
                if self._u.size < plan.scratch:
                    self._u = np.empty(plan.scratch, dtype=_f32)
                _grafted_step(
                    plan.batches, addresses, *chunks, plan.places, self._u, plan.sums, *moments, _power_of(1 - 2 * p),
                    kept, rates, _i32(0),
                )  # fmt: skip


@contextmanager
def _threads() -> Iterator[None]:
    """As many threads as torch uses."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(before)


@functools.cache
def is_ready(step_scale: str) -> bool:
    """Compile the loops of a step scale, once in a process; False where numba cannot."""
    theta = torch.zeros(1)
    theta.grad = torch.zeros(1)
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    group = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step_scale": step_scale, "maximize": False}
    start = time.perf_counter()
    try:
        CompiledNSF().step([theta], [state], group, lr=0.0, p=0.0)
    except Exception as error:  # whatever numba fails with, the other paths give the same steps
        logger.info(f"NSF's loops do not compile here ({type(error).__name__}: {error}); its other paths are used.")
        return False
    seconds = time.perf_counter() - start
    if seconds > 2:
        logger.warning(
            f"NSF compiled its step for this CPU in {seconds:.0f} s; later runs find it in numba's cache. "
            "fused=False does without."
        )
    return True
