# SPDX-License-Identifier: Apache-2.0
"""Parameters in bfloat16 or float16: states in float32 and updates that do not vanish in rounding.

A step of relative size below 2^-9 is lost when a bfloat16 parameter is rounded. What rounding drops is therefore kept
in a tensor of the parameter's dtype and added again at the next step (Kahan's summation). Stochastic rounding would
need no such tensor, but it adds noise, and random numbers of its own whose state a resumed run would have to restore.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LOW_PRECISION = (torch.bfloat16, torch.float16)


def exact_value(param: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The parameter in a dtype of higher precision, with what earlier roundings have dropped of it."""
    value = param.to(dtype)
    return value if rest is None else value.add_(rest)


def round_into(param: Tensor, rest: Tensor | None, value: Tensor) -> None:
    """Write a value of higher precision to the parameter, and what rounding drops of it to `rest`."""
    param.copy_(value)
    if rest is not None:
        rest.copy_(value - param.to(value.dtype))


def restore_float32(optimizer: Optimizer, state_dict: dict[str, Any], names: tuple[str, ...]) -> None:
    """After `load_state_dict`, which casts states to their parameter's dtype: give these float32 again.

    Args:
        optimizer: has just loaded `state_dict`.
        state_dict: what it has loaded; states may lack an entry, or be missing.
        names: of the states to restore.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    ours = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(saved, ours, strict=True):
        if param.dtype not in LOW_PRECISION:
            continue
        for name in names:
            value = (state_dict["state"].get(index) or {}).get(name)
            if value is not None:
                state = optimizer.state[param]
                state[name] = value.detach().to(device=param.device, dtype=torch.float32, copy=True)
