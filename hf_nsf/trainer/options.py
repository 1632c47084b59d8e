# SPDX-License-Identifier: Apache-2.0
"""`optim_args`: a strict, typed reader of the options of `optim="lcam"` and `optim="nsf"`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch

from ..control.loss_phase import LossPhase
from ..control.p_cycle import DEFAULT_CYCLES, DEFAULT_P_MAX, check_cycle
from ..optim import LCAM, NSF


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _word(text: str) -> str:
    return text.lower()


_NAMES: dict[Callable[[str], Any], str] = {_number: "a finite number", _boolean: "true or false", _word: "a word"}

# Which reader each option has, and below which of them are the controller's rather than the optimizer's.
OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "lcam": {
        "low_loss_momentum": _number,
        "high_loss_momentum": _number,
        "loss_average": _word,
        "loss_ema_decay": _number,
        "nesterov": _boolean,
        "foreach": _boolean,
        "fused": _boolean,
        "kahan": _boolean,
    },
    "nsf": {
        "p": _number,
        "p_min": _number,
        "p_max": _number,
        "cycles": _number,
        "cycle_steps": _number,
        "cycle_shape": _word,
        "step_scale": _word,
        "foreach": _boolean,
        "fused": _boolean,
        "kahan": _boolean,
    },
}
_OF_THE_CONTROLLER = {
    "lcam": ("loss_average", "loss_ema_decay"),
    "nsf": ("p", "p_min", "p_max", "cycles", "cycle_steps", "cycle_shape"),
}


def parse_optim_args(optim: str, text: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check `optim_args` of one of our optimizers.

    Args:
        optim: "lcam" or "nsf".
        text: "key=value,key=value" or None.

    Returns:
        Keyword arguments of the optimizer, and those of its controller.

    Raises:
        ValueError: one sentence that names the key, the value and what is allowed.
    """
    readers = OPTIONS[optim]
    allowed = ", ".join(readers)
    options: dict[str, Any] = {}
    for item in (text or "").split(",") if text and text.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not item.strip():
            raise ValueError(
                f"Empty entry in optim_args={text!r}: remove the extra comma; allowed is key=value,key=value."
            )
        if not equals or not key or not value:
            raise ValueError(
                f"Invalid entry {item.strip()!r} in optim_args={text!r}: allowed is key=value, key one of {allowed}."
            )
        if key not in readers:
            near = difflib.get_close_matches(key, readers, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Unknown option {key!r} of optim={optim} (value {value!r}): did you mean {near!r}? Allowed: {allowed}."
            )
        if key in options:
            raise ValueError(
                f"Repeated option {key!r} in optim_args={text!r}: {key}={value} comes a second time, allowed is once."
            )
        try:
            options[key] = readers[key](value)
        except (ValueError, KeyError):
            raise ValueError(f"Invalid {key}: {key}={value}, allowed is {_NAMES[readers[key]]}.") from None
    _check(optim, options)
    ours = _OF_THE_CONTROLLER[optim]
    return {k: v for k, v in options.items() if k not in ours}, {k: v for k, v in options.items() if k in ours}


def _check(optim: str, options: dict[str, Any]) -> None:
    """Let the constructors judge, on one parameter that nobody keeps."""
    of_controller = {name: options[name] for name in _OF_THE_CONTROLLER[optim] if name in options}
    of_optimizer = {name: value for name, value in options.items() if name not in of_controller}
    probe = [torch.zeros(1, requires_grad=True)]
    if optim == "lcam":
        LossPhase(LCAM(probe, **of_optimizer), **of_controller)
    else:
        NSF(probe, **of_optimizer)
        check_cycle(**{name: options.get(name) for name in _OF_THE_CONTROLLER["nsf"]})


def cycle_arguments(options: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """Arguments of :class:`hf_nsf.PCycle` for the options given, with the Trainer's defaults (16 narrow cycles)."""
    arguments = dict(options)
    if "p" not in arguments and "cycle_steps" not in arguments:
        arguments.setdefault("cycles", DEFAULT_CYCLES)
        arguments["total_steps"] = total_steps
    return arguments


def first_p(options: dict[str, Any]) -> float:
    """The exponent of the first update: a cycle begins at its upper end."""
    return options.get("p", options.get("p_max", DEFAULT_P_MAX))
