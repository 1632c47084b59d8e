# SPDX-License-Identifier: Apache-2.0
"""Processes that train one model must be of one mind: else they wait for each other or drift apart without a word.

Each question is asked on all processes at once, so each gets the same answers and ends with the same sentence.
"""

from __future__ import annotations

from typing import Any

import torch

_SAME = "give all the same optim, optim_args and learning rate"


def _told(mine: Any) -> list[Any]:
    """What every process has to say, in the order of their ranks; of one process only, itself."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [mine]
    told: list[Any] = [None] * distributed.get_world_size()
    # Not through accelerate, which takes DeepSpeed's processes on a CPU for single ones.
    distributed.all_gather_object(told, mine)
    return told


def check_same_run(optimizer: str, ours: bool, options: dict[str, Any], problem: Exception | None) -> None:
    """Before a training, with any optimizer: refuse one of ours beside another, or with other options.

    A process with another optimizer cannot know that its neighbours have ours, and in the first sum over processes
    that only ours make all would wait for ever. So all take part, at the price of one exchange of a few words.

    Args:
        optimizer: the name of this process's optimizer.
        ours: whether it is one of ours.
        options: those of `optim_args`, if so.
        problem: what this process has already found wrong; raised on all of them.

    Raises:
        Exception: `problem`, or ValueError with the sentence of another process.
    """
    told = _told((optimizer, ours, options, None if problem is None else str(problem)))
    for *_, found in told:
        if found is not None:
            raise problem if problem is not None and str(problem) == found else ValueError(found)
    first = told[0]
    for rank, other in enumerate(told):
        if other != first and (first[1] or other[1]):
            a, b = (f"optim={name} {given or ''}".strip() for name, _, given, _ in (first, other))
            raise ValueError(
                f"The processes have different options: process 0 trains with {a}, process {rank} with {b}; {_SAME}."
            )


def check_same_options(optimizer: Any, options: dict[str, Any]) -> None:
    """Refuse processes whose optimizers, all of ours, hold different options or states of the run (ValueError)."""
    ours = {f"optim_args {name}": repr(value) for name, value in options.items()}
    for index, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name not in ("params", "param_names"):
                ours[f"group {index} {name}"] = repr(float(value) if isinstance(value, torch.Tensor) else value)
    first, *others = _told((type(optimizer).__name__, ours))
    for rank, (kind, theirs) in enumerate(others, start=1):
        names = sorted(name for name in first[1].keys() | theirs.keys() if first[1].get(name) != theirs.get(name))
        if kind != first[0] or names:
            a, b = ({name: options.get(name) for name in names[:3]} for options in (first[1], theirs))
            raise ValueError(
                f"The processes have different options: process 0 trains with {first[0]} {a}, process {rank} with "
                f"{kind} {b}; {_SAME}."
            )


def check_same_length(updates: int, batches: int | None, epochs_matter: bool) -> None:
    """Refuse processes that would make different numbers of updates, or begin their epochs at different ones.

    Args:
        updates: of the whole training, on this process.
        batches: of an epoch, on this process; None where that is unknown.
        epochs_matter: whether the optimizer's path depends on where an epoch begins.

    Raises:
        ValueError: one sentence.
    """
    told = _told((updates, batches))
    if len({updates for updates, _ in told}) > 1:
        what, numbers = "make different numbers of updates", [updates for updates, _ in told]
        cure = "give all the same number of batches (even_batches=True), or max_steps"
    elif epochs_matter and len({batches for _, batches in told}) > 1:
        what, numbers = "have epochs of different lengths in batches", [batches for _, batches in told]
        cure = (
            "give all the same number (even_batches=True), or LCAM loss_average=ema without gradient accumulation, "
            "which needs no epochs"
        )
    else:
        return
    raise ValueError(f"The processes {what}, {', '.join(map(str, numbers))}: {cure}.")
