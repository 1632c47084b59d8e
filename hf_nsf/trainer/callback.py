# SPDX-License-Identifier: Apache-2.0
"""PhaseCallback: what LCAM and NSF need to know of a Trainer's run, and what the run's log should know of them."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..optim import LCAM, NSF, LossPhase
from .options import OPTIMIZERS, parse_optim_args

logger = logging.get_logger(__name__)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's (and DeepSpeed's) wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class PhaseCallback(TrainerCallback):
    """Hands a Trainer's losses to :class:`hf_nsf.LossPhase` and its number of updates to :class:`hf_nsf.NSF`.

    Every Trainer made after `import hf_nsf` has one; with other optimizers it does nothing. It follows the optimizer
    that each event carries.

    An update's loss is the sum of what `training_step` returned since the last update, which the Trainer logs. Many
    models sum rather than average over an accumulation window, so only updates with the usual number of micro-batches
    decide: `gradient_accumulation_steps`, or, while no update of the run has had so many, the most that one had.

    Adds to the Trainer's logs the values used in that step: `nsf_p`; `lcam_momentum`, `lcam_loss_phase` (the phase that
    chose it: 1 low, 0 high) and, once there is one, `lcam_loss_mean` (the mean that decided).
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self, total_steps: int = 1) -> None:
        """Forget the last run."""
        self._total_steps = total_steps
        self._optimizer: Any = None
        self._loss: torch.Tensor | None = None
        self._micro_batches = self._most = self._left_out = 0
        self._inside_epoch = self._has_mean = False
        self._written: list[float] = []
        self._last_seen: Any = None
        self._used: dict[str, float] = {}

    @staticmethod
    def of(trainer: Any) -> PhaseCallback | None:
        """The one that hears the losses of a Trainer: the last added; None if it has been removed."""
        callbacks = trainer.callback_handler.callbacks
        return next((callback for callback in reversed(callbacks) if isinstance(callback, PhaseCallback)), None)

    def observe(self, loss: Any) -> None:
        """Take the loss of one micro-batch.

        What the Trainer's own `training_step` returns comes here by itself. A subclass that replaces it without calling
        it does this: `hf_nsf.PhaseCallback.of(self).observe(loss)`.

        Args:
            loss: a number or a one-element tensor.
        """
        if isinstance(self._optimizer, LCAM):
            loss = torch.as_tensor(loss).detach()
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # sums in bfloat16 are not what is logged
            self._loss = loss.clone() if self._loss is None else self._loss + loss
            self._micro_batches += 1

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse invalid `optim_args` when the Trainer is made."""
        name = str(getattr(args.optim, "value", args.optim))
        if name in OPTIMIZERS and not parse_optim_args(name, args.optim_args, args.device):
            args.optim_args = None  # the Trainer's own parser, which comes before our handlers, fails at blanks

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Start anew, or restore what a checkpoint does not hold."""
        self._begin(max(state.max_steps, 1))  # with max_steps=0 a Trainer makes one update
        ours = self._follow(optimizer)
        if not isinstance(ours, (LCAM, NSF)):
            return
        accumulation = args.gradient_accumulation_steps
        try:
            batches = len(train_dataloader)
        except (TypeError, NotImplementedError):  # a stream, which the Trainer takes for one epoch
            batches = self._total_steps * accumulation
        updates = max(math.ceil(batches / accumulation), 1)
        _check_ranks(ours, state.max_steps, updates)
        if state.global_step == 0:
            if isinstance(ours, LCAM):
                LossPhase(ours).restart()
            return
        # As the Trainer finds its place; the checkpoint's state.epoch may be that of other batches.
        self._inside_epoch = not args.ignore_data_skip and state.global_step % updates != 0
        self._most = min(batches, accumulation)
        self._has_mean = ours.param_groups[0].get("loss_count", 0) > 0
        if not (ours.state or self._has_mean):
            logger.warning_once(
                f"{type(ours).__name__} starts anew: the checkpoint has no optimizer state (save_only_model=True?)."
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Start the epoch's mean anew, unless a resumed run stands inside its epoch."""
        ours = self._follow(optimizer)
        if isinstance(ours, LCAM) and not self._inside_epoch:
            LossPhase(ours).start_epoch()
        self._inside_epoch = False

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Follow an optimizer that is new, before its first loss."""
        self._follow(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note what this step uses, for the log."""
        ours = self._follow(optimizer)
        if not isinstance(ours, LCAM):
            return
        group = ours.param_groups[0]
        self._used = {"lcam_momentum": float(group["momentum"]), "lcam_loss_phase": group["loss_phase"]}
        if self._has_mean:
            self._used["lcam_loss_mean"] = group["loss_mean"]
        if any(group["momentum"] != mu for group, mu in zip(ours.param_groups, self._written, strict=False)):
            logger.warning_once(
                "Something else writes LCAM's momentum between its decisions, and the last writer wins: OneCycleLR and "
                "CyclicLR do so, unless cycle_momentum=False."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Decide the momentum of the next update. Runs on all ranks after each step, skipped ones included."""
        ours = self._follow(optimizer)
        if isinstance(ours, NSF):
            self._used = {"nsf_p": ours.last_p}
        if not isinstance(ours, LCAM):
            return
        group, skipped = ours.param_groups[0], bool(getattr(optimizer, "step_was_skipped", False))
        loss, micro_batches = self._take_loss()
        if loss is None:
            seen = group["loss_count"], group["loss_mean"]
            if seen == self._last_seen and not skipped:  # nor has a PhaseCallback that the user has added heard one
                logger.warning_once(
                    "LCAM hears no loss, so its momentum stays as it is: this Trainer's training_step does not call "
                    "transformers.Trainer's. Let it call hf_nsf.PhaseCallback.of(self).observe(loss)."
                )
            self._last_seen = seen
            return
        self._most = max(self._most, micro_batches)
        whole = micro_batches == min(self._most, args.gradient_accumulation_steps)
        LossPhase(ours).step(loss, skipped=skipped or not whole)
        self._has_mean = self._has_mean or group["loss_count"] > 0
        self._written = [group["momentum"] for group in ours.param_groups]
        self._left_out = 0 if whole else self._left_out + 1
        if self._left_out == 10:
            logger.warning_once(
                f"LCAM's momentum stays as it is: the last 10 updates had other numbers of micro-batches (the last had "
                f"{micro_batches}) than gradient_accumulation_steps={args.gradient_accumulation_steps}."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop losses heard since the update: the Trainer has just dropped their gradients."""
        self._take_loss()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the values used to the log of a training loss, before trackers see it."""
        if self._used and logs is not None and "loss" in logs:
            logs.update(self._used)
            # The Trainer has already copied `logs` to its history.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._used)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state where hf_nsf.compare asks for it: a script may save nothing, and often evaluates last."""
        path = os.environ.get("HF_NSF_SAVE_STATE")
        # Not the state of another Trainer that evaluates only: it has made no update.
        if path and state.is_world_process_zero and state.global_step:
            with open(path + ".part", "w", encoding="utf-8") as file:
                json.dump({"log_history": state.log_history}, file, default=float)  # numpy's numbers
            os.replace(path + ".part", path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer, so that its memory can be freed."""
        self._optimizer = None
        self.on_evaluate(args, state, control)

    def _follow(self, optimizer: Any) -> Any:
        """The optimizer of an event, unwrapped; what is known of another one is forgotten."""
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is not self._optimizer:
            self._optimizer, self._written, self._has_mean, self._used = optimizer, [], False, {}
        if isinstance(optimizer, NSF):
            for group in optimizer.param_groups:
                group["total_steps"] = self._total_steps
        return optimizer

    def _take_loss(self) -> tuple[torch.Tensor | None, int]:
        """The sum of the losses heard, and their number."""
        heard = self._loss, self._micro_batches
        self._loss, self._micro_batches = None, 0
        return heard


def _check_ranks(optimizer: LCAM | NSF, max_steps: int, updates: int) -> None:
    """Stop all ranks if their optimizers differ: they would drift apart, or wait for each other.

    Raises:
        ValueError: one sentence, the same on all ranks.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    mine = {"optimizer": type(optimizer).__name__, "number of updates": str(max_steps)}
    if isinstance(optimizer, LCAM):
        mine["updates of an epoch"] = str(updates)
    for index, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name not in ("params", "param_names"):
                mine[f"{name} (group {index})"] = repr(value.item() if isinstance(value, torch.Tensor) else value)
    # Not through accelerate, which counts one process where DeepSpeed runs several on a CPU.
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    first = gathered[0]
    for rank, other in enumerate(gathered):
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differ:
            raise ValueError(
                f"The ranks differ in {differ[0]}: {first.get(differ[0])} on rank 0, {other.get(differ[0])} on rank "
                f"{rank}; give all the same optim, optim_args and learning rate, and batches of equal number "
                "(even_batches=True, or max_steps)."
            )
