# SPDX-License-Identifier: Apache-2.0
"""The fast NSF step on a CPU: the same arithmetic as the readable path, in blocks that stay in cache.

A pass over memory costs more than the arithmetic, so all of a block's operations run while it is in cache. The length
of Adam's step needs all of a tensor before its first element moves: the directions u wait in a bounded scratch, and
what does not fit there is computed a second time. Small tensors are gathered into one block. At p = 1/2 the step is
Adam's, and torch's own fused AdamW makes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .layouts import in_memory_order

BLOCK = 1 << 18  # elements that two threads work on while they are in cache
SMALL = 1 << 15  # tensors up to this many elements are gathered
KEPT_BYTES = 40 << 20  # bound of the scratch for the directions of one tensor
_SAFE_SQUARES = (1e-18, 1e30)  # within these a float32 sum of squares has lost nothing


class Scratch:
    """Memory that lives from step to step, one piece per name: allocating it anew costs as much as a pass over it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.numel() for held in self._held.values())

    def take(self, name: str, dtype: torch.dtype, size: int) -> Tensor:
        """Return `size` elements under a name; their values are arbitrary, and those taken before are overwritten."""
        held, needed = self._held.get(name), size * dtype.itemsize
        if held is None or held.numel() < needed:
            self._held.pop(name, None)
            held = self._held[name] = torch.empty(needed, dtype=torch.uint8)
        return held[:needed].view(dtype)


def blocked_nsf(
    params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], lr: float, p: float, scratch: Scratch
) -> None:
    """Step parameters of one dtype that :func:`walk_alike` accepts, with the group's options."""
    if is_adam(group, p):
        _adam(params, states, group, lr)
        return
    steps = [state["step"] for state in states]
    count_step(steps)
    small: dict[float, list[int]] = {}
    for index, param in enumerate(params):
        t = steps[index].item()
        if param.numel() > SMALL:
            _Rule(group, lr, p, t, param.dtype, scratch).step_large(param, states[index])
        elif param.numel() > 0:
            small.setdefault(t, []).append(index)
    for t, indices in small.items():
        rule = _Rule(group, lr, p, t, params[0].dtype, scratch)
        for some in filled([params[i].numel() for i in indices], BLOCK):
            rule.step_small([params[indices[i]] for i in some], [states[indices[i]] for i in some])


def count_step(steps: list[Tensor]) -> None:
    """Add 1 to each of the counters, which are on the CPU; a tensor's 1 costs a quarter of a number's there."""
    torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)


def is_adam(group: dict[str, Any], p: float) -> bool:
    """Whether the step is that of torch's AdamW, which with eps = 0 divides 0 by 0."""
    return p == 0.5 and group["eps"] > 0


def _adam(params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], lr: float) -> None:
    b1, b2 = group["betas"]
    adamw(
        params,
        [param.grad for param in params],  # type: ignore[misc]
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=b1,
        beta2=b2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def filled(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Deal indices, in order, to lists of up to `most` elements each; a larger tensor has one of its own."""
    lists: list[list[int]] = [[]]
    room = most
    for index, size in enumerate(sizes):
        if size > room and lists[-1]:
            lists.append([])
            room = most
        lists[-1].append(index)
        room -= size
    return lists


class _Rule:
    """The update of METHOD for one set of scalars, on 1-D pieces of tensors."""

    def __init__(self, group: dict[str, Any], lr: float, p: float, t: float, dtype: torch.dtype, scratch: Scratch):
        self.b1, self.b2 = group["betas"]
        self.eps, self.maximize = group["eps"], group["maximize"]
        self.raw = group["step_scale"] == "raw"
        self.p, self.dtype, self.scratch = p, dtype, scratch
        self.kept = 1 - lr * group["weight_decay"]
        self.c2 = 1 - self.b2**t
        self.rate = -lr / (1 - self.b1**t)

    def step_large(self, param: Tensor, state: dict[str, Any]) -> None:
        flat = (param.detach(), param.grad, state["exp_avg"], state["exp_avg_sq"])
        blocks = list(zip(*(in_memory_order(x).split(BLOCK) for x in flat), strict=True))  # type: ignore[arg-type]
        if self.raw:
            for theta, g, m, v in blocks:
                d = self.scratch.take("d", self.dtype, m.numel())
                self._moments(g, m, v)
                self._denominator(v, d)
                self._move(theta, m, d)
            return
        room = KEPT_BYTES // self.dtype.itemsize // BLOCK * BLOCK
        directions = self.scratch.take("u", self.dtype, min(param.numel(), room)).split(BLOCK)
        spare = self.scratch.take("x", self.dtype, BLOCK) if len(directions) < len(blocks) else None
        adam_square = u_square = 0.0
        for index, (_, g, m, v) in enumerate(blocks):
            u = directions[index] if index < len(directions) else spare[: m.numel()]  # type: ignore[index]
            self._moments(g, m, v)
            d = self._adam_step(m, v, u)
            adam_square += _square(u)
            u_square += _square(self._reweigh(u, d))
        s = 1.0 if u_square == 0 else math.sqrt(adam_square / u_square)
        for index, (theta, _, m, v) in enumerate(blocks):
            if index < len(directions):
                u = directions[index]
            else:
                u = spare[: m.numel()]  # type: ignore[index]
                self._reweigh(u, self._adam_step(m, v, u))
            self._decay(theta)
            self._add(theta, u, s)

    def step_small(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        ms, vs = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        flatten, unflatten = torch._utils._flatten_dense_tensors, torch._utils._unflatten_dense_tensors
        # A gathered block is a copy, except that of a single tensor, which may share its memory.
        g, m, v = flatten([q.grad for q in params]), flatten(ms), flatten(vs)
        self._moments(g, m, v)
        d = self.scratch.take("d", self.dtype, m.numel())
        if self.raw:
            self._denominator(v, d)
            u = torch.div(m, d).mul_(self.rate)
        else:
            u = torch.empty_like(m)
            d = self._adam_step(m, v, u)
            pieces = list(u.split([q.numel() for q in params]))
            adam_norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64))
            self._reweigh(u, d)
            u_norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64))
            s = torch.where(u_norms == 0, 1.0, adam_norms / u_norms).mul_(self.rate).to(self.dtype)
            torch._foreach_mul_(pieces, list(s.unbind()))
        torch._foreach_copy_(ms, unflatten(m, ms))
        torch._foreach_copy_(vs, unflatten(v, vs))
        if self.kept != 1:
            torch._foreach_mul_(params, self.kept)
        torch._foreach_add_(params, unflatten(u, params))

    def _moments(self, g: Tensor, m: Tensor, v: Tensor) -> None:
        if self.maximize:
            g = torch.neg(g, out=self.scratch.take("d", self.dtype, g.numel()))
        m.lerp_(g, 1 - self.b1)
        v.mul_(self.b2).addcmul_(g, g, value=1 - self.b2)

    def _denominator(self, v: Tensor, d: Tensor) -> None:
        """Write v_hat^p + eps to d."""
        torch.div(v, self.c2, out=d)
        power_(d, self.p).add_(self.eps)

    def _adam_step(self, m: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """Write m / d to u and return d = sqrt(v_hat) + eps, in scratch."""
        d = self.scratch.take("d", self.dtype, m.numel())
        torch.sqrt(v, out=d).div_(self.c2**0.5).add_(self.eps)
        torch.div(m, d, out=u)
        if self.eps == 0:
            u.masked_fill_(d == 0, 0.0)
        return d

    def _reweigh(self, u: Tensor, d: Tensor) -> Tensor:
        """Turn Adam's step into NSF's direction; the weights are bounded, that no inf meets a 0."""
        if self.p == 0.5:
            return u
        return u.mul_(power_(d, 1 - 2 * self.p).clamp_(max=torch.finfo(self.dtype).max ** 0.75))

    def _move(self, theta: Tensor, m: Tensor, d: Tensor) -> None:
        self._decay(theta)
        theta.addcdiv_(m, d, value=self.rate)

    def _decay(self, theta: Tensor) -> None:
        if self.kept != 1:
            theta.mul_(self.kept)

    def _add(self, theta: Tensor, u: Tensor, s: float) -> None:
        factor = s * self.rate
        limits = torch.finfo(self.dtype)
        if factor == 0 or limits.tiny <= abs(factor) <= limits.max:
            theta.add_(u, alpha=factor)
        else:  # tiny or huge directions: the factor alone would be infinite or 0 in this dtype
            theta.add_(u.double().mul_(factor).to(self.dtype))


def power_(x: Tensor, exponent: float) -> Tensor:
    """`x ** exponent` in place for x >= 0; faster than torch's pow, which is right to the last bit."""
    if exponent == 1:
        return x
    if exponent == 0:
        return x.fill_(1.0)
    if exponent == 2:
        return x.mul_(x)
    if exponent == 0.5:
        return x.sqrt_()
    if exponent == -0.5:
        return x.rsqrt_()
    if exponent == -1:
        return x.reciprocal_()
    return x.log2_().mul_(exponent).exp2_()


def _square(x: Tensor) -> float:
    """Sum of squares; in float64 where a float32 would overflow or underflow."""
    square = torch.dot(x, x).item()
    if x.dtype == torch.float64 or _SAFE_SQUARES[0] < square < _SAFE_SQUARES[1]:
        return square
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
