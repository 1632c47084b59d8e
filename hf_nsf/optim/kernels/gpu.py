# SPDX-License-Identifier: Apache-2.0
"""NSF's update on a GPU: Triton kernels over one table of chunks, for any number of tensors.

A program works on one chunk of one tensor. It reads the tensor's addresses, first chunk and size from a table, which
the host sends in one transfer a step. p, lr and the step count are arguments and are not compiled in. Triton comes with
torch for CUDA.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..nsf_update import UNIT, Bucket
from .table import chunk_table

CHUNK = 8192  # elements of a program, which takes BLOCK of them at a time; sums are kept for each chunk
BLOCK = 512
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A product and a sum are rounded twice, as in the eager functions; the speed is that of memory.
NO_FUSION = {"enable_fp_fusion": False}
# Columns of the table.
THETA, GRAD, M, V, COMP, FIRST_CHUNK, SIZE, COLUMNS = map(constexpr, range(8))
PER_UNIT = constexpr(1 / UNIT)


@triton.jit
def _at(address, i, DTYPE: constexpr, FAST: constexpr):
    pointers = address.to(tl.pointer_type(DTYPE)) + i
    if FAST:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _power(x, exponent):
    """x^exponent for x >= 0; 1 for exponent 0."""
    return tl.exp2(tl.where(exponent == 0, 0.0, exponent * tl.log2(x)))


@triton.jit
def _chunk(
    row, low, high, root, sign, one_minus_beta1, beta2, one_minus_beta2, inverse_root_c2, eps, exponent, reach,
    decay_factor, rate, WORK: constexpr, DTYPE: constexpr, KAHAN: constexpr, BLOCK: constexpr, FAST: constexpr,
):  # fmt: skip
    """Work on elements low .. high - 1 and return the sums of squares; only loads what this kind of work uses."""
    theta, grad, comp = tl.load(row + THETA), tl.load(row + GRAD), tl.load(row + COMP)
    m, v = tl.load(row + M), tl.load(row + V)
    a_square, u_square = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(low, high, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = i == i if FAST else i < high  # the compiler knows the former
        m_at, v_at = _at(m, i, tl.float32, FAST), _at(v, i, tl.float32, FAST)
        mi, vi = tl.load(m_at, ok, 0.0), tl.load(v_at, ok, 0.0)
        if WORK != "apply":
            g = tl.load(_at(grad, i, DTYPE, FAST), ok, 0.0).to(tl.float32) * sign
            # As torch.lerp, exact at both ends.
            mi = tl.where(one_minus_beta1 < 0.5, mi + (g - mi) * one_minus_beta1, g - (g - mi) * (1 - one_minus_beta1))
            vi = vi * beta2 + g * one_minus_beta2 * g
            tl.store(m_at, mi, ok)
            tl.store(v_at, vi, ok)
        d = tl.sqrt_rn(vi) * inverse_root_c2
        if WORK == "whole":
            d = tl.where(exponent == 1, d, _power(d, exponent))
        d += eps
        u = tl.where(d == 0, 0.0, tl.div_rn(mi, d))
        if WORK == "update":
            a = tl.where(ok, u, 0.0).to(tl.float64)
            a_square = tl.fma(a, a, a_square)
        if WORK != "whole":
            u *= _power(tl.minimum(tl.maximum(d * PER_UNIT, 1 / reach), reach), exponent)
        if WORK == "update":
            u = tl.where(ok, u, 0.0).to(tl.float64)
            u_square = tl.fma(u, u, u_square)
        else:
            theta_at, comp_at = _at(theta, i, DTYPE, FAST), _at(comp, i, DTYPE, FAST)
            value = tl.load(theta_at, ok, 0.0).to(tl.float32)
            if KAHAN:
                value += tl.load(comp_at, ok, 0.0).to(tl.float32)
            value = value * decay_factor - (u * rate if WORK == "whole" else (u * root) * root)
            tl.store(theta_at, value.to(DTYPE), ok)
            if KAHAN:
                tl.store(comp_at, (value - value.to(DTYPE).to(tl.float32)).to(DTYPE), ok)
    return a_square, u_square


@triton.jit
def _step(
    table, owner, sums, roots, sign, one_minus_beta1, beta2, one_minus_beta2, inverse_root_c2, eps, exponent, reach,
    decay_factor, rate, WORK: constexpr, DTYPE: constexpr, KAHAN: constexpr, CHUNK: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One chunk of one tensor. "update" writes the sums of each chunk, "apply" reads the `factor_roots` of tensors."""
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    row = table + tensor * COLUMNS
    low, size = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK, tl.load(row + SIZE)
    root = tl.load(roots + tensor).to(tl.float32) if WORK == "apply" else 0.0
    # Whole and aligned chunks are read 16 bytes at a time, which masks and odd addresses forbid.
    address = tl.load(row + THETA) | tl.load(row + GRAD) | tl.load(row + M) | tl.load(row + V) | tl.load(row + COMP)
    if (low + CHUNK <= size) & (address % 16 == 0):
        a_square, u_square = _chunk(
            row, low, low + CHUNK, root, sign, one_minus_beta1, beta2, one_minus_beta2, inverse_root_c2, eps,
            exponent, reach, decay_factor, rate, WORK, DTYPE, KAHAN, BLOCK, True,
        )  # fmt: skip
    else:
        a_square, u_square = _chunk(
            row, low, tl.minimum(low + CHUNK, size), root, sign, one_minus_beta1, beta2, one_minus_beta2,
            inverse_root_c2, eps, exponent, reach, decay_factor, rate, WORK, DTYPE, KAHAN, BLOCK, False,
        )  # fmt: skip
    if WORK == "update":
        tl.store(sums + 2 * chunk, tl.sum(a_square, 0))
        tl.store(sums + 2 * chunk + 1, tl.sum(u_square, 0))


@triton.jit
def _add_up(table, parts, sums, CHUNK: constexpr, BLOCK: constexpr):
    """Add the sums of a tensor's chunks in a fixed order, for the same bits each time; atomics do not give them."""
    tensor, which = tl.program_id(0), tl.program_id(1)
    row = table + tensor * COLUMNS
    low = tl.load(row + FIRST_CHUNK)
    high, total = low + tl.cdiv(tl.load(row + SIZE), CHUNK), tl.zeros((BLOCK,), tl.float64)
    for start in range(low, high, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + 2 * i + which, i < high, 0.0)
    tl.store(sums + 2 * tensor + which, tl.sum(total, 0))


@functools.lru_cache(maxsize=64)
def _owner(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(chunk_table(sizes, CHUNK).owner, device=device)


def _table(bucket: Bucket) -> tuple[Tensor, Tensor]:
    """Rows of all tensors and the owners of all chunks, on the tensors' device, without synchronizing."""
    sizes, device = tuple(map(Tensor.numel, bucket.params)), bucket.params[0].device
    first = chunk_table(sizes, CHUNK).first[:-1]
    table = torch.from_numpy(np.column_stack((bucket.addresses(), first, np.array(sizes, np.int64))))
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table, _owner(sizes, device)


def _launch(work: str, bucket: Bucket, sums: Tensor, roots: Tensor) -> None:
    s, (table, owner) = bucket.scalars, bucket.table
    exponent = 2 * s.p if work == "whole" else s.exponent
    moments = (-1.0 if s.maximize else 1.0, 1 - s.beta1, s.beta2, 1 - s.beta2, s.inverse_root_c2, s.eps)
    numbers = map(float, (*moments, exponent, s.reach, s.decay_factor, s.rate))
    dtype, kahan = DTYPES[bucket.params[0].dtype], work != "update" and bucket.kahan_comps is not None
    if len(owner):
        with torch.cuda.device_of(table):
            _step[(len(owner),)](table, owner, sums, roots, *numbers, work, dtype, kahan, CHUNK, BLOCK, **NO_FUSION)


def update_moments(bucket: Bucket) -> None:
    """As :func:`hf_nsf.optim.nsf_update.update_moments`."""
    bucket.table = table, owner = _table(bucket)
    parts, bucket.sums = (table.new_empty(n, 2, dtype=torch.float64) for n in (len(owner), len(table)))
    _launch("update", bucket, parts, parts)
    with torch.cuda.device_of(table):
        _add_up[(len(table), 2)](table, parts, bucket.sums, CHUNK, BLOCK, **NO_FUSION)


def apply_update(bucket: Bucket) -> None:
    """As :func:`hf_nsf.optim.nsf_update.apply_update`."""
    _launch("apply", bucket, bucket.sums, bucket.factor_roots())


def whole_step(bucket: Bucket) -> None:
    """As :func:`hf_nsf.optim.nsf_update.whole_step`."""
    bucket.table = table, _ = _table(bucket)
    unused = table.view(torch.float64)
    _launch("whole", bucket, unused, unused)
