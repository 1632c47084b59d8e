# SPDX-License-Identifier: Apache-2.0
"""Validation of single options; each error names the option, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch


def as_float(name: str, value: Any) -> float:
    """Return a real number, a NumPy scalar or a one-element tensor as a float.

    Raises:
        ValueError: the value is none of these, or is too large for a float.
    """
    number = value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_meta or value.is_complex() or value.dtype == torch.bool:
            raise _error(name, value, "a number or a one-element tensor with a value")
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise _error(name, value, "a number")
    try:
        return float(number)
    except OverflowError:
        raise _error(name, value, "a number that a float can hold") from None


def check_at_least_zero(name: str, value: Any) -> float:
    """Return a finite number >= 0 as a float."""
    return _check_range(name, value, lambda x: math.isfinite(x) and x >= 0, "a finite number >= 0")


def check_unit_interval(name: str, value: Any) -> float:
    """Return a number in [0, 1), the range of momenta and averaging coefficients, as a float."""
    return _check_range(name, value, lambda x: 0 <= x < 1, "a number in [0, 1)")


def check_within(name: str, value: Any, low: float, high: float) -> float:
    """Return a number in [low, high] as a float."""
    return _check_range(name, value, lambda x: low <= x <= high, f"a number from {low:g} to {high:g}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check that a value is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise _error(name, value, " or ".join(allowed))


def check_flag(name: str, value: Any, optional: bool = False) -> None:
    """Check that a value is True or False, or None if `optional`."""
    if not (isinstance(value, bool) or (optional and value is None)):
        raise _error(name, value, "True, False or None" if optional else "True or False")


def check_paths(foreach: Any, fused: Any, kahan_sum: Any) -> None:
    """Check foreach, fused and kahan_sum; foreach and fused exclude each other."""
    for name, value in (("foreach", foreach), ("fused", fused), ("kahan_sum", kahan_sum)):
        check_flag(name, value, optional=True)
    if foreach and fused:
        raise ValueError("Invalid foreach and fused: foreach=True, fused=True; at most one of the two may be True.")


def _check_range(name: str, value: Any, holds: Any, allowed: str) -> float:
    number = as_float(name, value)
    if not holds(number):
        raise _error(name, value, allowed)
    return number


def _error(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"Invalid {name}: {name}={value!r:.80}, allowed is {allowed}.")
