# SPDX-License-Identifier: Apache-2.0
"""Kahan sums for bfloat16 and float16 parameters.

Rounding a bfloat16 parameter loses steps of relative size below 2^-9. A Kahan sum keeps the rounding error in
`kahan_comp`, a state of the parameter's dtype, and adds it at the next step. Stochastic rounding would need no state,
but a resumed run would have to restore its random numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def kahan_value(params: list[Tensor], comps: list[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    """Return parameters in a dtype of higher precision, plus their earlier rounding errors."""
    values = [param.to(dtype) for param in params]
    if comps is not None:
        torch._foreach_add_(values, [comp.to(dtype) for comp in comps])
    return values


def kahan_round(params: list[Tensor], comps: list[Tensor] | None, values: list[Tensor]) -> None:
    """Round values of higher precision to the parameters, and store the rounding errors in `comps`."""
    torch._foreach_copy_(params, values)
    if comps is not None:
        torch._foreach_sub_(values, [param.to(value.dtype) for param, value in zip(params, values, strict=True)])
        torch._foreach_copy_(comps, values)
