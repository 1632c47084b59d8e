# SPDX-License-Identifier: Apache-2.0
"""Kahan sums for bfloat16 and float16 parameters.

A step of relative size below 2^-9 is lost when a bfloat16 parameter is rounded. Kahan summation keeps what rounding
drops in `kahan_comp`, a state of the parameter's dtype, and adds it at the next step. Stochastic rounding would need no
state, but its random numbers would have to be restored when a run resumes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def kahan_value(params: list[Tensor], comps: list[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    """Parameters in a dtype of higher precision, with what earlier roundings dropped."""
    values = [param.to(dtype) for param in params]
    if comps is not None:
        torch._foreach_add_(values, [comp.to(dtype) for comp in comps])
    return values


def kahan_round(params: list[Tensor], comps: list[Tensor] | None, values: list[Tensor]) -> None:
    """Round values of higher precision to the parameters, and keep what rounding drops in `comps`."""
    torch._foreach_copy_(params, values)
    if comps is not None:
        torch._foreach_sub_(values, [param.to(value.dtype) for param, value in zip(params, values, strict=True)])
        torch._foreach_copy_(comps, values)
