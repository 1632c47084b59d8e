# SPDX-License-Identifier: Apache-2.0
"""NSF's two halves on a GPU: Triton kernels over one table of chunks, whatever the number of tensors.

A program takes one chunk of one tensor. It finds the tensor's row in a table: addresses, first chunk, size and the
numbers of the step, which the host sends in one transfer a step. So neither p, lr nor the step count is compiled in.
Importing this module imports Triton, which comes with torch for CUDA. With TRITON_INTERPRET=1 in the environment before
that, the kernels are interpreted and take tensors of a CPU: for tests.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.language import constexpr

from ..nsf_update import Bucket
from .table import addresses, chunk_table, scalars, sizes

CHUNK = 8192  # elements of a program, which takes BLOCK of them at a time; sums of squares are kept for each chunk
BLOCK = 512
COLUMNS = 16  # of a row: 5 addresses, first chunk, size, and the 9 columns of table.SCALARS
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Two roundings for a product and a sum, as in the eager halves; memory sets the pace. Triton's default is changing.
NO_FUSION = {"enable_fp_fusion": False}
_NAN = constexpr(tl.PropagateNan.ALL)


@triton.jit
def _number(row, column: constexpr):
    return tl.load(row + column).to(tl.float64, bitcast=True)


@triton.jit
def _at(address, i, DTYPE: constexpr, FAST: constexpr):
    pointers = address.to(tl.pointer_type(DTYPE)) + i
    if FAST:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _power(x, exponent):
    """x^exponent for x >= 0; 1 for exponents so small that only 0 and infinity would show it."""
    return tl.exp2(tl.where(tl.abs(exponent) < 1e-30, 0.0, exponent * tl.log2(x)))


@triton.jit
def _chunk(
    row, ratio, low, high, WORK: constexpr, DTYPE: constexpr, KAHAN: constexpr, BLOCK: constexpr, FAST: constexpr
):
    """Work on elements low .. high - 1; what a kind of work does not use is not loaded."""
    theta, grad, m, v, comp = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    sign, b1c = _number(row, 7).to(tl.float32), _number(row, 8).to(tl.float32)
    b2, b2c = _number(row, 9).to(tl.float32), _number(row, 10).to(tl.float32)
    root_c2, eps = _number(row, 11).to(tl.float32), _number(row, 12).to(tl.float32)
    exponent, decay_factor = _number(row, 13).to(tl.float32), _number(row, 14).to(tl.float32)
    rate = _number(row, 15) * ratio
    # Squares of float32 numbers, which may be 1e-24 or 1e24, leave float32.
    a_square, u_square = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(low, high, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = i == i if FAST else i < high  # the compiler knows the former
        m_at, v_at = _at(m, i, tl.float32, FAST), _at(v, i, tl.float32, FAST)
        mi, vi = tl.load(m_at, ok, 0.0), tl.load(v_at, ok, 0.0)
        if WORK != "second":
            g = tl.load(_at(grad, i, DTYPE, FAST), ok, 0.0).to(tl.float32) * sign
            mi = tl.where(b1c < 0.5, mi + (g - mi) * b1c, g - (g - mi) * (1 - b1c))  # as torch.lerp: exact at both ends
            vi = vi * b2 + g * g * b2c
            tl.store(m_at, mi, ok)
            tl.store(v_at, vi, ok)
        d = tl.sqrt_rn(vi) * root_c2
        if WORK == "whole":
            d = tl.where(exponent == 1, d, _power(d, exponent))
        d += eps
        u = tl.where(d == 0, 0.0, tl.div_rn(mi, d))
        if WORK == "first":
            a = tl.where(ok, u, 0.0).to(tl.float64)
            a_square = tl.fma(a, a, a_square)
        if WORK != "whole":
            u *= tl.clamp(_power(d, exponent), 2.0**-120, 2.0**96, propagate_nan=_NAN)  # no infinity meets a zero
        if WORK == "first":
            u = tl.where(ok, u, 0.0).to(tl.float64)
            u_square = tl.fma(u, u, u_square)
        else:
            theta_at, comp_at = _at(theta, i, DTYPE, FAST), _at(comp, i, DTYPE, FAST)
            value = tl.load(theta_at, ok, 0.0).to(tl.float32)
            if KAHAN:
                value += tl.load(comp_at, ok, 0.0).to(tl.float32)
            # In float64, as u and its factor may lie outside of float32 where their product does not.
            value = value * decay_factor + (u.to(tl.float64) * rate).to(tl.float32)
            tl.store(theta_at, value.to(DTYPE), ok)
            if KAHAN:
                tl.store(comp_at, (value - value.to(DTYPE).to(tl.float32)).to(DTYPE), ok)
    return a_square, u_square


@triton.jit
def _step(rows, owner, sums, WORK: constexpr, DTYPE: constexpr, KAHAN: constexpr, CHUNK: constexpr, BLOCK: constexpr):
    """One chunk of one tensor. `sums` are those of chunks, to be written, or those of tensors, to be read."""
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    row, ratio = rows + tensor * 16, 1.0
    low, size = (chunk - tl.load(row + 5)) * CHUNK, tl.load(row + 6)
    if WORK == "second":
        a_norm, u_norm = tl.sqrt(tl.load(sums + 2 * tensor)), tl.sqrt(tl.load(sums + 2 * tensor + 1))
        ratio = tl.where(u_norm == 0, 1.0, a_norm / u_norm)
    # Whole and aligned chunks are read 16 bytes at a time, which masks and odd addresses forbid.
    address = tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 4)
    if (low + CHUNK <= size) & (address % 16 == 0):
        a_square, u_square = _chunk(row, ratio, low, low + CHUNK, WORK, DTYPE, KAHAN, BLOCK, True)
    else:
        a_square, u_square = _chunk(row, ratio, low, tl.minimum(low + CHUNK, size), WORK, DTYPE, KAHAN, BLOCK, False)
    if WORK == "first":
        tl.store(sums + 2 * chunk, tl.sum(a_square, 0))
        tl.store(sums + 2 * chunk + 1, tl.sum(u_square, 0))


@triton.jit
def _add_up(rows, parts, sums, CHUNK: constexpr, BLOCK: constexpr):
    """Add the sums of a tensor's chunks in a fixed order: the same bits each time, which atomics do not give."""
    tensor, which = tl.program_id(0), tl.program_id(1)
    low, size = tl.load(rows + tensor * 16 + 5), tl.load(rows + tensor * 16 + 6)
    high, total = low + tl.cdiv(size, CHUNK), tl.zeros((BLOCK,), tl.float64)
    for start in range(low, high, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + 2 * i + which, i < high, 0.0)
    tl.store(sums + 2 * tensor + which, tl.sum(total, 0))


_waiting = WeakTensorKeyDictionary()  # the table of each first half whose second half has not come, by its sums


@functools.lru_cache(maxsize=16)
def _owner(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(chunk_table(lengths, CHUNK).owner, device=device)


def _table(buckets: list[Bucket], halves: bool) -> tuple[Tensor, Tensor]:
    """Rows of all tensors and the owners of all chunks, on the tensors' device; waits for nothing."""
    lengths, device = sizes(buckets), buckets[0].params[0].device
    first = chunk_table(lengths, CHUNK).first[:-1]
    numbers = scalars(buckets, halves).view(np.int64)
    rows = torch.from_numpy(np.ascontiguousarray(np.column_stack((addresses(buckets), first, lengths, numbers))))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows, _owner(lengths, device)


def _launch(work: str, buckets: list[Bucket], rows: Tensor, owner: Tensor, sums: Tensor) -> None:
    dtype, kahan = DTYPES[buckets[0].params[0].dtype], work != "first" and buckets[0].kahan_comps is not None
    if len(owner):
        with torch.cuda.device_of(rows):
            _step[(len(owner),)](rows, owner, sums, work, dtype, kahan, CHUNK, BLOCK, **NO_FUSION)


@functools.cache
def available(device_type: str) -> bool:
    """Whether the kernels take tensors of this type of device ("cpu": only if they are interpreted).

    On "cuda" the smallest kernel is run once, since Triton also needs a driver and a C compiler.
    """
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)  # with torch 2.6; it fails to compile _chunk
    if old or device_type != "cuda":
        return not old and device_type == "cpu" and not isinstance(_add_up, triton.JITFunction)
    try:
        zeros = torch.zeros(1, COLUMNS, dtype=torch.int64, device="cuda")
        _add_up[(1, 2)](zeros, zeros.view(torch.float64), zeros.double(), CHUNK, BLOCK, **NO_FUSION)
    except Exception as error:
        warnings.warn(f"NSF takes its slower eager path, as Triton cannot run here: {error}", stacklevel=2)
        return False
    return True


def first_half(buckets: list[Bucket]) -> Tensor:
    """Update m and v; (||a||^2, ||u||^2) of each tensor.

    Args:
        buckets: of one device and dtype; see :mod:`hf_nsf.optim.nsf_update`.

    Returns:
        (N, 2) float64, on the tensors' device.
    """
    rows, owner = _table(buckets, halves=True)
    parts = torch.empty(len(owner), 2, dtype=torch.float64, device=rows.device)
    sums = torch.empty(len(rows), 2, dtype=torch.float64, device=rows.device)
    _launch("first", buckets, rows, owner, parts)
    with torch.cuda.device_of(rows):
        _add_up[(len(rows), 2)](rows, parts, sums, CHUNK, BLOCK, **NO_FUSION)
    _waiting[sums] = rows, owner
    return sums


def second_half(buckets: list[Bucket], sums: Tensor) -> None:
    """Move theta, and its Kahan sum, by what :func:`first_half` has left in m and v.

    Args:
        buckets: those of the first half.
        sums: what the first half returned, the rows of sharded tensors summed over their shards.
    """
    rows, owner = _waiting.pop(sums, None) or _table(buckets, halves=True)
    _launch("second", buckets, rows, owner, sums.contiguous())


def whole_step(buckets: list[Bucket]) -> None:
    """Step buckets that need no norms (grafting="none", or p = 1/2) in one pass.

    Args:
        buckets: of one device and dtype; see :mod:`hf_nsf.optim.nsf_update`.
    """
    rows, owner = _table(buckets, halves=False)
    _launch("whole", buckets, rows, owner, rows.view(torch.float64))
