# SPDX-License-Identifier: Apache-2.0
"""LCAM, loss-controlled asymmetric momentum (arXiv 2309.02130): torch's SGD whose momentum is written from outside."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.sgd import sgd

from .layouts import walk_alike
from .low_precision import LOW_PRECISION, exact_value, restore_float32, round_into
from .shards import is_sharded
from .validation import check_at_least_zero, check_decay, check_shapes

# What hf_nsf.LossPhase and the Trainer's callback remember of a run. It stands in the groups from the beginning, since
# what loads a sharded state (FSDP2, torch.distributed.checkpoint) fills in the entries that it finds and adds none.
_RUN = {
    "loss_sum": 0.0,
    "loss_count": 0,
    "loss_mean": 0.0,
    "loss_phase": 0,
    "loss_window": 0,
    "loss_windows_average": -1,
    "processes": 0,
}


def _check_fused(param: Any) -> None:
    """Refuse `fused=True` for a parameter that memory cannot be walked through for, unless a GPU's kernel takes it."""
    if is_sharded(param):
        raise RuntimeError(
            "Invalid fused: fused=True with a sharded parameter (DTensor), which torch's fused SGD does not take, "
            "alone or beside whole ones; allowed: fused=None or False."
        )
    if param.device.type != "cpu":
        return
    if param.dtype in LOW_PRECISION:
        # Seen with torch 2.13: after five steps its fused SGD was off by more than 1 from the others.
        raise RuntimeError(
            f"Invalid fused: fused=True with a {param.dtype} parameter on the CPU, where torch's fused SGD is "
            "wrong; allowed: fused=None or False."
        )
    raise RuntimeError(
        f"Invalid fused: fused=True with a {param.dtype} parameter of shape {tuple(param.shape)} on the CPU; torch's "
        "fused SGD is right there for float32 and float64 whose gradient and buffer are dense, laid out alike and "
        "without gaps in memory; allowed: fused=None or False."
    )


def phase_momentum(group: dict[str, Any], low: bool) -> float:
    """Momentum of a parameter group in the low (`low=True`) or the high loss phase.

    torch's SGD leaves the buffer alone at momentum 0, so that a later step with momentum would add a stale one. Where
    the group's other momentum is not 0, the smallest normal float stands for 0: `mu * buf + g` is then `g` exactly.
    """
    mu, other = group["low_loss_momentum"], group["high_loss_momentum"]
    if not low:
        mu, other = other, mu
    return sys.float_info.min if mu == 0 and other != 0 else mu


class LCAM(SGD):
    r"""SGD with momentum, where each group's momentum is one of two values chosen by the phase of the training loss.

    `buf <- mu_t buf + (g + lambda theta)`, `theta <- theta - eta buf`; only `mu_t` changes between updates, and whoever
    follows the loss (:class:`hf_nsf.LossPhase`, or the Trainer's callback) writes it to `group["momentum"]`. With equal
    momenta this is :class:`torch.optim.SGD` bit for bit on each of its paths, but for `kahan`, which is ours. The path
    of no option is the fastest that is right, which on a CPU is another one than SGD's (see `fused`). The method is
    that of arXiv 2309.02130; we do not deviate from it.

    Momentum is undamped: in the steady state 0.95 takes steps twice as long as 0.9.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate eta, a float or a one-element tensor.
        low_loss_momentum: momentum after an update whose loss was below its mean, in [0, 1).
        high_loss_momentum: momentum after an update whose loss was not; also that of the first update.
        weight_decay: L2 coefficient lambda, added to the gradient.
        nesterov: use Nesterov's momentum.
        maximize: ascend instead of descend.
        foreach: use torch's multi-tensor path; False with `fused=None` is torch's loop over single tensors; None lets
            torch choose where `fused` does not.
        fused: use torch's fused path. None (with `foreach=None`) means True for float32 and float64 parameters on the
            CPU whose gradients and buffers are laid out alike and without gaps, where it differs from torch's loop by
            rounding only and takes two thirds of its time; for others torch chooses. False (with `foreach=None`) is
            torch's loop, which on a CPU is the default of torch's SGD.
        kahan: for parameters in bfloat16 or float16, keep the buffer in float32 and, in a state of their dtype, what
            rounding drops of them, and add it again at the next step; torch's SGD loses steps that are small beside a
            parameter. None means True unless `fused=True`; False is torch's SGD. Other dtypes need none and get none.

    Raises:
        ValueError: a value is out of its range; the message shows it.
        RuntimeError: at `step()`, for `fused=True` where torch's fused SGD is wrong or fails: with sharded parameters,
            and on the CPU with lower precision, sparse gradients, gaps in memory or layouts that differ.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        low_loss_momentum: float = 0.9,
        high_loss_momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        kahan: bool | None = None,
    ) -> None:
        check_at_least_zero("lr", lr)
        check_at_least_zero("weight_decay", weight_decay)
        pair = {"low_loss_momentum": low_loss_momentum, "high_loss_momentum": high_loss_momentum}
        for name, value in pair.items():
            check_decay(name, value)
        if nesterov and 0 in pair.values():
            raise ValueError(f"Invalid nesterov: nesterov=True needs both momenta > 0, got {pair}.")
        if foreach and fused:
            raise ValueError("Invalid foreach and fused: foreach=True, fused=True; at most one of the two may be True.")
        super().__init__(
            params,
            lr=lr,
            momentum=high_loss_momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        # With fused=True torch's GradScaler would leave the skipping of an overflowed step to the kernel, where nobody
        # can see it and a first momentum buffer stays unwritten. Without this mark the scaler skips the step itself.
        self._step_supports_amp_scaling = False
        # SGD's constructor knows nothing of the pair, so its groups are completed here and later ones on arrival.
        self.defaults.update(pair, kahan=kahan)
        for group in self.param_groups:
            self._complete(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of torch.optim.SGD has one momentum and no pair
            group.setdefault("low_loss_momentum", group["momentum"])
            group.setdefault("high_loss_momentum", group["momentum"])
            group.setdefault("kahan", None)
            for name, value in _RUN.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a pair of momenta of its own. It starts in the high phase."""
        super().add_param_group(param_group)
        if "low_loss_momentum" in self.defaults:
            self._complete(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, one of torch's SGD too; unlike torch's, it keeps float32 buffers in float32.

        Args:
            state_dict: what `state_dict()` has returned.

        Raises:
            ValueError: it is the state of parameters of other numbers or shapes.
        """
        check_shapes(self, state_dict, "momentum_buffer")
        super().load_state_dict(state_dict)
        if any(group["kahan"] is not False and not group["fused"] for group in self.param_groups):
            restore_float32(self, state_dict, ("momentum_buffer",))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients stay as they are.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            low_precision, fused, others = self._split(group)
            for param in low_precision:
                self._step_low_precision(param, group)
            if fused:
                self._torch_step(fused, group, fused=True)
            if others:
                self._torch_step(others, group, fused=group["fused"])
        return loss

    def _split(self, group: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Deal the parameters with a gradient to our own step, torch's fused one, and torch's other ones."""
        low_precision: list[Any] = []
        fused: list[Any] = []
        others: list[Any] = []
        may_fuse = group["fused"] or (group["fused"] is None and group["foreach"] is None)
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if may_fuse and self._walks(param, grad):
                fused.append(param)
            elif group["fused"]:
                _check_fused(param)
                fused.append(param)
            elif group["kahan"] is not False and param.dtype in LOW_PRECISION:
                low_precision.append(param)
            else:
                others.append(param)
        return low_precision, fused, others

    def _walks(self, param: Any, grad: Any) -> bool:
        """Whether torch's fused SGD on the CPU is right for a parameter: it walks through memory and tests nothing."""
        buf = self.state[param].get("momentum_buffer") if param in self.state else None
        return walk_alike(param, grad) if buf is None else walk_alike(param, grad, buf)

    def _torch_step(self, params: list[Any], group: dict[str, Any], fused: bool | None) -> None:
        """Give some parameters of a group to torch's SGD, by its fused path or the one that it chooses or is told."""
        mu, grads, foreach = group["momentum"], [param.grad for param in params], None if fused else group["foreach"]
        states = [self.state[param] for param in params] if mu != 0 else []
        bufs = [state.get("momentum_buffer") for state in states]
        first = [buf is None for buf in bufs]
        if fused and any(first) and not all(first):
            # torch's fused step knows first gradients of all parameters only; of single ones, zeros give the same.
            bufs = [torch.zeros_like(g) if buf is None else buf for buf, g in zip(bufs, grads, strict=True)]
        if foreach is not False and torch.distributed.is_available() and torch.distributed.is_initialized():
            # torch's multi-tensor operations refuse a mix of DTensors and plain tensors; one at a time is the same.
            if len({is_sharded(param) for param in params}) == 2:
                foreach = False
        multi_tensor = not fused and (foreach or (foreach is None and any(g.device.type != "cpu" for g in grads)))
        if multi_tensor and group["nesterov"] and not (group["weight_decay"] or group["maximize"]):
            grads = [g.clone() for g in grads]  # torch adds to the gradients unless decay or maximize made copies
        sgd(
            params,
            grads,
            bufs,
            has_sparse_grad=any(g.is_sparse for g in grads),
            foreach=foreach,
            fused=fused,
            weight_decay=group["weight_decay"],
            momentum=mu,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if any(first):
            for state, buf in zip(states, bufs, strict=True):
                state["momentum_buffer"] = buf

    def _step_low_precision(self, param: Any, group: dict[str, Any]) -> None:
        """SGD's step in float32 for one parameter in bfloat16 or float16."""
        state, mu = self.state[param], group["momentum"]
        if "compensation" not in state:
            state["compensation"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        theta = exact_value(param, state["compensation"], torch.float32)
        g = param.grad.to(torch.float32)
        if group["maximize"]:
            g = -g
        if group["weight_decay"] != 0:
            g = g.add(theta, alpha=group["weight_decay"])
        if mu != 0:
            buf = state.get("momentum_buffer")
            # A buffer of torch's SGD, or of kahan=False, is of the parameter's dtype.
            buf = torch.clone(g) if buf is None else buf.to(torch.float32).mul_(mu).add_(g)
            state["momentum_buffer"] = buf
            g = g.add(buf, alpha=mu) if group["nesterov"] else buf
        round_into(param, state["compensation"], theta.sub_(g * group["lr"]))

    def _complete(self, group: dict[str, Any]) -> None:
        group.setdefault("kahan", self.defaults["kahan"])
        if group["kahan"] and group["fused"]:
            raise ValueError("Invalid kahan and fused: kahan=True, fused=True; at most one of the two may be True.")
        for name in ("low_loss_momentum", "high_loss_momentum"):
            group.setdefault(name, self.defaults[name])
            check_decay(name, group[name])
        for name, value in _RUN.items():
            group.setdefault(name, value)
        group["momentum"] = phase_momentum(group, low=False)
