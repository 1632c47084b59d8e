# SPDX-License-Identifier: Apache-2.0
"""LCAM, loss-controlled asymmetric momentum (arXiv 2309.02130): torch's SGD with two momenta."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import SGD

from .checks import as_float, check_at_least_zero, check_choice, check_flag, check_paths, check_unit_interval
from .loss_phase import phase_momentum
from .state_dict import load_state

LOSS_AVERAGES = ("epoch", "ema")
DEFAULT_EMA_DECAY = 0.98
_MOMENTA = ("low_loss_momentum", "high_loss_momentum")


class LCAM(SGD):
    r"""SGD with momentum, where the phase of the training loss selects one of two momenta.

    `buf <- mu_t buf + (g + lambda theta)`, `theta <- theta - eta buf`. Only `mu_t` changes between updates:
    :class:`hf_nsf.LossPhase` (under the Trainer, its callback) writes it to `group["momentum"]`. The step is that of
    :class:`torch.optim.SGD`, with torch's limits: `fused=True` is wrong or fails on a CPU with bfloat16, gaps in memory
    or parameters that get their first gradient late; `foreach=True` with nesterov may add to gradients in place. The
    method is that of arXiv 2309.02130.

    Momentum is undamped: in the steady state 0.95 takes steps twice as long as 0.9.

    Args:
        params: parameters, named parameters or parameter groups (each may set every option below).
        lr: learning rate eta, a number or a one-element tensor.
        low_loss_momentum: momentum after a loss below its mean, in [0, 1).
        high_loss_momentum: momentum after a loss at or above its mean, and for the first update.
        weight_decay: L2 coefficient lambda, added to the gradient.
        nesterov: use Nesterov momentum.
        loss_average: the mean that a loss is compared with: "epoch" (the paper) or "ema", a moving average.
        loss_ema_decay: in [0, 1), only with "ema"; default 0.98, a memory of about 50 updates.
        maximize: ascend instead of descend.
        foreach: as in torch's SGD.
        fused: as in torch's SGD.

    Raises:
        ValueError: an option is out of range, or options exclude each other; the message shows the value.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        low_loss_momentum: float = 0.9,
        high_loss_momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        loss_average: str = "epoch",
        loss_ema_decay: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "lr": lr,
            "low_loss_momentum": low_loss_momentum,
            "high_loss_momentum": high_loss_momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "loss_average": loss_average,
            "loss_ema_decay": loss_ema_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "dampening": 0,
            "differentiable": False,
        }
        # Skip SGD's constructor: with fused=True it would make GradScaler leave the skipping of overflowed steps to the
        # kernel, where neither accelerate nor LossPhase can see it.
        super(SGD, self).__init__(params, _checked(options))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the same checks as the constructor's. It joins the phase of the first group."""
        if isinstance(param_group, dict):
            decay = {"loss_ema_decay": None} if "loss_average" in param_group else {}
            param_group = _checked({**self.defaults, **decay, **param_group})
            first = (getattr(self, "param_groups", None) or [param_group])[0]
            if first["loss_average"] == param_group["loss_average"]:  # one phase for all groups
                phase = {name: first[name] for name in ("loss_count", "loss_mean", "loss_phase")}
                param_group.update(phase, momentum=phase_momentum(param_group, phase["loss_phase"]))
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state.

        Args:
            state_dict: a dict returned by `state_dict()`.

        Raises:
            ValueError: the state of another optimizer, or of parameters of another number or shape.
        """
        load_state(self, state_dict, "low_loss_momentum", ("momentum_buffer",), super().load_state_dict, False)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Validate the options of a group; return them as plain scalars, with the state of its loss phase."""
    checked = dict(options)
    lr = check_at_least_zero("lr", options["lr"])
    checked["lr"] = options["lr"] if isinstance(options["lr"], Tensor) else lr  # a scheduler may write to the tensor
    checked["weight_decay"] = check_at_least_zero("weight_decay", options["weight_decay"])
    for name in _MOMENTA:
        checked[name] = check_unit_interval(name, options[name])
    checked["dampening"] = as_float("dampening", options["dampening"])
    for name in ("nesterov", "maximize"):
        check_flag(name, options[name])
    if options["nesterov"] and not (all(checked[name] for name in _MOMENTA) and checked["dampening"] == 0):
        shown = {name: checked[name] for name in (*_MOMENTA, "dampening")}
        raise ValueError(f"Invalid nesterov: nesterov=True needs both momenta > 0 and no dampening, got {shown}.")
    check_choice("loss_average", options["loss_average"], LOSS_AVERAGES)
    decay = options["loss_ema_decay"]
    if options["loss_average"] == "ema":
        checked["loss_ema_decay"] = check_unit_interval("loss_ema_decay", DEFAULT_EMA_DECAY if decay is None else decay)
    elif decay is not None:
        raise ValueError(
            f"Invalid loss_ema_decay: loss_ema_decay={decay!r} is allowed only with loss_average=ema, got "
            f"loss_average={options['loss_average']}."
        )
    check_paths(options["foreach"], options["fused"], None)
    # Present from the start: FSDP2 and torch.distributed.checkpoint fill in existing entries and add none.
    checked.update(loss_count=0, loss_mean=0.0, loss_phase=0, momentum=phase_momentum(checked, low=False))
    return checked
