# SPDX-License-Identifier: Apache-2.0
"""Reads `optim_args` into keyword arguments; the constructors' signatures define the keys and types."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from ..optim import LCAM, NSF

OPTIMIZERS: dict[str, Any] = {"lcam": LCAM, "nsf": NSF}

# Constructor arguments that are not options, and where they are set.
_SET_ELSEWHERE = {
    "params": "the Trainer passes the model's parameters",
    "lr": "set learning_rate in TrainingArguments",
    "betas": "set adam_beta1 and adam_beta2 in TrainingArguments",
    "eps": "set adam_epsilon in TrainingArguments",
    "weight_decay": "set weight_decay in TrainingArguments",
    "maximize": "the Trainer minimizes its loss",
    "total_steps": "the Trainer sets it to the number of its updates",
}
_NULLS = ("None", "null", "Null", "NULL")  # Python's and YAML's
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() also accepts 1_0 and other digits


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# Reader and allowed values, by a word in the argument's annotation.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (_flag, "true or false"),
    "float": (_number, "a finite number"),
    "str": (str.lower, "a word"),
}


def readers_of(optim: str) -> dict[str, tuple[Callable[[str], Any], str, bool]]:
    """Of each option of "lcam" or "nsf": reader, allowed values, whether it may be None."""
    found = {}
    for name, parameter in inspect.signature(OPTIMIZERS[optim]).parameters.items():
        if name not in _SET_ELSEWHERE:
            annotation = str(parameter.annotation)
            reader = next(reader for kind, reader in _READERS.items() if kind in annotation)
            found[name] = (*reader, "None" in annotation)
    return found


def parse_optim_args(optim: str, text: str | None, device: Any = "cpu") -> dict[str, Any]:
    """Read and check `optim_args`; the last texts read are remembered.

    Args:
        optim: "lcam" or "nsf".
        text: "key=value,key=value"; None or blanks for no options. An option that may be None is ignored if its
            value is `None` or `null`.
        device: the parameters' device, which some options depend on.

    Returns:
        Keyword arguments of the optimizer.

    Raises:
        ValueError: a key or value is not allowed; the message shows it and what is allowed.
    """
    if not isinstance(text, str | None):
        raise ValueError(f"Invalid optim_args: {text!r:.80} is not a string; allowed is key=value,key=value.")
    return dict(_parse(optim, (text or "").strip(), str(device)))


@functools.lru_cache(maxsize=16)
def _parse(optim: str, text: str, device: str) -> dict[str, Any]:
    readers = readers_of(optim)
    form = f"allowed is key=value,key=value with keys {', '.join(readers)}"
    found: dict[str, Any] = {}
    for item in text.split(",") if text else ():
        key, _, value = (part.strip() for part in item.partition("="))
        if not key or not value or "=" in value:
            where = f"{item.strip()!r:.80} in {text!r:.80}"
            raise ValueError(f"Invalid optim_args: {where} is not key=value, is a comma missing or extra? {form}.")
        if key in _SET_ELSEWHERE and key in inspect.signature(OPTIMIZERS[optim]).parameters:
            raise ValueError(f"Invalid optim_args: {key}={value:.80} is not allowed here: {_SET_ELSEWHERE[key]}.")
        if key not in readers:
            near = "".join(f", did you mean {name!r}?" for name in difflib.get_close_matches(key, readers, n=1)) or ";"
            where = f"optim={optim} has no option {key!r:.80} (value {value:.80})"
            raise ValueError(f"Invalid optim_args: {where}{near} {form}.")
        if key in found:
            raise ValueError(f"Invalid optim_args: {key} is given twice, the second time as {key}={value:.80}.")
        read, allowed, optional = readers[key]
        try:
            found[key] = None if optional and value in _NULLS else read(value)
        except (KeyError, ValueError):
            raise ValueError(f"Invalid {key}: {key}={value:.80}, allowed is {allowed}.") from None
    options = {key: value for key, value in found.items() if value is not None}
    # Let the constructor check ranges and combinations, on a throwaway parameter.
    OPTIMIZERS[optim]([torch.zeros(1, device=device, requires_grad=True)], **options)
    return options
