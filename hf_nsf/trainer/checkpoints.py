# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a Trainer: which one a run can go on from."""

from __future__ import annotations

import json
import os
import re
import zipfile
from typing import Any

import torch

_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")


def is_whole(folder: str, processes: int = 1) -> bool:
    """Whether the save of this checkpoint came to its end.

    The Trainer writes trainer_state.json last, on the main process; the others may still have been writing the state
    of their random numbers. Files of torch.save are zip archives, whose directory stands at their end.
    """
    try:
        with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    names = [name for name in os.listdir(folder) if name.endswith((".pt", ".pth"))]
    random_states = sum(name.startswith("rng_state") for name in names)
    if random_states and processes > 1 and random_states < processes:
        return False
    return all(zipfile.is_zipfile(os.path.join(folder, name)) for name in names)


def last_whole_checkpoint(output_dir: str, processes: int = 1) -> tuple[str | None, list[str]]:
    """The newest checkpoint whose save came to its end, or None, and the newer ones that it was chosen over."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted((int(m.group(1)) for m in map(_FOLDER.match, names) if m), reverse=True)
    broken: list[str] = []
    for step in steps:
        folder = os.path.join(output_dir, f"checkpoint-{step}")
        if is_whole(folder, processes):
            return folder, broken
        broken.append(folder)
    return None, broken


def optimizer_of_checkpoint(folder: str) -> str | None:
    """Whose state a checkpoint holds: "lcam", "nsf" or "another"; None where it holds none in one file."""
    for name in _OPTIMIZER_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            # Mapped, not read: only the groups are looked at.
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            group = state["param_groups"][0] if state.get("param_groups") else {}
            if "low_loss_momentum" in group:
                return "lcam"
            return "nsf" if "step_scale" in group else "another"
    return None
