# SPDX-License-Identifier: Apache-2.0
"""NSF, natural spectral fusion (arXiv 2509.04713): Adam whose second-moment exponent p is written from outside.

The update is the authors' second-moment exponential scaling (arXiv 2405.18498). `step_scale="adam"` is layer-wise
grafting (arXiv 2002.11803): the direction of NSF with the length of Adam's step. A neighbour is Padam
(arXiv 1806.06763), with p fixed in (0, 1/2].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .layouts import walk_alike
from .low_precision import LOW_PRECISION, exact_value, restore_float32, round_into
from .nsf_blocked import Scratch, blocked_nsf, filled, is_adam
from .shards import grad_shards, is_sharded, sum_over_shards, to_local
from .validation import check_at_least_zero, check_choice, check_decay, check_finite, check_shapes

STEP_SCALES = ("adam", "raw")
COMPILED_FROM = 10**6  # elements; smaller optimizers are stepped before a compiler has started
MULTI = 1 << 23  # elements of tensors that take the multi-tensor path together: it makes two copies of them
# Outside of these exponents d^(1-2p) leaves float32's range at gradients that are no rarity (1e-12, 1e12).
_TAME_P = (-0.5, 1.0)
_KNOBS_ADDED_LATER = {
    "maximize": False,
    "foreach": None,
    "fused": None,
    "kahan": None,
    "step_scale": "adam",
    "p": 0.5,
    "p_cycle_step": None,
    "processes": 0,
}


class NSF(Optimizer):
    r"""Adam with an exponent p in place of the square root, p being any finite number and free to change.

    `m <- b1 m + (1-b1) g`, `v <- b2 v + (1-b2) g^2`, `m_hat = m/(1-b1^t)`, `v_hat = v/(1-b2^t)`; weight decay is
    decoupled as in AdamW. Then

    * `step_scale="raw"`, the formula of arXiv 2509.04713: `theta <- theta - eta m_hat / (v_hat^p + eps)`. Its step
      length changes by orders of magnitude with p.
    * `step_scale="adam"`, our deviation and the default: with `d = sqrt(v_hat) + eps` and `u = m_hat d^(-2p)`,
      `theta <- theta - eta s u`, where `s = ||m_hat/d|| / ||u||` over each parameter tensor gives every step the
      length of Adam's, so that one learning rate serves all p. At p = 1/2 this is AdamW.

    p = 1/2 is Adam (low frequencies), p = 0 SGD with an averaged momentum, p < 0 amplifies high frequencies.

    Args:
        params: parameters, named parameters or parameter groups (each may set every option below).
        lr: learning rate eta, a float or a one-element tensor.
        betas: (b1, b2), each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0.
        p: exponent of the next step; :class:`hf_nsf.PCycle` rewrites `group["p"]`. A float or a one-element tensor.
        step_scale: "adam" or "raw".
        maximize: ascend instead of descend.
        foreach: True for the multi-tensor path, False for the single-tensor one, None for the fastest that is right:
            the multi-tensor one on accelerators, on the CPU the fused or the blocked one for float32 or float64 (they
            keep up to 48 MiB of scratch), the single-tensor one elsewhere. Parameters in bfloat16 or float16 always
            take the single-tensor path, and so do all for p outside [-1/2, 1], where directions need float64; sharded
            ones (DTensor) a path of their own whose lengths are those of the whole tensors, all of them summed over the
            processes in one collective a step (and mesh dimension).
        fused: True for loops over float32 parameters on the CPU that numba compiles at the first step (the extra
            `fused`; some seconds, after which they are cached); None for these where numba is installed and the
            parameters have a million elements or more; False for no compiling: the blocked path. At p = 1/2 both are
            torch's fused AdamW; for p outside [-1/2, 1] ("adam") or [-1/2, 5/2] ("raw") other paths step in.
        kahan: keep what rounding drops from bfloat16 and float16 parameters, in a state of their dtype, and add it
            again at the next step. None means True; float32 and float64 parameters need none and get none.

    Moments are kept in at least float32, through `load_state_dict` too.

    Raises:
        ValueError: a value is out of its range, or `fused=True` cannot hold; the message shows it.
        RuntimeError: at `step()`, for sparse gradients, and for `fused=True` with tensors that have gaps in memory.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        p: Any = 0.5,
        step_scale: str = "adam",
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        kahan: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "p": p,
            "step_scale": step_scale,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "kahan": kahan,
            # Of hf_nsf.PCycle (None until there is one) and of the Trainer's callback. Here, since what loads a sharded
            # state (FSDP2, torch.distributed.checkpoint) fills in the entries that it finds and adds none.
            "p_cycle_step": None,
            "processes": 0,
        }
        _check_group(defaults)
        super().__init__(params, defaults)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, value in _KNOBS_ADDED_LATER.items():
                group.setdefault(name, value)

    def _forget(self) -> None:
        """Drop what is kept between steps and is of no copy and no pickle."""
        self._scratch = Scratch()
        self._compiled: Any = None
        self._elements: int | None = None  # of all parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own options are checked as the constructor's are."""
        super().add_param_group(param_group)
        self._elements = None
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for param in group["params"]:
                if not param.is_floating_point():
                    raise ValueError(
                        f"Invalid parameter of dtype {param.dtype}: NSF takes real floating-point parameters; "
                        "view complex ones with torch.view_as_real."
                    )
                if group["fused"] and (param.dtype != torch.float32 or param.device.type != "cpu" or is_sharded(param)):
                    raise ValueError(
                        f"Invalid fused: fused=True with a {'sharded ' if is_sharded(param) else ''}{param.dtype} "
                        f"parameter on {param.device}; allowed is fused=True for whole torch.float32 ones on the CPU, "
                        "and None or False elsewhere."
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch's, it keeps float32 moments of lower-precision parameters in float32.

        A parameter whose entry is empty or lacks a moment or the number of steps starts anew.

        Args:
            state_dict: what `state_dict()` has returned.

        Raises:
            ValueError: it is the state of parameters of other numbers or shapes.
        """
        check_shapes(self, state_dict, "exp_avg")
        super().load_state_dict(state_dict)
        restore_float32(self, state_dict, ("exp_avg", "exp_avg_sq"))
        for param, state in list(self.state.items()):
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
                del self.state[param]
            elif isinstance(state["step"], Tensor):  # a Trainer of several GPUs loads it to the GPU
                state["step"] = state["step"].cpu()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sharded: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        for group in self.param_groups:
            single, multi, blocked = self._split(group)
            # Not self.state[q], which would make an empty state where there is no gradient.
            sharded += [(q, self.state.get(q, {}), group) for q in group["params"] if is_sharded(q)]
            lr, p = _item(group["lr"]), _item(group["p"])
            for bucket in blocked:
                states = [self.state[q] for q in bucket]
                if bucket[0].dtype == torch.float32 and not is_adam(group, p) and self._compiles(group, p):
                    self._compiled.step(bucket, states, group, lr, p)
                else:
                    blocked_nsf(bucket, states, group, lr, p, self._scratch)
            if single:
                _single_tensor_nsf(single, [self.state[q] for q in single], group)
            for bucket in multi:
                _multi_tensor_nsf(bucket, [self.state[q] for q in bucket], group)
        if sharded:
            _sharded_nsf(sharded)
        return loss

    def _compiles(self, group: dict[str, Any], p: float) -> bool:
        """Whether this group's step goes through the compiled loops; makes them at the first call."""
        if self._elements is None:
            self._elements = sum(q.numel() for group in self.param_groups for q in group["params"])
        if not group["fused"] and (group["fused"] is False or self._elements < COMPILED_FROM):
            return False
        loops = compiled_loops()
        if loops is None or not loops.holds_at(p, group["step_scale"]) or not loops.is_ready(group["step_scale"]):
            return False
        if self._compiled is None:
            self._compiled = loops.CompiledNSF(self._scratch)
        return True

    def _split(self, group: dict[str, Any]) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
        """Create missing states; deal the whole parameters to the paths: single, multi-tensor, blocked."""
        single: list[Tensor] = []
        blocked: dict[torch.dtype, list[Tensor]] = {}
        multi: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = {}
        tame = group["step_scale"] == "raw" or _TAME_P[0] <= _item(group["p"]) <= _TAME_P[1]
        may_block = tame and (group["foreach"] is None or bool(group["fused"]))
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("NSF takes no sparse gradients; use torch.nn.Embedding(sparse=False).")
            state = self.state[param]
            if not state:
                moment_dtype = torch.promote_types(param.dtype, torch.float32)
                # On the CPU, as torch's Adam has it: the bias corrections then need no copy from the device.
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)
            low_precision = param.dtype in LOW_PRECISION
            if low_precision and group["kahan"] is not False and "compensation" not in state:
                state["compensation"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if may_block and walk_alike(param, param.grad, state["exp_avg"], state["exp_avg_sq"]):
                blocked.setdefault(param.dtype, []).append(param)
                continue
            if is_sharded(param):
                continue
            if group["fused"] and tame:
                raise RuntimeError(
                    f"Invalid fused: fused=True with a parameter of shape {tuple(param.shape)} that has gaps in memory "
                    "or another size or layout than its gradient or state; allowed: fused=None or False."
                )
            foreach = param.device.type != "cpu" if group["foreach"] is None else group["foreach"]
            if foreach and tame and not low_precision and type(param) in (Tensor, torch.nn.Parameter):
                multi.setdefault((param.device, param.dtype, param.grad.dtype), []).append(param)
            else:
                single.append(param)
        lists = [[b[i] for i in some] for b in multi.values() for some in filled([q.numel() for q in b], MULTI)]
        return single, lists, list(blocked.values())


def _check_group(group: dict[str, Any]) -> None:
    check_at_least_zero("lr", group["lr"])
    try:
        b1, b2 = group["betas"]
    except (TypeError, ValueError):
        raise ValueError(f"Invalid betas: betas={group['betas']!r}, allowed is a pair of numbers in [0, 1).") from None
    check_decay("betas[0]", b1)
    check_decay("betas[1]", b2)
    check_at_least_zero("eps", group["eps"])
    check_at_least_zero("weight_decay", group["weight_decay"])
    check_finite("p", group["p"])
    check_choice("step_scale", group["step_scale"], STEP_SCALES)
    if group["fused"] and group["foreach"]:
        raise ValueError("Invalid foreach and fused: foreach=True, fused=True; at most one of the two may be True.")
    if group["fused"] and compiled_loops() is None:
        raise ValueError(
            'Invalid fused: fused=True needs numba, which cannot be imported; pip install "hf_nsf[fused]", or allowed: '
            "fused=None, False."
        )


@functools.cache
def compiled_loops() -> Any:
    """The module of the compiled loops, or None without numba."""
    try:
        from . import nsf_compiled
    except Exception:  # none installed, or one that does not fit numpy
        return None
    return nsf_compiled


def _item(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _bias_corrections(state: dict[str, Any], b1: float, b2: float) -> tuple[float, float]:
    t = state["step"].item()
    return 1 - b1**t, 1 - b2**t


def _length_ratio(adam_norm: Tensor, u_norm: Tensor) -> Tensor:
    """S = ||m_hat / d|| / ||u||, and 1 where u = 0; no number where one of the two is none."""
    return torch.where(u_norm == 0, torch.ones_like(u_norm), adam_norm / u_norm)


def _single_tensor_nsf(params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """The readable path, one tensor at a time."""
    for param, state in zip(params, states, strict=True):
        _update_moments(param.grad, state, group)
        a, u = _adam_step_and_direction(state, group)
        if u is not a:
            u.mul_(_length_ratio(_norm(a), _norm(u)).to(u.dtype))
        _move(param, u, state, group)


def _update_moments(grad: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
    """`m <- b1 m + (1-b1) g`, `v <- b2 v + (1-b2) g^2`, and one more step."""
    (b1, b2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
    g = grad.to(m.dtype)
    if group["maximize"]:
        g = -g
    state["step"] += 1
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)


def _adam_step_and_direction(state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Adam's step `a = m_hat / d` and NSF's direction `u = m_hat d^(-2p)`, the same tensor where no length is lent."""
    p, (b1, b2), eps = _item(group["p"]), group["betas"], group["eps"]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    c1, c2 = _bias_corrections(state, b1, b2)
    if group["step_scale"] == "raw":
        u = m / (v / c2).pow_(p).add_(eps).mul_(c1)
        return u, u
    d = (v.sqrt() / c2**0.5).add_(eps)
    a = _adam_step(m, d, eps).div_(c1)
    if p == 0.5:
        return a, a
    if not _TAME_P[0] <= p <= _TAME_P[1]:
        d = d.double()
    return a, a * _weights(d, p)


def _adam_step(m: Tensor, d: Tensor, eps: float) -> Tensor:
    """Return m / d; with eps = 0 it is 0 where d is (no gradient yet, or one whose square underflowed)."""
    return m / d if eps > 0 else torch.where(d == 0, torch.zeros_like(m), m / d)


def _weights(d: Tensor, p: float) -> Tensor:
    """d^(1-2p), so that u = m d^(-2p) = (m / d) d^(1-2p); bounded, that no inf meets a 0."""
    bound = torch.finfo(d.dtype).max ** 0.75
    return d.pow(1 - 2 * p).clamp_(max=bound)


def _norm(x: Tensor) -> Tensor:
    """2-norm in float64, where no square of a float32 overflows or underflows."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _move(param: Tensor, u: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """`theta <- theta - eta (u + lambda theta)`, u being scaled already; what rounding drops is kept, if asked for."""
    lr, rest = _item(group["lr"]), state.get("compensation")
    theta = param if param.dtype == u.dtype else exact_value(param, rest, u.dtype)
    theta.mul_(1 - lr * group["weight_decay"]).sub_(u, alpha=lr)
    if theta is not param:
        round_into(param, rest, theta)


def _multi_tensor_nsf(params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """The same, for lists of plain tensors of one device and one dtype (float32 or float64)."""
    lr, p, (b1, b2), eps = _item(group["lr"]), _item(group["p"]), group["betas"], group["eps"]
    dtype = params[0].dtype
    grads = [param.grad.to(dtype) for param in params]  # type: ignore[union-attr]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    ms = [state["exp_avg"] for state in states]
    vs = [state["exp_avg_sq"] for state in states]
    for state in states:
        state["step"] += 1
    corrections = [_bias_corrections(state, b1, b2) for state in states]

    if group["weight_decay"] != 0:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(ms, grads, 1 - b1)
    torch._foreach_mul_(vs, b2)
    torch._foreach_addcmul_(vs, grads, grads, 1 - b2)

    if group["step_scale"] == "raw":
        denominators = torch._foreach_div(vs, [c2 for _, c2 in corrections])
        torch._foreach_pow_(denominators, p)
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(params, ms, denominators, [-lr / c1 for c1, _ in corrections])
        return

    ds = torch._foreach_sqrt(vs)
    torch._foreach_div_(ds, [c2**0.5 for _, c2 in corrections])
    torch._foreach_add_(ds, eps)
    if p == 0.5 and eps > 0:
        torch._foreach_addcdiv_(params, ms, ds, [-lr / c1 for c1, _ in corrections])
        return
    steps = (
        list(torch._foreach_div(ms, ds)) if eps > 0 else [_adam_step(m, d, eps) for m, d in zip(ms, ds, strict=True)]
    )
    if p == 0.5:
        torch._foreach_mul_(steps, [-lr / c1 for c1, _ in corrections])
    else:
        adam_norms = torch.stack(torch._foreach_norm(steps, 2, dtype=torch.float64))
        torch._foreach_pow_(ds, 1 - 2 * p)
        torch._foreach_clamp_max_(ds, torch.finfo(dtype).max ** 0.75)
        torch._foreach_mul_(steps, ds)
        ratios = _length_ratio(adam_norms, torch.stack(torch._foreach_norm(steps, 2, dtype=torch.float64)))
        torch._foreach_mul_(steps, list(ratios.to(dtype).unbind()))
        torch._foreach_mul_(steps, [-lr / c1 for c1, _ in corrections])
    torch._foreach_add_(params, steps)


def _sharded_nsf(work: list[tuple[Any, dict[str, Any], dict[str, Any]]]) -> None:
    """The same for DTensors: each process moves its shard by a length that is the whole tensor's.

    Parameters without a gradient take part in the collective with zeros, so that it has one size on all processes.
    """
    # Between the two halves only the sums travel; u is made anew rather than kept, one tensor at a time.
    locals_ = []
    grads = grad_shards([param for param, _, _ in work if param.grad is not None])
    pairs, meshes, placements = [], [], []
    for param, state, group in work:
        local = {name: to_local(value) for name, value in state.items()}
        locals_.append(local)
        if param.grad is not None:
            _update_moments(next(grads), local, group)
        if group["step_scale"] == "raw" or _item(group["p"]) == 0.5:
            continue
        zero = torch.zeros(2, dtype=torch.float64, device=to_local(param).device)
        if param.grad is not None:
            a, u = _adam_step_and_direction(local, group)
            zero = torch.stack([_norm(a), _norm(u)]).square_()
        pairs.append(zero)
        meshes.append(param.device_mesh)
        placements.append(param.placements)
    sums = iter(sum_over_shards(pairs, meshes, placements))
    for (param, _, group), local in zip(work, locals_, strict=True):
        lent = group["step_scale"] == "adam" and _item(group["p"]) != 0.5
        norms = next(sums).sqrt() if lent else None
        if param.grad is None:
            continue
        _, u = _adam_step_and_direction(local, group)
        if norms is not None:
            u.mul_(_length_ratio(norms[0], norms[1]).to(u.dtype))
        _move(to_local(param), u, local, group)
