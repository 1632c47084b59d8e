# SPDX-License-Identifier: Apache-2.0
"""LCAM's decision: is the training loss below or above its running mean (arXiv 2309.02130)?"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.lcam import phase_momentum
from ..optim.validation import as_float, check_choice, check_decay

LOSS_AVERAGES = ("epoch", "ema")
DEFAULT_EMA_DECAY = 0.98


class LossPhase:
    """Chooses the momentum of the next update of an :class:`hf_nsf.LCAM` from the loss of the last one.

    `phase_t = low if L_t < A_t else high` (strict), A_t being the mean of the losses of the epoch up to and including
    L_t, in float64; `mu_{t+1}` is that phase's momentum. `loss_average="ema"` is ours: an exponential moving average
    `A_t = decay A_{t-1} + (1 - decay) L_t`, `A_1 = L_1`, which runs on through epochs, for runs of one to three epochs
    in which a falling loss lies below an epoch's mean nearly always.

    All state stands in every parameter group (`loss_sum`, `loss_count`, `loss_mean`, `loss_phase`, `momentum`), so that
    the optimizer's state dict holds it.

    Args:
        optimizer: an LCAM, or any optimizer whose groups have `low_loss_momentum` and `high_loss_momentum`.
        loss_average: "epoch" (the paper) or "ema".
        loss_ema_decay: in [0, 1), only with "ema"; None means 0.98, a memory of about 50 updates.
        reduce: average the loss over all processes before deciding. All must then call `step` equally often.

    Raises:
        ValueError: a value is out of its range, or the optimizer has no pair of momenta.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss_average: str = "epoch",
        loss_ema_decay: float | None = None,
        reduce: bool = True,
    ) -> None:
        check_choice("loss_average", loss_average, LOSS_AVERAGES)
        if loss_ema_decay is not None:
            if loss_average != "ema":
                raise ValueError(
                    f"Invalid loss_ema_decay: loss_ema_decay={loss_ema_decay!r} is allowed only with loss_average=ema, "
                    f"got loss_average={loss_average}."
                )
            check_decay("loss_ema_decay", loss_ema_decay)
        if not all("low_loss_momentum" in group for group in optimizer.param_groups):
            raise ValueError(f"LossPhase needs an LCAM optimizer, got {type(optimizer).__name__}.")
        self.optimizer = optimizer
        self.loss_average = loss_average
        self.loss_ema_decay = DEFAULT_EMA_DECAY if loss_ema_decay is None else loss_ema_decay
        self.reduce = reduce
        for group in optimizer.param_groups:
            group.setdefault("loss_sum", 0.0)
            group.setdefault("loss_count", 0)
            group.setdefault("loss_mean", 0.0)
            group.setdefault("loss_phase", 0)

    def start_epoch(self) -> None:
        """Begin the epoch's mean anew; momentum and phase stay, and so does a moving average."""
        if self.loss_average == "epoch":
            self._write(loss_sum=0.0, loss_count=0)

    def restart(self) -> None:
        """Forget all losses and start in the high phase, as a new training does."""
        self._write(loss_sum=0.0, loss_count=0, loss_mean=0.0, loss_phase=0)
        for group in self.optimizer.param_groups:
            group["momentum"] = phase_momentum(group, low=False)

    def step(self, loss: float | Tensor, skipped: bool = False) -> None:
        """Take the loss of the update just made and set the momentum of the next one.

        Args:
            loss: the update's mean training loss on this process, a number or a one-element tensor.
            skipped: the update did not happen (fp16 overflow) or its loss is not comparable: it takes no part.
                Where losses are averaged over processes, one that skips is enough for all to take none.
        """
        if skipped:
            loss = math.nan
        value = self._mean_over_processes(loss) if self.reduce else as_float("loss", loss)
        if not math.isfinite(value):
            return
        first = self.optimizer.param_groups[0]
        count = first["loss_count"] + 1
        if self.loss_average == "epoch":
            total = first["loss_sum"] + value
            mean = total / count
        else:
            decay = self.loss_ema_decay
            mean = value if count == 1 else decay * first["loss_mean"] + (1 - decay) * value
            total = mean
        low = value < mean
        self._write(loss_sum=total, loss_count=count, loss_mean=mean, loss_phase=int(low))
        for group in self.optimizer.param_groups:
            group["momentum"] = phase_momentum(group, low)

    def _write(self, **state: float) -> None:
        # Looked up each time and never kept: accelerate replaces the groups when it prepares an optimizer.
        for group in self.optimizer.param_groups:
            group.update(state)

    @staticmethod
    def _mean_over_processes(loss: float | Tensor) -> float:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return as_float("loss", loss)
        from accelerate import PartialState
        from accelerate.utils import reduce

        local = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss)
        local = local.to(PartialState().device, torch.float32).reshape(()).clone()
        world = distributed.get_world_size()
        if PartialState().num_processes == world:
            return reduce(local, "mean").item()
        # accelerate takes DeepSpeed's processes on a CPU for single ones and would leave each with its own loss.
        distributed.all_reduce(local)
        return local.item() / world
