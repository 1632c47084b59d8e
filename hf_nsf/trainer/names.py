# SPDX-License-Identifier: Apache-2.0
"""The two members in transformers' enum of all values of `TrainingArguments.optim`.

This module imports neither torch nor transformers, because it is loaded in the middle of transformers' own imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

NAMES = ("lcam", "nsf")


def optimizer_name(value: str) -> Any:
    """Return the enum's member of that value. Pickled members refer to this function: unpickling imports hf_nsf."""
    return import_module("transformers.training_args").OptimizerNames(value)


def add_names(enum: Any) -> None:
    """Give the enum real members: iteration, lookup, argparse's choices, pickle and JSON then need no more."""
    for value in NAMES:
        if value not in enum._value2member_map_:
            _add_name(enum, value)


def _add_name(enum: Any, value: str) -> None:
    name = value.upper()
    member: Any = str.__new__(enum, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (value,))
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.13.10, 3.14 and newer: `in` looks here
        enum._hashable_values_.append(value)
    type.__setattr__(enum, name, member)


def remove_names(enum: Any) -> None:
    """Undo :func:`add_names`."""
    for value in NAMES:
        if enum._value2member_map_.pop(value, None) is not None:
            name = value.upper()
            enum._member_names_.remove(name)
            del enum._member_map_[name]
            if hasattr(enum, "_hashable_values_"):
                enum._hashable_values_.remove(value)
            type.__delattr__(enum, name)
