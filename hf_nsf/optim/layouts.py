# SPDX-License-Identifier: Apache-2.0
"""Which tensors a kernel that is given addresses may walk through together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FULL_PRECISION, _PLAIN = (torch.float32, torch.float64), (Tensor, torch.nn.Parameter)


def walk_alike(param: Any, grad: Any, *state: Any) -> bool:
    """Whether these are plain tensors on the CPU, in one full precision, of one size and one layout without gaps.

    The layout may be any, `torch.channels_last` for one, as element by element it does not matter. Of other tensors
    kernels that walk through memory (torch's fused optimizers on a CPU, our loops) read wrong elements, unnoticed.
    """
    dtype, size = param.dtype, param.numel()
    if dtype not in _FULL_PRECISION or type(param) not in _PLAIN or type(grad) is not Tensor or not param.is_cpu:
        return False
    if grad.layout is not torch.strided or grad.is_neg() or grad._is_zerotensor():  # other numbers in memory, or none
        return False
    contiguous = param.is_contiguous()
    for other in (grad, *state):
        if other.dtype is not dtype or other.numel() != size or other.is_contiguous() is not contiguous:
            return False
    return contiguous or (_is_dense(param) and all(x.stride() == param.stride() for x in (grad, *state)))


def in_memory_order(tensor: Tensor) -> Tensor:
    """All elements of a tensor without gaps, in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their part of memory, in some order of the dimensions."""
    filled_so_far = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled_so_far:
            return False
        filled_so_far *= size
    return True
