# SPDX-License-Identifier: Apache-2.0
"""NSF's update rule over lists of tensors (arXiv 2509.04713; grafting: arXiv 2002.11803).

    update_moments   m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  sums <- (||a||^2, ||u||^2) of each tensor
    apply_update     theta <- (1 - eta lambda) theta - eta / (1-b1^t) * ||a|| / ||u|| * u
    whole_step       both in one pass, for steps without norms: grafting="none", or p = 1/2

with `d = sqrt(v_hat) + eps`, `a = m / d` and `u = a (d/32)^(1-2p)`. Constant factors of u cancel in u / ||u||, such as
the bias correction of m, which is applied at the end, and the 32. The sums of sharded tensors are reduced between the
two functions. `apply_update` computes u again, so that the memory of a step does not grow with the parameters.

To keep u within float32, every implementation clamps d/32 to [1/reach, reach] (:class:`Scalars`) in both functions, so
a step has the length of Adam's for any gradients. The clamp leaves d alone from 1e-10 to 9e12 at p = -1, from 2e-16 to
5e18 at p = -1/2, and everywhere in float32 for p >= -0.46. Coordinates beyond it weigh as much as those at the limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 18  # elements; on a CPU the pieces of a step stay in cache
UNIT = 32.0  # of d in u: leaves room on both sides for gradients from 1e-8 to 1e12


@dataclasses.dataclass
class Scalars:
    """Numbers that all tensors of a bucket share in one step.

    Args:
        p: exponent.
        lr: learning rate eta.
        beta1: b1.
        beta2: b2.
        eps: added to the denominator.
        weight_decay: decoupled decay lambda.
        maximize: ascend instead of descend.
        grafting: "adam" or "none".
        t: number of this update, from 1.
    """

    p: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    grafting: str
    t: float

    def __post_init__(self) -> None:
        self.decay_factor = 1 - self.lr * self.weight_decay
        self.rate = self.lr / (1 - math.pow(self.beta1, self.t))  # with the bias correction of m
        self.inverse_root_c2 = (1 - math.pow(self.beta2, self.t)) ** -0.5  # the bias correction of sqrt(v)
        self.exponent = 1 - 2 * self.p  # of d in u
        self.reach = 2.0 ** (114 / max(1.0, abs(self.exponent)))
        self.needs_norms = self.grafting == "adam" and self.p != 0.5  # at p = 1/2, u = a


@dataclasses.dataclass
class Bucket:
    """Tensors of one device and dtype that make the same step: lists of equal length.

    Args:
        scalars: the step.
        steps: counters of updates.
        params: theta.
        grads: g, of any floating dtype.
        exp_avgs: m, of at least float32.
        exp_avg_sqs: v, of the dtype of m.
        kahan_comps: rounding errors of theta, of the dtype of theta; None without Kahan sums.
        sums: `(||a||^2, ||u||^2)` of each tensor in float64, set by `update_moments`.
        table: what kernels keep from `update_moments` to `apply_update`.
    """

    scalars: Scalars
    steps: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    kahan_comps: list[Tensor] | None = None
    sums: Tensor = dataclasses.field(init=False)
    table: Any = None

    def addresses(self) -> np.ndarray[Any, Any]:
        """Addresses of theta, g, m, v and the Kahan sums (0 without them): (N, 5) int64.

        Raises:
            RuntimeError: the memory of a tensor was freed by `untyped_storage().resize_(0)`.
        """
        table = np.zeros((len(self.params), 5), np.int64)
        lists = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.kahan_comps or [])
        for column, tensors in enumerate(lists):
            if not tensors:
                continue
            table[:, column] = list(map(Tensor.data_ptr, tensors))
            if not table[:, column].all() and any(q.numel() and not q.data_ptr() for q in tensors):
                raise RuntimeError("NSF cannot step a parameter if its memory, or its gradient's, was freed.")
        return table

    def factor_roots(self) -> Tensor:
        """Square roots of `rate ||a|| / ||u||`: the factor may leave float32 where its product with u does not."""
        a_squares, u_squares = self.sums.unbind(1)
        ratio = torch.where(u_squares == 0, torch.ones_like(u_squares), a_squares / u_squares).sqrt_()
        return ratio.mul_(self.scalars.rate).sqrt_()


Row = tuple[Tensor, ...]


def _pieces(bucket: Bucket, numel: int | None) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Cut a bucket into pieces of at most `numel` elements; small tensors are put together.

    Args:
        bucket: the tensors.
        numel: largest number of elements; None for whole tensors, one by one.

    Yields:
        The index of the parameter of each tensor, and lists of theta, g, m, v and, if there are any, Kahan sums.
    """
    lists = [bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs]
    rows = zip(*lists, *([] if bucket.kahan_comps is None else [bucket.kahan_comps]), strict=True)
    owners: list[int] = []
    piece: list[Row] = []
    room = numel or 0
    for owner, whole in enumerate(rows):
        for row in _cut(whole, numel):
            size = row[0].numel()
            if piece and size > room:
                yield owners, _columns(piece)
                owners, piece, room = [], [], numel or 0
            if size:
                owners.append(owner)
                piece.append(row)
                room -= size
    if piece:
        yield owners, _columns(piece)


def _columns(rows: list[Row]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _cut(row: Row, numel: int | None) -> Iterable[Row]:
    """Views of tensors of equal shape with at most `numel` elements each."""
    if numel is None or row[0].numel() <= numel:
        yield row
    elif all(tensor.is_contiguous() for tensor in row):
        yield from zip(*(torch.split(tensor.detach().view(-1), numel) for tensor in row), strict=True)
    else:
        dim = max(range(row[0].dim()), key=row[0].size)
        length = max(1, numel * row[0].size(dim) // row[0].numel())
        for part in zip(*(torch.split(tensor.detach(), length, dim) for tensor in row), strict=True):
            yield from _cut(part, numel)


def update_moments(bucket: Bucket, numel: int | None = PIECE) -> None:
    """Update the moments; put the squared norms of Adam's step and of the direction in `bucket.sums`.

    Args:
        bucket: the tensors.
        numel: largest number of elements of a piece; None for whole tensors, one by one.
    """
    s, device = bucket.scalars, bucket.params[0].device
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    bucket.sums = torch.zeros(len(bucket.params), 2, dtype=exact, device=device)
    for owners, (_, g, m, v, *_) in _pieces(bucket, numel):
        _update_m_and_v(g, m, v, s)
        a, d = _adam(m, v, s)
        a_squares = _squares(a, exact)
        u_squares = _squares(_direction(a, d, s), exact)
        rows = torch.tensor(owners, device="cpu").to(device, non_blocking=True)
        bucket.sums.index_add_(0, rows, torch.stack([a_squares, u_squares], dim=1))


def apply_update(bucket: Bucket, numel: int | None = PIECE) -> None:
    """Move the parameters along the direction, by the length of Adam's step.

    Args:
        bucket: that of :func:`update_moments`; its sums are those of whole tensors.
        numel: as in :func:`update_moments`.
    """
    s = bucket.scalars
    roots = bucket.factor_roots().to(bucket.exp_avgs[0].dtype).unbind()
    for owners, (theta, _, m, v, *comps) in _pieces(bucket, numel):
        u = _direction(*_adam(m, v, s), s)
        factors = [roots[owner] for owner in owners]
        torch._foreach_mul_(u, factors)
        torch._foreach_mul_(u, factors)
        _move(theta, comps, u, 1.0, s)


def whole_step(bucket: Bucket, numel: int | None = PIECE) -> None:
    """Make a step that needs no norms: `theta <- theta - eta m_hat / (v_hat^p + eps)`; at p = 1/2 this is Adam's.

    Args:
        bucket: the tensors.
        numel: as in :func:`update_moments`.
    """
    s = bucket.scalars
    for _, (theta, g, m, v, *comps) in _pieces(bucket, numel):
        _update_m_and_v(g, m, v, s)
        d = _power(_corrected_root(v, s), 2 * s.p)
        torch._foreach_add_(d, s.eps)
        _move(theta, comps, _divide(m, d, s.eps), s.rate, s)


def _update_m_and_v(g: list[Tensor], m: list[Tensor], v: list[Tensor], s: Scalars) -> None:
    """`m <- b1 m + (1-b1) g`, `v <- b2 v + (1-b2) g^2`."""
    g = [grad.to(moment.dtype) for grad, moment in zip(g, m, strict=True)]
    if s.maximize:
        g = list(torch._foreach_neg(g))
    torch._foreach_lerp_(m, g, 1 - s.beta1)
    torch._foreach_mul_(v, s.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - s.beta2)


def _corrected_root(v: list[Tensor], s: Scalars) -> list[Tensor]:
    """`sqrt(v_hat)`."""
    root = list(torch._foreach_sqrt(v))
    torch._foreach_mul_(root, s.inverse_root_c2)
    return root


def _adam(m: list[Tensor], v: list[Tensor], s: Scalars) -> tuple[list[Tensor], list[Tensor]]:
    """`a = m / d` and `d = sqrt(v_hat) + eps`."""
    d = _corrected_root(v, s)
    torch._foreach_add_(d, s.eps)
    return _divide(m, d, s.eps), d


def _divide(m: list[Tensor], d: list[Tensor], eps: float) -> list[Tensor]:
    """`m / d`; with eps = 0, 0 where d = 0: no gradient yet, or its square underflowed."""
    a = list(torch._foreach_div(m, d))
    if eps == 0:
        a = [step.masked_fill_(denominator == 0, 0.0) for step, denominator in zip(a, d, strict=True)]
    return a


def _direction(a: list[Tensor], d: list[Tensor], s: Scalars) -> list[Tensor]:
    """`u = a (d/32)^(1-2p)`, in place of d."""
    torch._foreach_mul_(d, 1 / UNIT)
    u = _power([x.clamp_(1 / s.reach, s.reach) for x in d], s.exponent)
    torch._foreach_mul_(u, a)
    return u


def _power(x: list[Tensor], exponent: float) -> list[Tensor]:
    """`x ** exponent` in place for x >= 0. In float32 this is faster than torch's pow, which rounds correctly."""
    if exponent == 1:
        return x
    if exponent == 0:
        return [tensor.fill_(1.0) for tensor in x]
    if x[0].dtype == torch.float64:
        return [tensor.pow_(exponent) for tensor in x]
    return [tensor.log2_().mul_(exponent).exp2_() for tensor in x]


def _squares(x: list[Tensor], exact: torch.dtype) -> Tensor:
    """Sums of squares, in float64 if squares of float32 may overflow or underflow."""
    if x[0].is_cpu and x[0].dtype == torch.float32:  # there float64 is 3x slower, and .item() does not synchronize
        squares = torch.stack([(tensor * tensor).sum() for tensor in x])  # torch's norms have errors of up to 1e-5
        if 1e-32 < squares.min().item() and squares.max().item() < 1e32:
            return squares.to(exact)
    return torch.stack(torch._foreach_norm(x, 2, dtype=exact)).square_()


def _move(theta: list[Tensor], comps: list[list[Tensor]], u: list[Tensor], rate: float, s: Scalars) -> None:
    """`theta <- (1 - eta lambda) theta - rate u`, rounded once if theta is bfloat16 or float16.

    Rounding loses steps of relative size below 2^-9 in bfloat16. `comps`, if there are any, keep the rounding errors,
    which are added at the next step (Kahan sums). Stochastic rounding would need no state, but random numbers.
    """
    values, dtype = theta, u[0].dtype
    if theta[0].dtype != dtype:
        values = [param.to(dtype) for param in theta]
        for comp in comps:
            torch._foreach_add_(values, [error.to(dtype) for error in comp])
    if s.decay_factor != 1:
        torch._foreach_mul_(values, s.decay_factor)
    torch._foreach_add_(values, u, alpha=-rate)
    if values is not theta:
        torch._foreach_copy_(theta, values)
        for comp in comps:
            torch._foreach_sub_(values, [param.to(dtype) for param in theta])
            torch._foreach_copy_(comp, values)
