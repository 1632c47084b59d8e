# SPDX-License-Identifier: Apache-2.0
"""LCAM's decision: is the training loss below or above its running mean (arXiv 2309.02130)?"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import as_float


def phase_momentum(group: dict[str, Any], low: bool) -> float:
    """Momentum of a parameter group in the low (`low=True`) or the high loss phase.

    torch's SGD does not update the buffer at momentum 0, so a later step with momentum would add a stale one. If the
    group's other momentum is not 0, the smallest normal float replaces 0: `mu * buf + g` is then exactly `g`.
    """
    mu, other = group["low_loss_momentum"], group["high_loss_momentum"]
    if not low:
        mu, other = other, mu
    return sys.float_info.min if mu == 0 and other != 0 else mu


class LossPhase:
    """Selects the momentum of the next update of an :class:`hf_nsf.LCAM` from the loss of the last one.

    `phase_t = low if L_t < A_t else high` (strict), where A_t is the mean of the epoch's losses up to and including
    L_t; `mu_{t+1}` is that phase's momentum. With `loss_average="ema"`, which is ours, the mean is
    `A_t = A_{t-1} + (1 - loss_ema_decay) (L_t - A_{t-1})`, `A_1 = L_1`, and epochs do not reset it: in a run of one to
    three epochs, a falling loss is nearly always below the mean of its epoch.

    All state is in the optimizer's parameter groups (`loss_count`, `loss_mean`, `loss_phase`, `momentum`), and so in
    its state dict.

    Args:
        optimizer: an LCAM.
        reduce: average the loss over all ranks before deciding. All ranks must then call `step` equally often.

    Raises:
        ValueError: the optimizer is not an LCAM.
    """

    def __init__(self, optimizer: Optimizer, reduce: bool = True) -> None:
        if not all("low_loss_momentum" in group for group in optimizer.param_groups):
            raise ValueError(f"LossPhase needs an LCAM optimizer, got {type(optimizer).__name__}.")
        self.optimizer = optimizer
        self.reduce = reduce
        self._warned = False

    def start_epoch(self) -> None:
        """Reset the epoch's mean; momentum and phase stay, and so does a moving average."""
        for group in self.optimizer.param_groups:
            if group["loss_average"] == "epoch":
                group["loss_count"] = 0

    def restart(self) -> None:
        """Forget all losses and start in the high phase, as a new training does."""
        for group in self.optimizer.param_groups:
            group.update(loss_count=0, loss_mean=0.0, loss_phase=0, momentum=phase_momentum(group, low=False))

    def step(self, loss: float | Tensor, skipped: bool = False) -> None:
        """Set the momentum of the next update from the loss of this one. Call it after the optimizer's step.

        Args:
            loss: the update's mean training loss on this rank, a number or a one-element tensor.
            skipped: ignore this loss: the update was skipped (fp16 overflow), or the loss is not comparable. If the
                loss is averaged over ranks, it is ignored on all ranks as soon as one skips it.
        """
        self._warn_of_other_writers()
        value = math.nan if skipped else as_float("loss", loss)
        starts = self.optimizer.param_groups[0]["loss_count"] == 0
        if self.reduce:
            value, starts = _mean_over_ranks(value, starts, self._device(loss))
        if starts:  # on at least one rank: streams that ranks read for themselves differ in length
            self.start_epoch()
        if not math.isfinite(value):
            return
        for group in self.optimizer.param_groups:  # looked up each time: accelerate replaces the groups
            count = group["loss_count"] + 1
            ema = group["loss_average"] == "ema"
            # Welford's form: the mean of equal losses is exactly their value.
            share = 1 - group["loss_ema_decay"] if ema and count > 1 else 1 / count
            previous = group["loss_mean"] if count > 1 else value
            mean = previous + share * (value - previous)
            low = value < mean
            group.update(loss_count=count, loss_mean=mean, loss_phase=int(low), momentum=phase_momentum(group, low))

    def _warn_of_other_writers(self) -> None:
        """Warn once if the momentum is not the one of the last decision."""
        groups = self.optimizer.param_groups
        if self._warned or all(group["momentum"] == phase_momentum(group, group["loss_phase"]) for group in groups):
            return
        self._warned = True
        warnings.warn(
            "LCAM's momentum, or one that it chooses from, was changed since its last decision, and the last writer "
            "wins: OneCycleLR and CyclicLR (unless cycle_momentum=False) and fastai's fit_one_cycle write the momentum "
            "at every step.",
            stacklevel=3,
        )

    def _device(self, loss: Any) -> torch.device:
        """The parameters' device; the loss's if they are on a CPU (offloaded), as NCCL reduces no CPU tensors."""
        params = (param for group in self.optimizer.param_groups for param in group["params"])
        device = next((param.device for param in params), torch.device("cpu"))  # ZeRO 3 empties the groups
        return loss.device if device.type == "cpu" and isinstance(loss, Tensor) else device


def _mean_over_ranks(loss: float, starts: bool, device: torch.device) -> tuple[float, bool]:
    """The mean of a loss, and whether a mean of losses starts on any rank; one collective."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return loss, starts
    both = torch.tensor([loss, starts], dtype=torch.float32, device=device)
    distributed.all_reduce(both)
    value, share = (both / distributed.get_world_size()).tolist()
    return value, share > 0
