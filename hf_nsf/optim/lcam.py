# SPDX-License-Identifier: Apache-2.0
"""LCAM, loss-controlled asymmetric momentum (arXiv 2309.02130): torch's SGD with two momenta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.sgd import sgd

from .checks import as_float, check_at_least_zero, check_choice, check_flag, check_paths, check_unit_interval
from .dtensor import grad_shards, is_sharded, to_local
from .kahan import LOW_PRECISION, kahan_round, kahan_value
from .loss_phase import phase_momentum
from .pieces import chunk_by_numel, same_dense_layout
from .state_dict import load_state

LOSS_AVERAGES = ("epoch", "ema")
DEFAULT_EMA_DECAY = 0.98
PIECE = 1 << 17  # elements; on a CPU the pieces of a step with Kahan sums stay in cache
_PAIR = ("low_loss_momentum", "high_loss_momentum")


class LCAM(SGD):
    r"""SGD with momentum, where the phase of the training loss chooses one of two momenta.

    `buf <- mu_t buf + (g + lambda theta)`, `theta <- theta - eta buf`. Only `mu_t` changes between updates:
    :class:`hf_nsf.LossPhase` (under the Trainer, its callback) writes it to `group["momentum"]`. With equal momenta
    this is :class:`torch.optim.SGD` bit for bit with the same `foreach` and `fused`, but for `kahan_sum`, which is
    ours. The method is that of arXiv 2309.02130.

    Momentum is undamped: in the steady state 0.95 takes steps twice as long as 0.9.

    Args:
        params: parameters, named parameters or parameter groups (each may set every option below).
        lr: learning rate eta, a number or a one-element tensor.
        low_loss_momentum: momentum after an update whose loss was below its mean, in [0, 1).
        high_loss_momentum: momentum after an update whose loss was not; also that of the first update.
        weight_decay: L2 coefficient lambda, added to the gradient.
        nesterov: use Nesterov's momentum.
        loss_average: the mean that a loss is compared with: "epoch" (the paper) or "ema", a moving average.
        loss_ema_decay: in [0, 1), only with "ema"; default 0.98, a memory of about 50 updates.
        maximize: ascend instead of descend.
        foreach: as in torch's SGD.
        fused: as in torch's SGD.
        kahan_sum: for bfloat16 and float16 parameters, keep the buffer in float32 and what rounding drops of the
            parameter in a state of its dtype, and add it at the next step. None means True unless `fused=True`; False
            is torch's SGD. Other dtypes need none and get none.

    Raises:
        ValueError: an option is out of its range, or options exclude each other; the message shows the value.
        RuntimeError: at `step()`, for `fused=True` where torch's fused SGD is wrong or fails: with sharded parameters,
            and on the CPU with low precision, sparse gradients, gaps in memory or layouts that differ.
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
        kahan_sum: bool | None = None,
    ) -> None:
        of_sgd: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        of_sgd |= {"dampening": 0, "differentiable": False, "foreach": foreach, "fused": fused}
        pair = dict(zip(_PAIR, (low_loss_momentum, high_loss_momentum), strict=True))
        ours = {"loss_average": loss_average, "loss_ema_decay": loss_ema_decay, "kahan_sum": kahan_sum}
        # Not SGD's constructor: it knows nothing of the pair, and with fused=True it would have torch's GradScaler
        # leave the skipping of an overflowed step to the kernel, where nobody can see it.
        super(SGD, self).__init__(params, _checked({**of_sgd, **pair, **ours}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own options are checked as the constructor's are. It starts in the high phase."""
        if isinstance(param_group, dict):
            decay = {"loss_ema_decay": None} if "loss_average" in param_group else {}
            param_group = _checked({**self.defaults, **decay, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; with Kahan sums, buffers of bfloat16 and float16 parameters stay in float32.

        Args:
            state_dict: what `state_dict()` has returned.

        Raises:
            ValueError: it is the state of another optimizer, or of parameters of other numbers or shapes.
        """
        load_state(self, state_dict, "low_loss_momentum", ("momentum_buffer",), super().load_state_dict)

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
            params = [q for q in group["params"] if q.grad is not None]
            if group["fused"]:
                for param in params:
                    _check_fused(param, self.state[param].get("momentum_buffer") if param in self.state else None)
            elif group["kahan_sum"] is not False:
                low = [q for q in params if q.dtype in LOW_PRECISION]
                if low:
                    params = [q for q in params if q.dtype not in LOW_PRECISION]
                    self._kahan_step(low, group)
            if params:
                self._torch_step(params, group)
        return loss

    def _torch_step(self, params: list[Any], group: dict[str, Any]) -> None:
        """Make the step of torch's SGD."""
        mu, grads, foreach, fused = group["momentum"], [q.grad for q in params], group["foreach"], group["fused"]
        states = [self.state[q] for q in params] if mu != 0 else []
        for state in states:
            state.pop("kahan_comp", None)  # it would be stale once Kahan sums go on
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
        options = {name: group[name] for name in ("weight_decay", "dampening", "nesterov", "maximize")}
        options["lr"] = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        sparse = any(g.is_sparse for g in grads)
        sgd(params, grads, bufs, has_sparse_grad=sparse, foreach=foreach, fused=fused, momentum=mu, **options)
        if fused:
            torch.autograd.graph.increment_version(params)  # torch's kernel tells autograd nothing
        if any(first):
            for state, buf in zip(states, bufs, strict=True):
                state["momentum_buffer"] = buf

    def _kahan_step(self, params: list[Any], group: dict[str, Any]) -> None:
        """SGD's step in float32 for parameters in bfloat16 or float16, in pieces of bounded size."""
        mu, lr, decay, dampening = group["momentum"], group["lr"], group["weight_decay"], group["dampening"]
        lr = lr.item() if isinstance(lr, Tensor) else lr
        rows: dict[tuple[Any, ...], list[Any]] = {}
        dtensors = [q for q in params if is_sharded(q)]
        shards = grad_shards(dtensors)
        for param in params:
            state, buf, is_first = self.state[param], None, False
            comp = state.get("kahan_comp")
            if comp is None or comp.dtype is not param.dtype:  # model.to(dtype) has changed it
                state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if mu != 0:
                buf = state.get("momentum_buffer")
                is_first = buf is None
                # A buffer of kahan_sum=False is of the parameter's dtype.
                buf = torch.zeros_like(param, dtype=torch.float32) if is_first else buf.to(torch.float32)
                state["momentum_buffer"] = buf
            grad = next(shards) if is_sharded(param) else param.grad
            row = (param, grad, state["kahan_comp"], *([] if buf is None else [buf]))
            rows.setdefault((param.dtype, param.device, is_first), []).append(tuple(map(to_local, row)))
        for (*_, is_first), some in rows.items():
            for _, pieces in chunk_by_numel(some, None if group["foreach"] is False else PIECE):
                theta, grads, comps, *bufs = map(list, zip(*pieces, strict=True))
                values = kahan_value(theta, comps, torch.float32)
                g = [grad.to(torch.float32) for grad in grads]
                if group["maximize"]:
                    torch._foreach_neg_(g)
                if decay != 0:
                    torch._foreach_add_(g, values, alpha=decay)
                for buf in bufs:
                    torch._foreach_mul_(buf, mu)
                    torch._foreach_add_(buf, g, alpha=1 if is_first else 1 - dampening)
                    if group["nesterov"]:
                        torch._foreach_add_(g, buf, alpha=mu)
                    else:
                        g = buf
                torch._foreach_add_(values, g, alpha=-lr)
                kahan_round(theta, comps, values)
        if dtensors:
            torch.autograd.graph.increment_version(dtensors)  # their shards have versions of their own


def _check_fused(param: Any, buf: Tensor | None) -> None:
    """Refuse fused=True for a parameter that torch's fused SGD steps wrongly, without an error, or fails at."""
    if is_sharded(param):
        raise RuntimeError(
            "Invalid fused: fused=True with a sharded parameter (DTensor), which torch's fused SGD does not take, "
            "alone or beside whole ones; allowed: fused=None or False."
        )
    if param.device.type != "cpu":
        return
    full = param.dtype in (torch.float32, torch.float64)  # with torch 2.13 steps in bfloat16 are off by more than 1
    grad = param.grad
    dense = not grad.is_sparse and grad.dtype == param.dtype and (buf is None or buf.dtype == param.dtype)
    if not (full and dense and same_dense_layout(param, grad, *([] if buf is None else [buf]))):
        raise RuntimeError(
            f"Invalid fused: fused=True with a {param.dtype} parameter of shape {tuple(param.shape)} on the CPU; "
            "torch's fused SGD is right there for float32 and float64 whose gradient and buffer are dense, laid out "
            "alike and without gaps in memory; allowed: fused=None or False."
        )


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Validate the options of a group; return them as plain scalars, with the state of its loss phase."""
    checked = dict(options)
    check_at_least_zero("lr", options["lr"])
    if not isinstance(options["lr"], Tensor):
        checked["lr"] = as_float("lr", options["lr"])
    checked["weight_decay"] = check_at_least_zero("weight_decay", options["weight_decay"])
    for name in _PAIR:
        checked[name] = check_unit_interval(name, options[name])
    checked["dampening"] = as_float("dampening", options["dampening"])
    for name in ("nesterov", "maximize"):
        check_flag(name, options[name])
    if options["nesterov"] and not (all(checked[name] for name in _PAIR) and checked["dampening"] == 0):
        shown = {name: checked[name] for name in (*_PAIR, "dampening")}
        raise ValueError(f"Invalid nesterov: nesterov=True needs both momenta > 0 and no dampening, got {shown}.")
    check_choice("loss_average", options["loss_average"], LOSS_AVERAGES)
    if options["loss_average"] == "ema":
        decay = options["loss_ema_decay"]
        checked["loss_ema_decay"] = check_unit_interval("loss_ema_decay", DEFAULT_EMA_DECAY if decay is None else decay)
    elif options["loss_ema_decay"] is not None:
        raise ValueError(
            f"Invalid loss_ema_decay: loss_ema_decay={options['loss_ema_decay']!r} is allowed only with "
            f"loss_average=ema, got loss_average={options['loss_average']}."
        )
    check_paths(options["foreach"], options["fused"], options["kahan_sum"])
    if options["kahan_sum"] and options["fused"]:
        raise ValueError("Invalid kahan_sum and fused: kahan_sum=True, fused=True; at most one of the two may be True.")
    # Here from the beginning: FSDP2 and torch.distributed.checkpoint fill in the entries that they find, and add none.
    checked.update(loss_count=0, loss_mean=0.0, loss_phase=0, momentum=phase_momentum(checked, low=False))
    return checked
