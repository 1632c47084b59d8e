# SPDX-License-Identifier: Apache-2.0
"""NSF's cycle of the exponent p (arXiv 2509.04713); range, shape and period of the paper are not known to us."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from ..optim.validation import check_choice, check_finite, check_positive

# Each maps the position phi in [0, 1) within a cycle to the weight of p_max; the rest is p_min's.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda phi: (1 + math.cos(2 * math.pi * phi)) / 2,
    "triangular": lambda phi: abs(1 - 2 * phi),
    "sawtooth": lambda phi: 1 - phi,
    "square": lambda phi: 1.0 if phi < 0.5 else 0.0,
}
CYCLE_SHAPES = tuple(_SHAPES)
DEFAULT_P_MIN, DEFAULT_P_MAX, DEFAULT_CYCLES, DEFAULT_SHAPE = 0.25, 0.5, 16, "cosine"


def check_cycle(
    p: float | None,
    p_min: float | None,
    p_max: float | None,
    cycle_steps: float | None,
    cycles: float | None,
    cycle_shape: str | None,
) -> None:
    """Refuse options of a cycle that are out of range or exclude each other (ValueError, one sentence).

    A period may be missing here: the Trainer has a default for it.
    """
    options = {"p_min": p_min, "p_max": p_max, "cycle_steps": cycle_steps, "cycles": cycles, "cycle_shape": cycle_shape}
    given = {name: value for name, value in options.items() if value is not None}
    if p is not None:
        check_finite("p", p)
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"Invalid {name}: {name}={value!r} is not allowed with a constant p={p!r}; give one of the two."
            )
        return
    for name in ("p_min", "p_max"):
        if name in given:
            check_finite(name, given[name])
    low = DEFAULT_P_MIN if p_min is None else p_min
    high = DEFAULT_P_MAX if p_max is None else p_max
    if low > high:
        raise ValueError(f"Invalid p_min: p_min={low!r} is above p_max={high!r}, allowed is p_min <= p_max.")
    if cycles is not None and cycle_steps is not None:
        raise ValueError(
            f"Invalid cycles: cycles={cycles!r} is not allowed with cycle_steps={cycle_steps!r}; give one."
        )
    for name in ("cycles", "cycle_steps"):
        if name in given:
            check_positive(name, given[name])
    if cycle_shape is not None:
        check_choice("cycle_shape", cycle_shape, CYCLE_SHAPES)


def _resolve(
    p: float | None,
    p_min: float | None,
    p_max: float | None,
    cycle_steps: float | None,
    cycles: float | None,
    total_steps: int | None,
    cycle_shape: str,
) -> Callable[[int], float]:
    """Check all options of a cycle and return p as a pure function of the update index k."""
    check_cycle(p, p_min, p_max, cycle_steps, cycles, None if cycle_shape == DEFAULT_SHAPE else cycle_shape)
    if p is not None:
        constant = float(p)
        return lambda k: constant
    low = DEFAULT_P_MIN if p_min is None else p_min
    high = DEFAULT_P_MAX if p_max is None else p_max
    if cycles is not None:
        if total_steps is None:
            raise ValueError(
                f"Invalid cycles: cycles={cycles!r} needs total_steps, the number of updates of the training."
            )
        check_positive("total_steps", total_steps)
        # Not k mod (total / cycles), whose rounding would put some k at the end of a cycle rather than its beginning.
        total, count = float(total_steps), cycles
    elif cycle_steps is not None:
        total, count = float(cycle_steps), 1.0
    else:
        raise ValueError("A cycle of p needs a period: give cycle_steps, or cycles with total_steps, or a constant p.")
    shape = _SHAPES[cycle_shape]

    def value(k: int) -> float:
        weight = shape(k * count % total / total)
        return low + (high - low) * weight

    return value


def p_schedule(
    steps: Iterable[int],
    p: float | None = None,
    p_min: float | None = None,
    p_max: float | None = None,
    cycle_steps: float | None = None,
    cycles: float | None = None,
    total_steps: int | None = None,
    cycle_shape: str = DEFAULT_SHAPE,
) -> list[float]:
    """The values of p at the update indices `steps`, for a look (or a plot) before a run.

    The options are those of :class:`PCycle`, and so are the errors.
    """
    value = _resolve(p, p_min, p_max, cycle_steps, cycles, total_steps, cycle_shape)
    return [value(k) for k in steps]


class PCycle:
    """Writes p to every group of an :class:`hf_nsf.NSF`, in the manner of torch's learning-rate schedulers.

    With k the number of updates made, P the period and phi = (k mod P)/P, p starts at p_max (as Adam, if that is 1/2):
    cosine `p_min + (p_max - p_min)(1 + cos 2 pi phi)/2`; triangular p_max -> p_min -> p_max; sawtooth p_max -> p_min
    and back at once; square p_max in the first half and p_min in the second. k stands in every group
    (`p_cycle_step`), so a loaded optimizer goes on where it stopped.

    Args:
        optimizer: an NSF.
        p: a constant exponent instead of a cycle.
        p_min: lowest exponent, default 0.25.
        p_max: highest exponent, default 0.5.
        cycle_steps: period in updates; or
        cycles: the number of cycles over `total_steps` updates.
        total_steps: the number of updates of the whole training, needed by `cycles` alone.
        cycle_shape: cosine, triangular, sawtooth or square.

    Raises:
        ValueError: a value is out of its range, options exclude each other, or the optimizer has no p.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        p: float | None = None,
        p_min: float | None = None,
        p_max: float | None = None,
        cycle_steps: float | None = None,
        cycles: float | None = None,
        total_steps: int | None = None,
        cycle_shape: str = DEFAULT_SHAPE,
    ) -> None:
        self._value = _resolve(p, p_min, p_max, cycle_steps, cycles, total_steps, cycle_shape)
        if not all("p" in group for group in optimizer.param_groups):
            raise ValueError(f"PCycle needs an NSF optimizer, got {type(optimizer).__name__}.")
        self.optimizer = optimizer
        self.move_to(optimizer.param_groups[0].get("p_cycle_step") or 0)

    @property
    def last_p(self) -> Any:
        """The exponent that the next update will use."""
        return self.optimizer.param_groups[0]["p"]

    def step(self) -> None:
        """Go on by one update. Call it after `optimizer.step()`, and not for an update that was skipped."""
        self.move_to((self.optimizer.param_groups[0].get("p_cycle_step") or 0) + 1)

    def move_to(self, k: int) -> None:
        """Set the number of updates made to `k`."""
        p = self._value(k)
        for group in self.optimizer.param_groups:
            group["p_cycle_step"] = k
            if hasattr(group["p"], "fill_"):
                group["p"].fill_(p)  # a tensor is changed in place, so that a compiled step sees it
            else:
                group["p"] = p
