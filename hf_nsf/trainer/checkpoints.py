# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a Trainer: which one a run can go on from."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable
from typing import Any

import torch

_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
# FSDP with FULL_STATE_DICT: files of the main process.
_FULL_FILES = ("optimizer.bin", "pytorch_model_fsdp.bin")
# FSDP with SHARDED_STATE_DICT: folders of torch.distributed.checkpoint, a file for each process and one for all.
_OPTIMIZER_FOLDER = "optimizer_0"
_SHARDED_FOLDER = re.compile(r"^(optimizer|pytorch_model_fsdp)_\d+$")


def is_whole(folder: str) -> bool:
    """Whether the save of this checkpoint came to its end.

    The Trainer writes trainer_state.json last, on the main process; the others may still have been writing the state
    of their random numbers. Files of torch.save are zip archives, whose directory stands at their end; folders of
    torch.distributed.checkpoint get their list of contents last.
    """
    try:
        with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    entries = os.listdir(folder)
    names = [name for name in entries if name.endswith((".pt", ".pth")) or name in _FULL_FILES]
    sharded = [os.path.join(folder, name) for name in entries if _SHARDED_FOLDER.match(name)]
    if not all(zipfile.is_zipfile(os.path.join(folder, name)) for name in names):
        return False
    if not all(map(_has_its_shards, sharded)):
        return False
    random_states = sum(name.startswith("rng_state") for name in names)
    return not 0 < random_states < _processes(folder)


def _has_its_shards(folder: str) -> bool:
    """Whether every file of a torch.distributed.checkpoint is as long as its list of contents says."""
    try:
        ends: dict[str, int] = {}
        for place in _contents(folder).storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        return all(os.path.getsize(os.path.join(folder, name)) >= end for name, end in ends.items())
    except Exception:  # no list, or one that was cut short, which no one error stands for
        return False


def _contents(folder: str) -> Any:
    from torch.distributed.checkpoint import FileSystemReader  # here: not every build of torch has it

    return FileSystemReader(folder).read_metadata()


def last_whole_checkpoint(output_dir: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint whose save came to its end, or None, and the newer ones that it was chosen over."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted((int(m.group(1)) for m in map(_FOLDER.match, names) if m), reverse=True)
    broken: list[str] = []
    for step in steps:
        folder = os.path.join(output_dir, f"checkpoint-{step}")
        if is_whole(folder):
            return folder, broken
        broken.append(folder)
    return None, broken


def _first_group(folder: str) -> dict[str, Any] | None:
    """The options of the first parameter group where the optimizer's state is one file, else None."""
    for name in _OPTIMIZER_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            # Mapped, not read: only the groups are looked at.
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return state["param_groups"][0] if state.get("param_groups") else {}
    return None


def _processes(folder: str) -> int:
    """How many processes have at least taken part in a save; 0 where it does not say."""
    group = _first_group(folder)
    if group is not None:
        return group.get("processes", 0)
    sharded = os.path.join(folder, _OPTIMIZER_FOLDER)
    if not os.path.isdir(sharded):
        return 0
    return len({place.relative_path.split("_")[2] for place in _contents(sharded).storage_data.values()})


def optimizer_of_checkpoint(folder: str) -> str | None:
    """Whose state a checkpoint holds: "lcam", "nsf" or "another"; None where it holds none that we can read."""
    group = _first_group(folder)
    if group is not None:
        return _owner(group)
    sharded = os.path.join(folder, _OPTIMIZER_FOLDER)
    if os.path.isfile(os.path.join(sharded, ".metadata")):
        names = _contents(sharded).state_dict_metadata
        return _owner(name.rpartition(".")[2] for name in names if ".param_groups." in name)
    return None


def _owner(options: Iterable[str]) -> str:
    """Whose groups have these options."""
    names = set(options)
    if "low_loss_momentum" in names:
        return "lcam"
    return "nsf" if "step_scale" in names else "another"
