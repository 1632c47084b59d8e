# SPDX-License-Identifier: Apache-2.0
"""NSF, natural spectral fusion (arXiv 2509.04713): AdamW whose second-moment exponent p cycles with the step.

The update is the authors' second-moment exponential scaling (arXiv 2405.18498). A neighbour is Padam
(arXiv 1806.06763), with p fixed in (0, 1/2].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import check_at_least_zero, check_choice, check_flag, check_paths, check_unit_interval
from .dtensor import grad_shards, is_sharded, sum_over_shards, to_local
from .kernels import EAGER, PLAIN, REFERENCE, TORCH, Implementation, check_fused, choose
from .nsf_update import Bucket, Row, Scalars
from .p_cycle import CYCLE_OPTIONS, EXCLUDED, check_cycle, lacks_total, p_at, short_period
from .state_dict import LOW_PRECISION, load_state

GRAFTINGS = ("adam", "none")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class NSF(Optimizer):
    r"""AdamW with an exponent p in place of the square root, which cycles with the number of updates.

    `m <- b1 m + (1-b1) g`, `v <- b2 v + (1-b2) g^2`, `m_hat = m/(1-b1^t)`, `v_hat = v/(1-b2^t)`; weight decay is
    decoupled. Then

    * `grafting="none"`, the formula of arXiv 2509.04713: `theta <- theta - eta m_hat / (v_hat^p + eps)`. The length of
      its step changes by orders of magnitude with p, so that each p needs a learning rate of its own, and a training
      should end at the lowest p, as with `cycles=3.5`.
    * `grafting="adam"`, our deviation and the default: with `d = sqrt(v_hat) + eps`, `a = m_hat / d` and
      `u = a d^(1-2p)`, `theta <- theta - eta u ||a|| / ||u||` for each parameter tensor: NSF's direction with the
      length of Adam's step (layer-wise grafting, arXiv 2002.11803), so that a learning rate that suits AdamW suits all
      p. The best p depends on the learning rate with and without it (arXiv 2609.30271, `examples/what_p_does.py`).
      A NaN or infinity in a gradient spoils its whole tensor, as it does its norm.

    p = 1/2 is Adam (low frequencies), p = 0 is SGD with an averaged momentum, p < 0 amplifies high frequencies. p is a
    function of the number of updates that a parameter has had and of its group's options; see
    :func:`hf_nsf.p_schedule`. Before a second training call `restart_cycle()`, as a Trainer's callback does. A constant
    `p` in a group may be rewritten between steps.

    Args:
        params: parameters, named parameters or parameter groups (each may set every option below).
        lr: learning rate eta, a number or a one-element tensor.
        betas: (b1, b2), each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay lambda, >= 0.
        p: a constant exponent in [-1, 1] instead of a cycle.
        p_min: lowest exponent of the cycle in [-1, 1], default 0.25.
        p_max: highest exponent, default 0.5; training begins there.
        cycle_steps: period in updates, default 100 if there is no `total_steps`; or
        cycles: number of cycles over `total_steps`, default 16 (fewer if a period had less than 8 updates).
        total_steps: number of updates of the whole training. Under the Trainer its callback sets it.
        cycle_shape: "cosine" (default), "triangular", "sawtooth" or "square".
        grafting: "adam" or "none".
        maximize: ascend instead of descend.
        foreach: True for eager lists of tensors, False for the reference, one tensor at a time.
        fused: True for kernels (CPU: numba, the extra `fused`, float32 and bfloat16 parameters; GPU: Triton, float16
            too), False for none. With `foreach=None` and `fused=None`: torch's fused AdamW at p = 1/2 on a CPU, else
            kernels if available, otherwise eager lists. Before their first use in a process, kernels step small tensors
            beside the eager functions; if they fail, a warning says so and eager lists are used.
        kahan_sum: keep the rounding errors of bfloat16 and float16 parameters in a state of their dtype and add them at
            the next step. None means True; other dtypes have no Kahan sums.

    Moments are kept in at least float32, through `load_state_dict` too. The options of a loaded state replace the
    constructor's, as in torch. Parameters without a gradient are left alone, whatever their dtype; a sharded one must
    have a gradient on all ranks or on none.

    Raises:
        ValueError: an option is out of its range, options exclude each other, or no kernels support a parameter with
            `fused=True`; the message shows the value.
        RuntimeError: at `step()`, for sparse or complex gradients, for a gradient or state of another shape than its
            parameter, and if `fused=True` and no kernels support a tensor.
    """

    _last_p: float | None = None
    _warned_of_period = _warned_of_fsdp1 = False

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
        super().__init__(params, {**defaults, "first_step": 0.0})

    def restart_cycle(self) -> None:
        """Begin p's cycle anew with the next step, as in a second training; moments and counters of steps stay.

        For a parameter with fewer updates than others of its group, p follows its own number of updates until it has as
        many, so that one that was frozen before the restart begins the cycle anew.
        """
        made = {param: float(state["step"]) for param, state in self.state.items() if "step" in state}
        for group in self.param_groups:  # those of ZeRO 3 are empty
            group["first_step"] = max((made.get(param, 0.0) for param in group["params"] or made), default=0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own options are checked as the constructor's are."""
        if isinstance(param_group, dict):
            inherited, own = dict(self.defaults), {name for name, value in param_group.items() if value is not None}
            for name, others in EXCLUDED.items():  # the group's own options replace those that they exclude
                if name in own:
                    inherited.update(dict.fromkeys(others))
                if own.intersection(others):
                    inherited[name] = None
            param_group = _checked({**inherited, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                if param.requires_grad and not param.is_floating_point():
                    raise ValueError(
                        f"Invalid parameter of dtype {param.dtype}: NSF takes real floating-point parameters; "
                        "view complex ones with torch.view_as_real."
                    )
                if param.requires_grad and group["fused"]:
                    check_fused(param)
        except ValueError:
            self.param_groups.pop()
            raise
        self._warn_of_fsdp1(group)

    def _warn_of_fsdp1(self, group: dict[str, Any]) -> None:
        grafts = group["grafting"] == "adam" and group["p"] != 0.5
        if grafts and not self._warned_of_fsdp1 and any(hasattr(q, "_fsdp_flattened") for q in group["params"]):
            self._warned_of_fsdp1 = True
            warnings.warn(
                "NSF's parameters were flattened or cut by FSDP1, so it grafts the length of the flat or cut tensors' "
                "steps. Use FSDP2 (fully_shard) for the steps of whole parameters, or grafting=none.",
                stacklevel=4,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # states of older versions lack newer options
        for values in self.state.values():
            if isinstance(values, dict) and "step" in values:
                step = values["step"]  # a number in old states; on a GPU if a Trainer with several GPUs loaded it
                values["step"] = step.to("cpu", torch.float32) if isinstance(step, Tensor) else _counter(step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the moments of bfloat16 and float16 parameters stay in float32.

        A parameter whose entry lacks a moment or the number of steps starts anew.

        Args:
            state_dict: what `state_dict()` has returned.

        Raises:
            ValueError: it is the state of another optimizer, or of parameters of other numbers or shapes.
        """
        load_state(self, state_dict, "grafting", _MOMENTS, super().load_state_dict)

    @property
    def last_p(self) -> float:
        """Exponent of the last step (of the first group with gradients); before a step of this object, that after 0."""
        group = self.param_groups[0]
        first: float = group["p_max"] if group["p"] is None else group["p"]
        return first if self._last_p is None else self._last_p

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
        if not self._warned_of_period:
            self._warn_of_short_periods()
        plan, sharded = self._plan()
        # Nothing changes before this line, after which nothing is refused.
        for implementation, bucket in plan:
            if implementation is not TORCH:
                torch._foreach_add_(bucket.steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
            if bucket.scalars.needs_norms:
                implementation.update_moments(bucket)
            else:
                implementation.whole_step(bucket)
        if sharded:
            sum_over_shards([q for q, _, _ in sharded], [bucket.sums[row] for _, bucket, row in sharded])
        for implementation, bucket in plan:
            if bucket.scalars.needs_norms:
                implementation.apply_update(bucket)
            if implementation not in (EAGER, REFERENCE):  # kernels write past autograd
                torch.autograd.graph.increment_version(bucket.params)
        return loss

    def _warn_of_short_periods(self) -> None:
        if any(lacks_total(group) for group in self.param_groups):
            return
        self._warned_of_period = True
        for group in self.param_groups:
            period = short_period(group)
            if period is not None:
                warnings.warn(
                    f"NSF's cycle of p has a period of {period:g} updates; below 4 it can hardly be a cycle. Lower "
                    "cycles or raise cycle_steps.",
                    stacklevel=6,  # beyond wrappers of torch
                )
                break

    def _plan(self) -> tuple[list[tuple[Implementation, Bucket]], list[tuple[Any, Bucket, int]]]:
        """Group parameters into buckets; create missing state.

        Returns:
            Each bucket with the implementation that steps it; and each DTensor whose norms are needed, with the bucket
            of its shard and its index there.
        """
        params = [q for group in self.param_groups for q in group["params"] if q.grad is not None]
        for q in params:
            if q.grad.is_sparse or not q.is_floating_point():
                raise RuntimeError(
                    f"NSF takes neither sparse nor complex gradients, got {q.grad.layout} of {q.dtype}; use "
                    "torch.nn.Embedding(sparse=False), or view complex parameters with torch.view_as_real."
                )
        dtensors = [q for q in params if type(q) not in PLAIN and is_sharded(q)]
        shards = grad_shards(dtensors) if dtensors else {}
        scalars: dict[tuple[int, float], Scalars] = {}
        rows: dict[tuple[Any, ...], list[Row]] = {}
        places: list[tuple[Any, tuple[Any, ...], int]] = []
        for index, group in enumerate(self.param_groups):
            for q in group["params"]:
                if q.grad is None:
                    continue
                state = self._state_of(q, group)
                k = state["step"].item()
                if (index, k) not in scalars:
                    scalars[index, k] = _scalars(k, group)
                s = scalars[index, k]
                row: Row = (q, q.grad, state["exp_avg"], state["exp_avg_sq"])
                if "kahan_comp" in state:
                    row += (state["kahan_comp"],)
                if any(tensor.shape != q.shape for tensor in row):
                    raise RuntimeError(
                        f"NSF cannot step a parameter of shape {tuple(q.shape)}: its gradient and state have the "
                        f"shapes {[tuple(tensor.shape) for tensor in row[1:]]}."
                    )
                if q in shards:
                    param, _, *states = map(to_local, row)
                    row = (param, shards[q], *states)
                implementation = choose(group, s, row)
                key = (implementation, row[0].device, row[0].dtype, len(row), index, k)
                members = rows.setdefault(key, [])
                if q in shards and s.needs_norms:
                    places.append((q, key, len(members)))
                members.append((state["step"], *row))
        if dtensors:
            torch.autograd.graph.increment_version(dtensors)  # their shards have versions of their own
        self._last_p = next((s.p for s in scalars.values()), self._last_p)
        buckets = {
            key: Bucket(scalars[key[-2:]], *map(list, zip(*members, strict=True))) for key, members in rows.items()
        }
        plan = [(key[0], bucket) for key, bucket in buckets.items()]
        return plan, [(q, buckets[key], row) for q, key, row in places]

    def _state_of(self, param: Any, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        dtype = torch.float64 if param.dtype is torch.float64 else torch.float32
        # Wrappers of optimizers may keep other states here.
        if not ("step" in state and "exp_avg" in state and "exp_avg_sq" in state):
            state["step"] = _counter(0)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for name in _MOMENTS:
            if state[name].dtype is not dtype:  # model.to(dtype), or a hook, has changed one of the two
                state[name] = state[name].to(dtype)
        if param.dtype in LOW_PRECISION and group["kahan_sum"] is not False:
            comp = state.get("kahan_comp")
            if comp is None or comp.dtype is not param.dtype:
                state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        elif "kahan_comp" in state:
            del state["kahan_comp"]  # it would be stale once Kahan sums are used again
        return state


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Validate the options of a group, and return them as plain scalars."""
    checked = {**options, **check_cycle({name: options[name] for name in CYCLE_OPTIONS})}
    lr = check_at_least_zero("lr", options["lr"])
    checked["lr"] = options["lr"] if isinstance(options["lr"], Tensor) else lr  # a scheduler may write to the tensor
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
    return checked


def _scalars(k: float, group: dict[str, Any]) -> Scalars:
    """The numbers of the step after k updates."""
    options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    lr, b1, b2, eps, decay = (x.item() if isinstance(x, Tensor) else x for x in options)
    # To load a state, torch.distributed.checkpoint makes a step with lr = 0, before a Trainer has set total_steps.
    p = group["p_max"] if lr == 0 and lacks_total(group) else p_at(k, group)
    # What is 0 in float32 must be 0: a zero to the power of 0 is 1, and a zero divided by eps is 0.
    p, eps = p if abs(p) > 1e-30 else 0.0, eps if eps > 1e-38 else 0.0
    return Scalars(p, lr, b1, b2, eps, decay, group["maximize"], group["grafting"], k + 1)


def _counter(value: float) -> Tensor:
    # On the CPU, as in torch's Adam: the bias corrections then need no copy from the device.
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")
