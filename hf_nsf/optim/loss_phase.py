# SPDX-License-Identifier: Apache-2.0
"""LCAM's decision: is the training loss below or above its running mean (arXiv 2309.02130)?"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import as_float


def phase_momentum(group: dict[str, Any], low: bool) -> float:
    """Momentum of a parameter group in the low (`low=True`) or the high loss phase.

    torch's SGD leaves the buffer alone at momentum 0, so that a later step with momentum would add a stale one. Where
    the group's other momentum is not 0, the smallest normal float stands for 0: `mu * buf + g` is then `g` exactly.
    """
    mu, other = group["low_loss_momentum"], group["high_loss_momentum"]
    if not low:
        mu, other = other, mu
    return sys.float_info.min if mu == 0 and other != 0 else mu


class LossPhase:
    """Chooses the momentum of the next update of an :class:`hf_nsf.LCAM` from the loss of the last one.

    `phase_t = low if L_t < A_t else high` (strict), A_t being the mean of the losses of the epoch up to and including
    L_t; `mu_{t+1}` is that phase's momentum. With `loss_average="ema"`, which is ours, the mean is
    `A_t = A_{t-1} + (1 - loss_ema_decay) (L_t - A_{t-1})`, `A_1 = L_1`, and runs on through epochs: in a run of one to
    three epochs, a falling loss is below the mean of its epoch nearly always.

    `loss_average` and `loss_ema_decay` are options of LCAM. All state stands in its parameter groups (`loss_count`,
    `loss_mean`, `loss_phase`, `momentum`), so the optimizer's state dict holds it.

    Args:
        optimizer: an LCAM.
        reduce: average the loss over all ranks before deciding. All must then call `step` equally often.

    Raises:
        ValueError: the optimizer is no LCAM.
    """

    def __init__(self, optimizer: Optimizer, reduce: bool = True) -> None:
        if not all("low_loss_momentum" in group for group in optimizer.param_groups):
            raise ValueError(f"LossPhase needs an LCAM optimizer, got {type(optimizer).__name__}.")
        self.optimizer = optimizer
        self.reduce = reduce

    def start_epoch(self) -> None:
        """Start the epoch's mean anew; momentum and phase stay, and so does a moving average."""
        for group in self.optimizer.param_groups:
            if group["loss_average"] == "epoch":
                group["loss_count"] = 0

    def restart(self) -> None:
        """Forget all losses and start in the high phase, as a new training does."""
        for group in self.optimizer.param_groups:
            group.update(loss_count=0, loss_mean=0.0, loss_phase=0, momentum=phase_momentum(group, low=False))

    def step(self, loss: float | Tensor, skipped: bool = False) -> None:
        """Take the loss of the update just made and set the momentum of the next one.

        Args:
            loss: the update's mean training loss on this rank, a number or a one-element tensor.
            skipped: the update did not happen (fp16 overflow) or its loss is not comparable: it takes no part. If the
                loss is averaged over ranks, one that skips is enough for all to take none.
        """
        starts = self.optimizer.param_groups[0]["loss_count"] == 0
        if self.reduce:
            value, starts = _mean_over_ranks(math.nan if skipped else as_float("loss", loss), starts)
        else:
            value = as_float("loss", loss)
        if starts:  # on one rank at least: the passes of streams that ranks read for themselves differ in length
            self.start_epoch()
        if skipped or not math.isfinite(value):
            return
        for group in self.optimizer.param_groups:  # looked up each time: accelerate replaces the groups
            count = group["loss_count"] + 1
            ema = group["loss_average"] == "ema"
            # Welford's form of the mean: rounding cannot put the mean of equal losses beside them.
            share = 1 - group["loss_ema_decay"] if ema and count > 1 else 1 / count
            previous = group["loss_mean"] if count > 1 else value
            mean = previous + share * (value - previous)
            low = value < mean
            group.update(loss_count=count, loss_mean=mean, loss_phase=int(low), momentum=phase_momentum(group, low))


def _mean_over_ranks(loss: float, starts: bool) -> tuple[float, bool]:
    """The mean of a loss, and whether a mean of losses starts on any rank; one collective."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return loss, starts
    from accelerate import PartialState
    from accelerate.utils import reduce

    local = torch.tensor([loss, starts], dtype=torch.float32, device=PartialState().device)
    world_size = distributed.get_world_size()
    if PartialState().num_processes == world_size:
        local = reduce(local, "mean")
    else:  # accelerate counts one process where DeepSpeed runs several on a CPU
        distributed.all_reduce(local)
        local /= world_size
    value, share = local.tolist()
    return value, share > 0
