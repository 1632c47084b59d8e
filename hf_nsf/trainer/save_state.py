# SPDX-License-Identifier: Apache-2.0
"""SaveState: what hf_nsf.compare reads of a run, while it trains and at its end."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

SAVE_STATE = "HF_NSF_SAVE_STATE"
_LOSSES = ("loss", "train_loss", "eval_loss")


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as a plain one; anything else that JSON does not know as text."""
    try:
        return value.item()
    except Exception:
        return str(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # text and the like
        return True


def has_diverged(logs: dict[str, Any]) -> bool:
    """Whether a log shows that training cannot recover.

    The Trainer leaves losses that are not finite out of its sum (logging_nan_inf_filter): where all of them were, it
    logs a loss of 0 beside a gradient norm of NaN.
    """
    filtered = logs.get("loss") == 0 and not _is_finite(logs.get("grad_norm"))
    return filtered or not all(_is_finite(logs.get(name)) for name in _LOSSES)


class SaveState(TrainerCallback):
    """Saves the log to the path in `HF_NSF_SAVE_STATE`, and the present step to progress.json beside it.

    Stops a training whose loss is not finite. It never ends one otherwise: what cannot be written is left out.
    """

    def __init__(self) -> None:
        self._is_training, self._diverged = True, False  # it may come in when training has begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the last training."""
        self._is_training, self._diverged = True, False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Save the progress, and the whole log if it may be the last; all ranks stop if the loss is not finite."""
        logs = logs or {}
        if self._is_training and not self._diverged and has_diverged(logs):
            logger.warning("The loss is not finite, so this run stops.")
            self._diverged = control.should_training_stop = True
        progress = {name: logs[name] for name in ("loss", "learning_rate") if name in logs}
        _write("progress.json", state, {"step": state.global_step, "max_steps": state.max_steps, **progress})
        if not self._is_training:
            self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the whole log: a script may save nothing itself, and often evaluates last."""
        _write("", state, {"log_history": state.log_history, "diverged": self._diverged})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the whole log."""
        self._is_training = False
        self.on_evaluate(args, state, control)


def _write(name: str, state: Any, content: dict[str, Any]) -> None:
    """Write JSON beside the log, or as the log, whole or not at all."""
    path = os.environ.get(SAVE_STATE)
    # Not the state of another Trainer that evaluates only: it has made no update.
    if not path or not state.is_world_process_zero or not state.global_step:
        return
    target = Path(path).with_name(name) if name else Path(path)
    part = target.with_name(target.name + ".part")
    try:
        part.write_text(json.dumps(content, default=_plain, skipkeys=True), "utf-8")
        part.replace(target)
    except Exception as error:  # a full disk, a log that contains itself
        logger.warning_once(f"The log of this run cannot be saved to {target}: {error}")
