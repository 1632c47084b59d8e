# SPDX-License-Identifier: Apache-2.0
"""NSF, natural spectral fusion (arXiv 2509.04713): AdamW whose second-moment exponent p cycles with the step.

The update is the authors' second-moment exponential scaling (arXiv 2405.18498). A neighbour is Padam
(arXiv 1806.06763), with p fixed in (0, 1/2].
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from . import nsf_update
from .checks import as_float, check_at_least_zero, check_choice, check_flag, check_paths, check_unit_interval
from .dtensor import grad_shards, is_sharded, sum_over_shards, to_local
from .kahan import LOW_PRECISION
from .nsf_update import KEPT, P_RANGE, Bucket, Scalars
from .p_cycle import CYCLE_OPTIONS, check_cycle, lacks_total, p_at, short_period
from .pieces import PLAIN, same_dense_layout
from .state_dict import load_state

logger = logging.getLogger(__name__)
GRAFTINGS = ("adam", "none")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATES = ("exp_avg", "exp_avg_sq")


class Halves(NamedTuple):
    """One implementation of the update: the functions of :mod:`hf_nsf.optim.nsf_update`."""

    first_half: Callable[..., Tensor]
    second_half: Callable[..., None]
    whole_step: Callable[..., None]


def _torch_adamw(buckets: list[Bucket]) -> None:
    """Make the step of torch's fused AdamW, for p = 1/2."""
    for b in buckets:
        s = b.scalars
        betas: dict[str, Any] = {"beta1": s.beta1, "beta2": s.beta2, "amsgrad": False, "fused": True}
        options: dict[str, Any] = {"lr": s.lr, "weight_decay": s.weight_decay, "eps": s.eps, "maximize": s.maximize}
        adamw(b.params, b.grads, b.exp_avgs, b.exp_avg_sqs, [], b.steps, **betas, **options)  # it counts, too


_FUNCTIONS: tuple[Any, Any, Any] = (nsf_update.first_half, nsf_update.second_half, nsf_update.whole_step)
_EAGER = Halves(*_FUNCTIONS)
_REFERENCE = Halves._make(functools.partial(function, numel=None) for function in _FUNCTIONS)
_TORCH = Halves(nsf_update.first_half, nsf_update.second_half, _torch_adamw)


@functools.cache
def kernels_for(device_type: str) -> Halves | None:
    """The kernels for a kind of device, or None where there are none."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    name = {"cuda": "gpu", "cpu": "gpu" if interpreted else "cpu"}.get(device_type)
    try:
        module = importlib.import_module(f"hf_nsf.optim.kernels.{name}") if name else None
        if module and module.available(device_type):
            return Halves(module.first_half, module.second_half, module.whole_step)
    except ModuleNotFoundError:
        pass
    except Exception as error:  # numba that does not fit numpy, for one
        logger.warning(f"The kernels for {device_type} cannot be used: {error!r}")
    return None


class NSF(Optimizer):
    r"""AdamW with an exponent p in place of the square root, which cycles with the number of updates.

    `m <- b1 m + (1-b1) g`, `v <- b2 v + (1-b2) g^2`, `m_hat = m/(1-b1^t)`, `v_hat = v/(1-b2^t)`; weight decay is
    decoupled. Then

    * `grafting="none"`, the formula of arXiv 2509.04713: `theta <- theta - eta m_hat / (v_hat^p + eps)`. The length of
      its step changes by orders of magnitude with p, so that each p needs a learning rate of its own.
    * `grafting="adam"`, our deviation and the default: with `d = sqrt(v_hat) + eps`, `a = m_hat / d` and
      `u = a d^(1-2p)`, `theta <- theta - eta u ||a|| / ||u||` for each parameter tensor: NSF's direction with the
      length of Adam's step (layer-wise grafting, arXiv 2002.11803), so that a learning rate that suits AdamW suits all
      p. The best p depends on the learning rate with and without it (arXiv 2609.30271, `examples/what_p_does.py`).

    p = 1/2 is Adam (low frequencies), p = 0 is SGD with an averaged momentum, p < 0 amplifies high frequencies. p is a
    function of the number of updates that a parameter has had and of its group's options; see
    :func:`hf_nsf.p_schedule`. A constant `p` in a group may be rewritten between steps.

    Args:
        params: parameters, named parameters or parameter groups (each may set every option below).
        lr: learning rate eta, a number or a one-element tensor.
        betas: (b1, b2), each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay lambda, >= 0.
        p: a constant exponent instead of a cycle.
        p_min: lowest exponent of the cycle, default 0.25.
        p_max: highest exponent, default 0.5; training begins there.
        cycle_steps: period in updates, default 100 if there is no `total_steps`; or
        cycles: number of cycles over `total_steps`, default 16 (fewer if a period had less than 8 updates).
        total_steps: number of updates of the whole training. Under the Trainer its callback sets it.
        cycle_shape: "cosine" (default), "triangular", "sawtooth" or "square".
        grafting: "adam" or "none".
        maximize: ascend instead of descend.
        foreach: True for eager lists of tensors, False for the reference, one tensor at a time.
        fused: True for kernels (CPU: numba, the extra `fused`; GPU: Triton), which take float32, bfloat16 and float16
            parameters for p in [-1/2, 1]; False for none. With `foreach=None` and `fused=None` kernels serve where they
            can, torch's fused AdamW at p = 1/2 on a CPU, and eager lists elsewhere.
        kahan_sum: keep what rounding drops from bfloat16 and float16 parameters in a state of their dtype and add it at
            the next step. None means True; other dtypes need none and get none.

    Moments are kept in at least float32, through `load_state_dict` too. The options of a loaded state replace the
    constructor's, as in torch.

    Raises:
        ValueError: an option is out of its range, or options exclude each other; the message shows the value.
        RuntimeError: at `step()`, for sparse gradients, and for `fused=True` where no kernel can hold.
    """

    _last_p: float | None = None
    _warned = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        p: float | None = None,
        p_min: float | None = None,
        p_max: float | None = None,
        cycle_steps: float | None = None,
        cycles: float | None = None,
        total_steps: float | None = None,
        cycle_shape: str | None = None,
        grafting: str = "adam",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        kahan_sum: bool | None = None,
    ) -> None:
        cycle = (p, p_min, p_max, cycle_steps, cycles, total_steps, cycle_shape)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "grafting": grafting}
        paths = {"maximize": maximize, "foreach": foreach, "fused": fused, "kahan_sum": kahan_sum}
        defaults = _checked({**defaults, **dict(zip(CYCLE_OPTIONS, cycle, strict=True)), **paths})
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own options are checked as the constructor's are."""
        if isinstance(param_group, dict):
            cycle = {name: param_group[name] for name in CYCLE_OPTIONS if param_group.get(name) is not None}
            options = {**self.defaults, **param_group}
            if "p" in cycle:  # the group's own constant, or cycle, replaces the constructor's
                options.update(dict.fromkeys(CYCLE_OPTIONS), **cycle)
            elif cycle:
                options["p"] = None
                for name, other in (("cycles", "cycle_steps"), ("cycle_steps", "cycles")):
                    if name in cycle and other not in cycle:
                        options[other] = None
            param_group = _checked(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                if not param.is_floating_point():
                    raise ValueError(
                        f"Invalid parameter of dtype {param.dtype}: NSF takes real floating-point parameters; "
                        "view complex ones with torch.view_as_real."
                    )
                if group["fused"]:
                    _check_fused(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for values in self.state.values():
            if isinstance(values, dict) and "step" in values:
                step = values["step"]  # a number in old states; on the GPU where a Trainer of several GPUs loads it
                values["step"] = step.to("cpu", torch.float32) if isinstance(step, Tensor) else _counter(step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the moments of bfloat16 and float16 parameters stay in float32.

        A parameter whose entry lacks a moment or the number of steps starts anew.

        Args:
            state_dict: what `state_dict()` has returned.

        Raises:
            ValueError: it is the state of another optimizer, or of parameters of other numbers or shapes.
        """
        load_state(self, state_dict, "grafting", _STATES, super().load_state_dict)

    @property
    def last_p(self) -> float:
        """Exponent of the last step of the first parameter group; before any, that of the first step."""
        return p_at(0, self.param_groups[0]) if self._last_p is None else self._last_p

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, each new p would compile it again
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. `torch.compile` leaves a step as it is (a graph break).

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._warn_of_short_periods()
        work, sharded = self._sort()
        # Only now, when nothing can be refused any more, does anything change.
        counters = [k for path, buckets in work.items() if path.halves is not _TORCH for b in buckets for k in b.steps]
        if counters:
            torch._foreach_add_(counters, torch.tensor(1.0, device="cpu"), alpha=1.0)
        sums: dict[Path, Tensor] = {}
        for path, buckets in work.items():
            halves = path.halves
            if not path.needs_norms:
                halves.whole_step(buckets)
            elif sharded:
                sums[path] = halves.first_half(buckets)
            else:
                for part in [[bucket] for bucket in buckets] if halves is _EAGER else [buckets]:
                    halves.second_half(part, halves.first_half(part))
        if sharded:
            _reduce(sharded, work, sums)
        for path, buckets in work.items():
            if path in sums:
                path.halves.second_half(buckets, sums[path])
            if path.halves not in (_EAGER, _REFERENCE):  # kernels tell autograd nothing
                torch.autograd.graph.increment_version([param for bucket in buckets for param in bucket.params])
        return loss

    def _warn_of_short_periods(self) -> None:
        if self._warned or any(lacks_total(group) for group in self.param_groups):
            return
        for group in self.param_groups:
            period = short_period(group)
            if period is not None:
                warnings.warn(
                    f"NSF's cycle of p has a period of {period:g} updates; below 4 it can hardly be a cycle. Lower "
                    "cycles or raise cycle_steps.",
                    stacklevel=6,  # beyond wrappers of torch
                )
                break
        self._warned = True

    def _sort(self) -> tuple[dict[Path, list[Bucket]], list[Sharded]]:
        """Deal the parameters to buckets, creating missing states.

        Returns:
            The buckets of each path, and for each DTensor whose sums are to be reduced its bucket and row there, if it
            has a gradient.
        """
        groups = self.param_groups
        if any(q.grad is not None and q.grad.is_sparse for group in groups for q in group["params"]):
            raise RuntimeError("NSF takes no sparse gradients; use torch.nn.Embedding(sparse=False).")
        dtensors = [q for group in groups for q in group["params"] if is_sharded(q) and q.grad is not None]
        shards = grad_shards(dtensors)
        work: dict[Path, list[Bucket]] = {}
        found: dict[tuple[Path, int, float], Bucket] = {}
        sharded: list[Sharded] = []
        for index, group in enumerate(groups):
            scalars: dict[float, Scalars] = {}
            reduces = group["grafting"] == "adam" and _item(group["p"]) != 0.5
            for q in group["params"]:
                is_shard = is_sharded(q)
                if q.grad is None:
                    if is_shard and reduces:
                        sharded.append((q, None, 0))
                    continue
                state = self._state_of(q, group)
                k = state["step"].item()
                s = scalars.get(k)
                if s is None:
                    s = scalars[k] = _scalars(k, group)
                param, m, v, comp = q, state["exp_avg"], state["exp_avg_sq"], state.get("kahan_comp")
                grad = next(shards) if is_shard else q.grad
                if is_shard:
                    param, m, v, comp = (to_local(tensor) for tensor in (q, m, v, comp))
                halves = _halves_for(group, s, param, grad, m, v, comp)
                path = Path(halves, param.device, param.dtype, comp is not None, s.needs_norms)
                bucket = found.get((path, index, k))
                if bucket is None or (halves is _EAGER and bucket.numel + param.numel() > KEPT):
                    bucket = found[path, index, k] = Bucket([], [], [], [], None if comp is None else [], s)
                    work.setdefault(path, []).append(bucket)
                if is_shard and reduces:
                    sharded.append((q, bucket if path.needs_norms else None, len(bucket.params)))
                bucket.append(param, grad, m, v, comp, state["step"])
            if index == 0 and scalars:
                self._last_p = next(iter(scalars.values())).p
        if dtensors:
            torch.autograd.graph.increment_version(dtensors)  # their shards have versions of their own
        return work, sharded

    def _state_of(self, param: Any, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        dtype = torch.float64 if param.dtype is torch.float64 else torch.float32
        # Other states may be there: wrappers of optimizers keep their own.
        if not ("step" in state and "exp_avg" in state and "exp_avg_sq" in state):
            state["step"] = _counter(0)
            for name in _STATES:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for name in _STATES:
            if state[name].dtype is not dtype:  # model.to(dtype), or a hook, has changed one of the two
                state[name] = state[name].to(dtype)
        if param.dtype in LOW_PRECISION and group["kahan_sum"] is not False:
            comp = state.get("kahan_comp")
            if comp is None or comp.dtype is not param.dtype:
                state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        elif "kahan_comp" in state:
            del state["kahan_comp"]  # it would be stale once Kahan sums go on
        return state


class Path(NamedTuple):
    """What the tensors of one call of the halves have in common."""

    halves: Halves
    device: torch.device
    dtype: torch.dtype
    kahan: bool
    needs_norms: bool


# A DTensor, the bucket of its shard (None if it brings no sums) and its row there.
Sharded = tuple[Any, Bucket | None, int]


def _reduce(sharded: list[Sharded], work: dict[Path, list[Bucket]], sums: dict[Path, Tensor]) -> None:
    """Sum the squares over the shards of each tensor, in place and in one collective a mesh dimension.

    DTensors without a gradient here bring zeros, so that the collective has one size on all ranks.
    """
    rows: dict[int, Tensor] = {}
    for path, reduced in sums.items():
        parts = torch.split(reduced, [len(bucket.params) for bucket in work[path]])
        rows.update(zip(map(id, work[path]), parts, strict=True))
    pairs = []
    for param, bucket, row in sharded:
        device = to_local(param).device
        zero = torch.zeros(2, dtype=torch.float64, device=device)
        pairs.append(zero if bucket is None else rows[id(bucket)][row])
    totals = sum_over_shards(pairs, [q.device_mesh for q, _, _ in sharded], [q.placements for q, _, _ in sharded])
    for pair, total in zip(pairs, totals, strict=True):
        pair.copy_(total)


def _halves_for(group: dict[str, Any], s: Scalars, param: Tensor, grad: Tensor, *states: Tensor | None) -> Halves:
    """The fastest implementation that is right for a tensor, or the one that the group asks for."""
    foreach, fused = group["foreach"], group["fused"]
    if not fused and (foreach is False or type(param) not in PLAIN):
        return _REFERENCE
    if not foreach and fused is not False:
        tensors = [state for state in states if state is not None]
        if grad.dtype == param.dtype and same_dense_layout(param, grad, *tensors):
            if s.p == 0.5 and s.eps > 0 and param.is_cpu and param.dtype in (torch.float32, torch.float64):
                return _TORCH  # with eps = 0 it divides 0 by 0
            kernels = kernels_for(param.device.type)
            if kernels and param.dtype in KERNEL_DTYPES and P_RANGE[0] <= s.p <= P_RANGE[1]:
                return kernels
        if fused:
            raise RuntimeError(
                f"Invalid fused: fused=True with p={s.p} and a {param.dtype} parameter of shape {tuple(param.shape)} "
                f"on {param.device}; kernels take tensors without gaps in memory, laid out like their gradient and "
                f"state, for p from {P_RANGE[0]} to {P_RANGE[1]}; allowed here: fused=None or False."
            )
    return _EAGER


def _check_fused(param: Tensor) -> None:
    """Refuse fused=True for a parameter that no kernel takes."""
    if kernels_for(param.device.type) is None:
        raise ValueError(
            f"Invalid fused: fused=True with a parameter on {param.device} needs kernels, which need numba on a CPU "
            '(pip install "hf_nsf[fused]") and Triton on a GPU; allowed here: fused=None or False.'
        )
    if param.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"Invalid fused: fused=True with a {param.dtype} parameter; allowed is fused=True for float32, bfloat16 "
            "and float16, and None or False for others."
        )


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Validate the options of a group, and return them as plain scalars."""
    checked = {**options, **check_cycle({name: options[name] for name in CYCLE_OPTIONS})}
    check_at_least_zero("lr", options["lr"])
    if not isinstance(options["lr"], Tensor):
        checked["lr"] = as_float("lr", options["lr"])
    try:
        b1, b2 = options["betas"]
    except (TypeError, ValueError):
        raise ValueError(
            f"Invalid betas: betas={options['betas']!r}, allowed is a pair of numbers in [0, 1)."
        ) from None
    checked["betas"] = (check_unit_interval("betas[0]", b1), check_unit_interval("betas[1]", b2))
    for name in ("eps", "weight_decay"):
        checked[name] = check_at_least_zero(name, options[name])
    check_choice("grafting", options["grafting"], GRAFTINGS)
    check_flag("maximize", options["maximize"])
    check_paths(options["foreach"], options["fused"], options["kahan_sum"])
    exponents = [checked[name] for name in ("p", "p_min", "p_max") if checked[name] is not None]
    if options["fused"] and not all(P_RANGE[0] <= p <= P_RANGE[1] for p in exponents):
        raise ValueError(
            f"Invalid fused: fused=True with p={exponents}; kernels take p from {P_RANGE[0]} to {P_RANGE[1]}; allowed "
            "beyond: fused=None or False."
        )
    return checked


def _scalars(k: float, group: dict[str, Any]) -> Scalars:
    """The numbers of the step that follows k updates."""
    b1, b2 = group["betas"]
    lr = _item(group["lr"])
    # To load a state, torch.distributed.checkpoint makes a step with lr = 0, before a Trainer has set total_steps.
    p = group["p_max"] if lr == 0 and lacks_total(group) else p_at(k, group)
    p = p if abs(p) > 1e-30 else 0.0  # in float32 it is 0, and a zero to the power of 0 must be 1
    lr, b1, b2, eps, decay = map(_item, (group["lr"], b1, b2, group["eps"], group["weight_decay"]))
    return Scalars(p, lr, b1, b2, eps, decay, group["maximize"], group["grafting"], k + 1)


def _counter(value: float) -> Tensor:
    # On the CPU, as torch's Adam has it: the bias corrections then need no copy from the device.
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
