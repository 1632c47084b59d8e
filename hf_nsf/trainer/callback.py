# SPDX-License-Identifier: Apache-2.0
"""PhaseCallback: passes a Trainer's run to LCAM and NSF, and their values to its log."""

from __future__ import annotations

import math
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


def find_callback(trainer: Any, kind: type[TrainerCallback], add: bool) -> Any:
    """The trainer's callback of that kind (the last added), or None.

    With `add`, a missing one is added to the training that has begun, as frameworks replace the list of default
    callbacks: first, so that trackers see its values, and called for the events that it missed.
    """
    handler = trainer.callback_handler
    found = next((callback for callback in reversed(handler.callbacks) if isinstance(callback, kind)), None)
    if found is None and add:
        found = kind()
        handler.callbacks = [found, *handler.callbacks]  # a new list: the old one may be in a loop over an event
        context = {"optimizer": trainer.optimizer, "train_dataloader": handler.train_dataloader}
        for event in (found.on_train_begin, found.on_epoch_begin):
            event(trainer.args, trainer.state, trainer.control, **context)
    return found


class PhaseCallback(TrainerCallback):
    """Passes a Trainer's losses to :class:`hf_nsf.LossPhase` and its number of updates to :class:`hf_nsf.NSF`.

    Every Trainer with one of these optimizers has a PhaseCallback; with other optimizers it does nothing. It follows
    the optimizer that each event carries.

    An update's loss is the sum of the losses that `training_step` returned since the last update, as the Trainer logs
    it. Many models sum rather than average over an accumulation window, so only updates with the usual number of
    micro-batches decide: `gradient_accumulation_steps`, or, until an update of the run has had as many, the largest
    number so far.

    Adds the values used in a step to the Trainer's log: `nsf_p`; `lcam_momentum`, `lcam_loss_phase` (the phase that
    selected it: 1 low, 0 high) and, after the first decision, `lcam_loss_mean` (the mean it was made with).
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self, total_steps: int = 1) -> None:
        self._total_steps = total_steps
        self._optimizer: Any = None
        self._phase: LossPhase | None = None
        self._loss: torch.Tensor | None = None
        self.micro_batches = self._largest_window = self._ignored = 0
        self._inside_epoch = self._has_mean = False
        self._last_decision: Any = None
        self._used: dict[str, float] = {}

    @staticmethod
    def from_trainer(trainer: Any) -> PhaseCallback | None:
        """The trainer's PhaseCallback (the last added); a missing one is added if its optimizer is LCAM or NSF."""
        is_ours = isinstance(unwrap_optimizer(trainer.optimizer), (LCAM, NSF))
        found: PhaseCallback | None = find_callback(trainer, PhaseCallback, add=is_ours)
        return found

    def observe(self, loss: Any) -> None:
        """Add the loss of one micro-batch to that of the update.

        The losses of the Trainer's own `training_step` arrive here by themselves. A subclass that replaces it without
        calling it must call `hf_nsf.PhaseCallback.from_trainer(self).observe(loss)`.

        Args:
            loss: a number or a one-element tensor.
        """
        if self._phase is not None:
            loss = torch.as_tensor(loss).detach()
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # a bfloat16 sum is not the logged loss
            self._loss = loss.clone() if self._loss is None else self._loss + loss
            self.micro_batches += 1

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse invalid `optim_args` when the Trainer is made."""
        name = str(getattr(args.optim, "value", args.optim))
        if name in OPTIMIZERS:
            parse_optim_args(name, args.optim_args, args.device)
            if args.optim_args and args.optim_args.isspace():
                args.optim_args = None  # the Trainer's own parser, which runs before our handlers, fails on blanks

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Start a new run, or restore what a checkpoint does not hold."""
        self._reset(max(state.max_steps, 1))  # with max_steps=0 a Trainer makes one update
        ours = self._follow(optimizer)
        if not isinstance(ours, (LCAM, NSF)):
            return
        if state.global_step == 0:  # perhaps a second training with this optimizer
            if isinstance(ours, NSF):
                ours.restart_cycle()
            elif self._phase is not None:
                self._phase.restart()
            return
        accumulation = args.gradient_accumulation_steps
        try:
            batches = len(train_dataloader)
        except (TypeError, NotImplementedError):  # a stream; the Trainer counts it as one epoch
            batches = self._total_steps * accumulation
        # Like the Trainer: the checkpoint's state.epoch may be that of other batches.
        updates = max(math.ceil(batches / accumulation), 1)
        self._inside_epoch = not args.ignore_data_skip and state.global_step % updates != 0
        self._largest_window = min(batches, accumulation)
        self._has_mean = ours.param_groups[0].get("loss_count", 0) > 0
        if not (ours.state or self._has_mean):
            logger.warning_once(
                f"{type(ours).__name__} has no state at update {state.global_step} and starts anew (was the checkpoint "
                "saved with save_only_model=True?)."
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Reset the epoch's mean, unless a resumed run is inside its epoch."""
        self._follow(optimizer)
        if self._phase is not None and not self._inside_epoch:
            self._phase.start_epoch()
        self._inside_epoch = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Record the values that this step uses."""
        ours = self._follow(optimizer)
        if self._phase is not None:
            group = ours.param_groups[0]
            self._used = {"lcam_momentum": float(group["momentum"]), "lcam_loss_phase": group["loss_phase"]}
            if self._has_mean:
                self._used["lcam_loss_mean"] = group["loss_mean"]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Decide the momentum of the next update. Runs on all ranks after each step, skipped ones included."""
        ours = self._follow(optimizer)
        if isinstance(ours, NSF):
            self._used = {"nsf_p": ours.last_p}
        if self._phase is None:
            return
        group, skipped = ours.param_groups[0], bool(getattr(optimizer, "step_was_skipped", False))
        loss, micro_batches = self._take_loss()
        self._largest_window = max(self._largest_window, micro_batches)
        usual = 0 < micro_batches == min(self._largest_window, args.gradient_accumulation_steps)
        if loss is not None:
            self._phase.step(loss, skipped=skipped or not usual)
            self._has_mean = self._has_mean or group["loss_count"] > 0
        decision = group["loss_count"], group["loss_mean"]  # a second PhaseCallback may have received the losses
        self._ignored = 0 if usual or decision != self._last_decision else self._ignored + 1
        self._last_decision = decision
        if self._ignored == 10:
            logger.warning_once(
                f"LCAM's momentum is not updated: the last 10 updates had other numbers of losses (the last had "
                f"{micro_batches}) than gradient_accumulation_steps={args.gradient_accumulation_steps}. A training_step"
                " without transformers.Trainer's must call hf_nsf.PhaseCallback.from_trainer(self).observe(loss)."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop losses observed since the update: the Trainer has just dropped their gradients."""
        self._take_loss()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the values used to the log of a training loss, which the Trainer logs with the learning rate."""
        # Not by the loss's key alone: SetFit renames it.
        if self._used and logs is not None and not {"loss", "learning_rate"}.isdisjoint(logs):
            logs.update(self._used)
            # The Trainer has already copied `logs` to its history.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._used)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the references to the optimizer."""
        self._optimizer = self._phase = None

    def _follow(self, optimizer: Any) -> Any:
        """Unwrap the optimizer of an event; reset the values of another one."""
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is not self._optimizer:
            self._optimizer, self._has_mean, self._used = optimizer, False, {}
            self._phase = LossPhase(optimizer) if isinstance(optimizer, LCAM) else None
            if isinstance(optimizer, NSF):
                for options in (optimizer.defaults, *optimizer.param_groups):  # the defaults are those of later groups
                    options["total_steps"] = self._total_steps
        return optimizer

    def _take_loss(self) -> tuple[torch.Tensor | None, int]:
        """The sum of the losses observed, and their number; both start again at 0."""
        observed = self._loss, self.micro_batches
        self._loss, self.micro_batches = None, 0
        return observed
