# SPDX-License-Identifier: Apache-2.0
"""SpectralCallback: turns the Trainer's events and losses into loss phases (LCAM) and p-cycles (NSF)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..control import LossPhase, PCycle
from ..optim import LCAM, NSF
from .agreement import check_same_length, check_same_options
from .options import OPTIONS, cycle_arguments, parse_optim_args

logger = logging.get_logger(__name__)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's (and DeepSpeed's) wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _length(batches: Any) -> int | None:
    """How many there are, or None for a stream."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


class SpectralCallback(TrainerCallback):
    """Drives :class:`hf_nsf.LossPhase` or :class:`hf_nsf.PCycle` from a Trainer; does nothing for other optimizers.

    Every Trainer made after `import hf_nsf` has its own, so users need not add one. While `Trainer.train` runs, each
    value that `training_step` returns is handed to :meth:`observe`; the sum over an update's micro-batches is the loss
    that the Trainer logs, and the one that LCAM compares. An update of fewer micro-batches than the run's usual number
    (the last of an epoch) takes part in the decision where that sum is an average. Many models sum rather than average
    over an accumulation window, so `windows_average`, which the wrapper of `Trainer.train` sets, is asked: once in a
    run, at the first such update. The answer stands in every parameter group (`loss_windows_average`: 1 yes, 0 no, -1
    not asked yet).

    Adds to the Trainer's logs the values used in that step: `nsf_p`; `lcam_momentum`, `lcam_loss_phase` (the phase that
    chose it: 1 low, 0 high) and, once there is one, `lcam_loss_mean` (the mean that decided).
    """

    def __init__(self) -> None:
        self._optimizer: Any = None
        self._phase: LossPhase | None = None
        self._cycle: PCycle | None = None
        self._losses: list[torch.Tensor] = []
        self._used: dict[str, float] = {}
        self._resumed_in_epoch = False
        self._warned = False
        self.windows_average: Callable[[], bool | None] | None = None

    @property
    def compares_losses(self) -> bool:
        """Whether the losses of this run decide anything."""
        return self._phase is not None

    def observe(self, loss: Any) -> None:
        """Take the loss of one micro-batch, as `Trainer.training_step` returned it."""
        if self._phase is not None:
            self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss)))

    def on_init_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Refuse wrong `optim_args` as soon as the Trainer is made."""
        name = str(getattr(args.optim, "value", args.optim))
        if name in OPTIONS:
            parse_optim_args(name, args.optim_args)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        """Attach to the optimizer; go on from its groups after a resume, begin anew otherwise."""
        self._optimizer, self._phase, self._cycle = None, None, None
        self._losses, self._used = [], {}
        inner = unwrap_optimizer(optimizer)
        if not isinstance(inner, (LCAM, NSF)):
            return
        name = "lcam" if isinstance(inner, LCAM) else "nsf"
        options: dict[str, Any] | None = None
        if args.optim == name and name in OPTIONS:
            options = parse_optim_args(name, args.optim_args)[1]
        check_same_options(inner, options or {})
        # With accumulation the end of an epoch is seen too, as a window that may be shorter.
        by_epochs = isinstance(inner, LCAM) and (
            (options or {}).get("loss_average", "epoch") == "epoch" or args.gradient_accumulation_steps > 1
        )
        check_same_length(state.max_steps, _length(kwargs.get("train_dataloader")), by_epochs)
        resumed = state.global_step > 0
        self._optimizer = inner
        self._resumed_in_epoch = resumed and not float(state.epoch or 0).is_integer()
        first = inner.param_groups[0]
        for group in inner.param_groups:
            group["processes"] = args.world_size
        if isinstance(inner, LCAM):
            if resumed and not first.get("loss_window"):
                logger.warning(
                    "The checkpoint has no optimizer state (save_only_model?): LCAM's momentum buffers are lost, and "
                    "it begins its loss mean anew in the high phase."
                )
            self._phase = LossPhase(inner, **(options or {}))
            if not resumed:
                self._phase.restart()
            for group in inner.param_groups:
                if not resumed or group["loss_window"] > args.gradient_accumulation_steps:
                    group.update(loss_window=0, loss_windows_average=-1)
        elif options is not None:  # an NSF made by the user without the string keeps the p that it was given
            known = resumed and first.get("p_cycle_step") is not None
            self._cycle = PCycle(inner, **cycle_arguments(options, state.max_steps))
            if resumed and not known:
                logger.warning(
                    "The checkpoint has no optimizer state (save_only_model?): NSF's moments are lost; p goes on from "
                    "the number of the step."
                )
            if not known:
                self._cycle.move_to(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Begin the mean anew, unless a resumed run is in the middle of its epoch."""
        if self._phase is not None and not self._resumed_in_epoch:
            self._phase.start_epoch()
        self._resumed_in_epoch = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Note what this step uses, for the log."""
        if self._optimizer is None:
            return
        first = self._optimizer.param_groups[0]
        if self._phase is None:
            self._used = {"nsf_p": float(first["p"])}
        else:
            self._used = {"lcam_momentum": float(first["momentum"]), "lcam_loss_phase": first["loss_phase"]}
            if first["loss_mean"] != 0.0:
                self._used["lcam_loss_mean"] = first["loss_mean"]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        """Decide the next update's momentum or p. Runs on every process after each step, skipped ones included."""
        if self._optimizer is None:
            return
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        if self._cycle is not None and not skipped:
            self._cycle.step()
        if self._phase is None:
            return
        losses, self._losses = self._losses, []
        if not losses:
            if not self._warned:
                logger.warning(
                    "LCAM saw no training loss, so its momentum stays as it is: this Trainer does not call its "
                    "training_step. Drive it yourself with hf_nsf.LossPhase, or use another optimizer."
                )
                self._warned = True
            return
        comparable = self._comparable(len(losses))
        self._phase.step(torch.stack(losses).sum(), skipped=skipped or not comparable)

    def _comparable(self, micro_batches: int) -> bool:
        """Whether the loss of an update of that many micro-batches may be compared with the others."""
        assert self._phase is not None
        groups = self._optimizer.param_groups
        usual = max(micro_batches, groups[0]["loss_window"])
        for group in groups:
            group["loss_window"] = usual
        if micro_batches == usual:
            return True
        if groups[0]["loss_windows_average"] < 0:
            answer = self.windows_average() if self.windows_average is not None else False
            agreed = self._phase._mean_over_processes(math.nan if answer is None else float(answer))
            if math.isnan(agreed):
                return False
            for group in groups:
                group["loss_windows_average"] = int(agreed == 1.0)
        return groups[0]["loss_windows_average"] == 1

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Add the values used to the log of a training loss, before trackers see it."""
        if self._used and logs is not None and "loss" in logs:
            logs.update(self._used)
            # The Trainer has already copied `logs` to its history.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._used)
