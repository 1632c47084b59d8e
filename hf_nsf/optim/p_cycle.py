# SPDX-License-Identifier: Apache-2.0
"""NSF's exponent p as a pure function of the number of updates made (arXiv 2509.04713).

The paper's range, shape and period of the cycle are unknown; the defaults here are this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from .checks import check_choice, check_within

DEFAULT_P_MIN, DEFAULT_P_MAX, DEFAULT_SHAPE = 0.25, 0.5, "cosine"
DEFAULT_CYCLES, DEFAULT_CYCLE_STEPS = 16, 100
LEAST_P, LARGEST_P, LARGEST_COUNT = -1.0, 1.0, 1e9
_LEAST_DEFAULT_PERIOD, _LEAST_PERIOD = 8, 4
CYCLE_OPTIONS = ("p", "p_min", "p_max", "cycle_steps", "cycles", "total_steps", "cycle_shape")
EXCLUDED = {"p": ("p_min", "p_max", "cycle_steps", "cycles", "cycle_shape"), "cycle_steps": ("cycles",)}

# Each maps the position phi in [0, 1) within a cycle to the weight of p_max; p_min has the remaining weight.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda phi: (1 + math.cos(2 * math.pi * phi)) / 2,
    "triangular": lambda phi: abs(1 - 2 * phi),
    "sawtooth": lambda phi: 1 - phi,
    "square": lambda phi: 1.0 if phi < 0.5 else 0.0,
}
CYCLE_SHAPES = tuple(_SHAPES)


def check_cycle(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a cycle as plain floats, strings and None, with the defaults of range and shape.

    With a constant p, the others are None.

    Raises:
        ValueError: a value is out of its range, or two options exclude each other.
    """
    found = {name: value for name, value in options.items() if value is not None}
    for given, excluded in EXCLUDED.items():
        for name in excluded if given in found else ():
            if name in found:
                raise ValueError(
                    f"Invalid {name}: {name}={found[name]!r} is not allowed with {given}={found[given]!r}; give one "
                    "of the two."
                )
    checked: dict[str, Any] = dict.fromkeys(CYCLE_OPTIONS)
    if "p" in found:
        return checked | {"p": check_within("p", found["p"], LEAST_P, LARGEST_P)}
    for name, default in (("p_min", DEFAULT_P_MIN), ("p_max", DEFAULT_P_MAX)):
        checked[name] = check_within(name, found.get(name, default), LEAST_P, LARGEST_P)
    if checked["p_min"] > checked["p_max"]:
        low, high = (
            f"{name}={checked[name]!r}" + " (the default)" * (name not in found) for name in ("p_min", "p_max")
        )
        raise ValueError(f"Invalid p_min: {low} is above {high}; allowed is p_min <= p_max.")
    for name in ("cycle_steps", "cycles", "total_steps"):
        if name in found:
            checked[name] = check_within(name, found[name], 1 / LARGEST_COUNT, LARGEST_COUNT)
    checked["cycle_shape"] = found.get("cycle_shape", DEFAULT_SHAPE)
    check_choice("cycle_shape", checked["cycle_shape"], CYCLE_SHAPES)
    return checked


def _steps_and_cycles(options: dict[str, Any]) -> tuple[Any, Any]:
    """Return a number of updates and the number of cycles in it."""
    if options["cycle_steps"] is not None:
        return options["cycle_steps"], 1
    total, cycles = options["total_steps"], options["cycles"]
    if total is None and cycles is not None:
        raise ValueError(
            f"Invalid cycles: cycles={cycles!r} needs total_steps, the number of updates of the whole training; "
            "a Trainer's callback fills it in."
        )
    if total is None:
        return DEFAULT_CYCLE_STEPS, 1
    return total, max(1, min(DEFAULT_CYCLES, total // _LEAST_DEFAULT_PERIOD)) if cycles is None else cycles


def lacks_total(options: dict[str, Any]) -> bool:
    """Return whether `cycles` is given without the `total_steps` that it needs."""
    return options["cycles"] is not None and options["total_steps"] is None


def p_at(k: float, options: dict[str, Any]) -> float:
    """Return the exponent after `k` updates; `options` as :func:`check_cycle` returns them, as in NSF's groups.

    Raises:
        ValueError: `cycles` is given without `total_steps`, or a constant p was set to a value outside of [-1, 1].
    """
    if options["p"] is not None:
        p = float(options["p"])
        return p if LEAST_P <= p <= LARGEST_P else check_within("p", p, LEAST_P, LARGEST_P)
    steps, cycles = _steps_and_cycles(options)
    first = options.get("first_step", 0.0)
    k = k - first if k >= first else k  # fewer where it was frozen before the restart
    # k mod (steps / cycles) would be rounded, which puts some k at the end of a cycle instead of its beginning.
    weight = _SHAPES[options["cycle_shape"]](k * cycles % steps / steps)
    low, high = options["p_min"], options["p_max"]
    return float(low + (high - low) * weight)


def short_period(options: dict[str, Any]) -> float | None:
    """Return the period in updates if it was set and is below 4, too short for a cycle; else None."""
    if options["p"] is not None or options["cycle_steps"] is None and options["cycles"] is None:
        return None
    steps, cycles = _steps_and_cycles(options)
    return steps / cycles if steps / cycles < _LEAST_PERIOD else None


def p_schedule(
    steps: Iterable[int],
    p: float | None = None,
    p_min: float | None = None,
    p_max: float | None = None,
    cycle_steps: float | None = None,
    cycles: float | None = None,
    total_steps: float | None = None,
    cycle_shape: str | None = None,
) -> list[float]:
    """Preview the schedule of p.

    With P the period in updates and phi = (k mod P) / P: cosine `p_min + (p_max - p_min) (1 + cos 2 pi phi) / 2`;
    triangular p_max -> p_min -> p_max; sawtooth p_max -> p_min, then a jump back; square p_max in the first half, p_min
    in the second.

    Args:
        steps: numbers of updates made so far, k.
        p: a constant exponent in [-1, 1] instead of a cycle.
        p_min: lowest exponent in [-1, 1], default 0.25.
        p_max: highest exponent, default 0.5; training begins there.
        cycle_steps: period in updates, default 100 without `total_steps`; or
        cycles: number of cycles over `total_steps`, default 16 (fewer if a period had less than 8 updates).
        total_steps: number of updates of the whole training.
        cycle_shape: "cosine" (default), "triangular", "sawtooth" or "square".

    Returns:
        The exponent of each update.

    Raises:
        ValueError: a value is out of its range, or options exclude each other.
    """
    values = (p, p_min, p_max, cycle_steps, cycles, total_steps, cycle_shape)
    options = check_cycle(dict(zip(CYCLE_OPTIONS, values, strict=True)))
    return [p_at(k, options) for k in steps]
