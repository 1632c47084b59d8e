# SPDX-License-Identifier: Apache-2.0
"""Checks of single numbers, shared by constructors and the parser of `optim_args`, and of states to be loaded."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer


def as_float(name: str, value: Any) -> float:
    """Return `value` (a real number or a one-element tensor) as a float; raise ValueError with the value otherwise."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Invalid {name}: {name}={value!r}, allowed is a number or a tensor of one element.")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"Invalid {name}: {name}={value!r}, allowed is a number.")
    return float(value)


def check_finite(name: str, value: Any) -> None:
    """Refuse anything but a finite number."""
    if not math.isfinite(as_float(name, value)):
        raise ValueError(f"Invalid {name}: {name}={value!r}, allowed is a finite number.")


def check_at_least_zero(name: str, value: Any) -> None:
    """Refuse anything but a finite number >= 0."""
    number = as_float(name, value)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"Invalid {name}: {name}={value!r}, allowed is a finite number >= 0.")


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a finite number > 0."""
    number = as_float(name, value)
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"Invalid {name}: {name}={value!r}, allowed is a finite number > 0.")


def check_decay(name: str, value: Any) -> None:
    """Refuse anything but a number in [0, 1), the range of momenta and averaging coefficients."""
    if not 0.0 <= as_float(name, value) < 1.0:
        raise ValueError(f"Invalid {name}: {name}={value!r}, allowed is a number in [0, 1).")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"Invalid {name}: {name}={value!r}, allowed: {', '.join(allowed)}.")


def check_shapes(optimizer: Optimizer, state_dict: dict[str, Any], name: str) -> None:
    """Refuse a state dict whose tensors of that name have other shapes than the parameters (ValueError).

    torch's `load_state_dict` looks at the numbers of groups and parameters only.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    ours = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(saved, ours, strict=False):  # torch refuses other numbers of them
        value = (state_dict["state"].get(index) or {}).get(name)
        if isinstance(value, torch.Tensor) and value.shape != param.shape:
            raise ValueError(
                f"Invalid state: {name} of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}; "
                "allowed is the state of a model of the same shapes."
            )
