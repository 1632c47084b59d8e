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

CHUNK = 1 << 13  # elements of one piece of work
BATCH = 1 << 19  # elements of tensors that go through both loops together
KEPT = 12 << 20  # elements whose directions are kept (48 MiB); those of what is beyond are computed twice

# Adding in another order is allowed, so that the loops can use vectors; infinities and NaNs keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_EXACT = {"contract"}


@intrinsic
def _bits(typing, x):  # type: ignore[no-untyped-def]
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(typing, x):  # type: ignore[no-untyped-def]
    """The float32 that has the bits of an int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _pointer(typing, address):  # type: ignore[no-untyped-def]
    """An address as a pointer."""
    pointer = types.CPointer(types.float32)
    return pointer(types.int64), lambda context, builder, sig, args: builder.inttoptr(
        args[0], ir.PointerType(ir.FloatType())
    )


_f32, _f64, _i32 = np.float32, np.float64, np.int32
_ROOT = _f32(math.sqrt(2))
# log2(x) = 2/ln 2 (s + s^3/3 + s^5/5 + ...), s = (x - 1)/(x + 1); the next term is below 5e-8 for x in [2^-1/2, 2^1/2].
_L1, _L3, _L5, _L7 = (_f32(2 / math.log(2) / k) for k in (1, 3, 5, 7))
# 2^f = sum (f ln 2)^k / k!; the next term is below 2e-7 for f in [-1/2, 1/2].
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = (_f32(math.log(2) ** k / math.factorial(k)) for k in range(7))
_HALF, _BIAS, _LEAST = _f32(0.5), _f32(126.5), _f32(-126.0)
_TINY, _HUGE = 1e-28, 1e36  # sums of squares in float32 that have lost nothing lie between
_MANTISSA, _ONE_BITS, _EXPONENT, _OFFSET = _i32(0x007FFFFF), _i32(0x3F800000), _i32(23), _i32(127)


@njit(fastmath=_EXACT, error_model="numpy", forceinline=True)
def _power(x, exponent, most):  # type: ignore[no-untyped-def]
    """`x ** exponent` for a normal x > 0, within [2^-126, 2^most]; a relative error of about 2e-6 at the most."""
    bits = _bits(x)
    mantissa = _from_bits((bits & _MANTISSA) | _ONE_BITS)
    s = (mantissa - _ROOT) / (mantissa + _ROOT)
    r = s * s
    log2 = _f32(bits >> _EXPONENT) - _BIAS + s * (_L1 + r * (_L3 + r * (_L5 + r * _L7)))
    z = min(max(log2 * exponent, _LEAST), most)
    whole = np.floor(z + _HALF)
    f = z - whole
    part = _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
    return part * _from_bits((_i32(whole) + _OFFSET) << _EXPONENT)


@njit(fastmath=_FAST, error_model="numpy", forceinline=True)
def _direction(m, v, root_c2, eps, exponent, most):  # type: ignore[no-untyped-def]
    """Adam's step a = m / d and u = a d^(1-2p), both without the correction of m; a is 0 where d is."""
    d = np.sqrt(v) * root_c2 + eps
    a = _f32(0) if d == _f32(0) else m / d
    return a, a * _power(d, exponent, most)


@njit(fastmath=_FAST, error_model="numpy")
def _moments_and_direction(g, m, v, u, sign, b1c, b2, b2c, root_c2, eps, exponent, most):  # type: ignore[no-untyped-def]
    """The first loop over one chunk; u is written where it has room. Returns the sums of squares of a and u."""
    a_square = u_square = _f32(0)
    if u.size == 0:
        for i in range(g.size):
            gradient = g[i] * sign
            m[i] += (gradient - m[i]) * b1c
            v[i] = v[i] * b2 + gradient * gradient * b2c
            a, direction = _direction(m[i], v[i], root_c2, eps, exponent, most)
            a_square += a * a
            u_square += direction * direction
    else:
        for i in range(g.size):
            gradient = g[i] * sign
            m[i] += (gradient - m[i]) * b1c
            v[i] = v[i] * b2 + gradient * gradient * b2c
            a, direction = _direction(m[i], v[i], root_c2, eps, exponent, most)
            a_square += a * a
            u_square += direction * direction
            u[i] = direction
    return a_square, u_square


@njit(error_model="numpy")
def _exact_squares(m, v, root_c2, eps, exponent, most):  # type: ignore[no-untyped-def]
    """The sums of squares of a and u over one chunk in float64, where those of float32 overflow or underflow."""
    a_square = u_square = 0.0
    for i in range(m.size):
        a, direction = _direction(m[i], v[i], root_c2, eps, exponent, most)
        a_square += _f64(a) * _f64(a)
        u_square += _f64(direction) * _f64(direction)
    return a_square, u_square


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
def _move(theta, m, v, u, kept, coarse, fine, root_c2, eps, exponent, most, zero):  # type: ignore[no-untyped-def]
    """The second loop over one chunk: theta <- kept theta + coarse fine u."""
    if u.size == 0:
        for i in range(theta.size):
            direction = _direction(m[i], v[i], root_c2, eps, exponent, most)[1]
            theta[i] = _moved(theta[i], kept, _scaled(direction, coarse, fine), zero)
    else:
        for i in range(theta.size):
            theta[i] = _moved(theta[i], kept, _scaled(u[i], coarse, fine), zero)


@njit(fastmath=_FAST, error_model="numpy")
def _raw(g, m, v, theta, sign, b1c, b2, b2c, root_c2, eps, exponent, most, at_zero, kept, rate, zero):  # type: ignore[no-untyped-def]
    """Both at once for step_scale="raw": theta <- kept theta + rate m / (v_hat^p + eps), exponent being 2p."""
    for i in range(g.size):
        gradient = g[i] * sign
        m[i] += (gradient - m[i]) * b1c
        v[i] = v[i] * b2 + gradient * gradient * b2c
        root = np.sqrt(v[i]) * root_c2  # its exponent is in range where that of v is not
        power = at_zero if root == _f32(0) else _power(root, exponent, most)
        theta[i] = _moved(theta[i], kept, rate * (m[i] / (power + eps)), zero)


@njit(forceinline=True)
def _part(address, low, high):  # type: ignore[no-untyped-def]
    """Elements low to high of the float32s at an address."""
    return numba.carray(_pointer(address + 4 * low), (high - low,))


@njit(parallel=True, cache=True, error_model="numpy")
def _grafted_step(
    batches,
    addresses,
    owner,
    lows,
    highs,
    places,
    u,
    sums,
    sign,
    b1c,
    b2,
    b2c,
    root_c2s,
    eps,
    exponent,
    most,
    kept,
    rates,
    zero,
):  # type: ignore[no-untyped-def]
    """All tensors of a group for step_scale="adam". A batch is a range of chunks that share the scratch u."""
    for batch in range(batches.size - 1):
        first, last = batches[batch], batches[batch + 1]
        for c in prange(first, last):
            k, low, high = owner[c], lows[c], highs[c]
            place = places[c]
            room = u[place : place + high - low] if place >= 0 else u[:0]
            m, v = _part(addresses[2, k], low, high), _part(addresses[3, k], low, high)
            squares = _moments_and_direction(
                _part(addresses[1, k], low, high), m, v, room, sign, b1c, b2, b2c, root_c2s[k], eps, exponent, most
            )
            sums[c, 0], sums[c, 1] = squares
            if squares[0] > 0 and not (squares[0] > _TINY and _TINY < squares[1] < _HUGE):
                sums[c, 0], sums[c, 1] = _exact_squares(m, v, root_c2s[k], eps, exponent, most)
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
            k, low, high = owner[c], lows[c], highs[c]
            place = places[c]
            room = u[place : place + high - low] if place >= 0 else u[:0]
            factor = rates[k] * (math.sqrt(sums[c, 0] / sums[c, 1]) if sums[c, 1] > 0 else 1.0)
            power = min(max(math.frexp(factor)[1], -126), 127)
            coarse, fine = _f32(math.ldexp(1.0, power)), _f32(math.ldexp(factor, -power))
            theta = _part(addresses[0, k], low, high)
            m, v = _part(addresses[2, k], low, high), _part(addresses[3, k], low, high)
            _move(theta, m, v, room, kept, coarse, fine, root_c2s[k], eps, exponent, most, zero)


@njit(parallel=True, cache=True, error_model="numpy")
def _raw_step(
    addresses, owner, lows, highs, sign, b1c, b2, b2c, root_c2s, eps, exponent, most, at_zero, kept, rates, zero
):  # type: ignore[no-untyped-def]
    """All tensors of a group for step_scale="raw"."""
    for c in prange(owner.size):
        k, low, high = owner[c], lows[c], highs[c]
        _raw(
            _part(addresses[1, k], low, high), _part(addresses[2, k], low, high), _part(addresses[3, k], low, high),
            _part(addresses[0, k], low, high),
            sign, b1c, b2, b2c, root_c2s[k], eps, exponent, most, at_zero, kept, rates[k], zero,
        )  # fmt: skip


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
                at_zero = _f32(0 if p > 0 else 1 if p == 0 else np.inf)
                _raw_step(
                    addresses,
                    *chunks,
                    *moments,
                    _f32(2 * p),
                    _f32(128),
                    at_zero,
                    kept,
                    rates.astype(np.float32),
                    _i32(0),
                )
            else:
                if self._u.size < plan.scratch:
                    self._u = np.empty(plan.scratch, dtype=np.float32)
                most = _f32(96)  # as max ** 0.75 in the readable path: bounded, that no inf meets a 0
                _grafted_step(
                    plan.batches, addresses, *chunks, plan.places, self._u, plan.sums, *moments, _f32(1 - 2 * p), most,
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
