# SPDX-License-Identifier: Apache-2.0
"""NSF's update rule as two halves over lists of tensors (arXiv 2509.04713; grafting: arXiv 2002.11803).

    first half    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  return (||a||^2, ||u||^2) for each tensor
    second half   theta <- (1 - eta lambda) theta - eta / (1-b1^t) * ||a|| / ||u|| * u

with `d = sqrt(v_hat) + eps`, `a = m / d` and `u = a d^(1-2p) = m d^(-2p)`. The bias correction of m is the same for a
and u, so it is left to the second half. grafting="none" and p = 1/2 need no norms: :func:`whole_step` makes the step in
one pass. Between the halves the sums of sharded tensors can be reduced. The second half makes u again where it was not
kept, so that the memory of a step does not grow with the parameters.

The bias correction of v is a number, so no pass over a tensor is spent on it: the code works with
`d' = sqrt(c2) d = sqrt(v) + sqrt(c2) eps` and `u' = m d'^(-2p) = c2^-p u`, with `c2 = 1 - b2^t`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .kahan import kahan_round, kahan_value
from .pieces import Row, chunk_by_numel

PIECE = 1 << 18  # elements; on a CPU the pieces of a step stay in cache
KEPT = 12 << 20  # elements; eager buckets of so many at most keep u between the halves: a quarter less time, 48 MiB
# Outside of these exponents d^(1-2p) leaves the range of float32 at gradients that are no rarity (1e-12, 1e12).
P_RANGE = (-0.5, 1.0)


@dataclasses.dataclass(frozen=True)
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

    @property
    def decay_factor(self) -> float:
        """1 - eta lambda."""
        return 1 - self.lr * self.weight_decay

    @property
    def rate(self) -> float:
        """-eta / (1 - b1^t): what m_hat's correction and the learning rate make of u."""
        return -self.lr / (1 - math.pow(self.beta1, self.t))

    @property
    def c2(self) -> float:
        """1 - b2^t, the bias correction of v."""
        return 1 - math.pow(self.beta2, self.t)

    @property
    def needs_norms(self) -> bool:
        """Whether the step's length is grafted: not at p = 1/2, where u = a."""
        return self.grafting == "adam" and self.p != 0.5


@dataclasses.dataclass
class Bucket:
    """Tensors of one device and dtype that make the same step: lists of equal length.

    Args:
        params: theta.
        grads: g, of any floating dtype.
        exp_avgs: m, of at least float32.
        exp_avg_sqs: v, of the dtype of m.
        kahan_comps: what rounding dropped of theta, of the dtype of theta; None without Kahan sums.
        scalars: the step.
        steps: counters of updates.
        numel: number of elements of the parameters.
        directions: what the first half keeps of u for the second, chunk by chunk.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    kahan_comps: list[Tensor] | None
    scalars: Scalars
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    numel: int = 0
    directions: list[list[Tensor]] = dataclasses.field(default_factory=list)

    def append(
        self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, comp: Tensor | None, step: Tensor
    ) -> None:
        """Add a parameter's tensors."""
        self.numel += param.numel()
        self.params.append(param)
        self.grads.append(grad)
        self.exp_avgs.append(exp_avg)
        self.exp_avg_sqs.append(exp_avg_sq)
        self.steps.append(step)
        if self.kahan_comps is not None and comp is not None:
            self.kahan_comps.append(comp)


def _rows(bucket: Bucket) -> list[Row]:
    """The tensors of a bucket, parameter by parameter."""
    lists = [bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs]
    return list(zip(*lists, *([] if bucket.kahan_comps is None else [bucket.kahan_comps]), strict=True))


def first_half(buckets: list[Bucket], numel: int | None = PIECE) -> Tensor:
    """Update the moments and sum the squares of Adam's step and of the direction.

    Args:
        buckets: tensors of one device.
        numel: largest number of elements of a piece; None for whole tensors, one by one.

    Returns:
        `(||a||^2, ||u||^2)` of each tensor in turn, in float64.
    """
    device = buckets[0].params[0].device
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    size = _direction_dtype(buckets[0].exp_avgs[0], buckets[0].scalars.p).itemsize
    keeps = numel is not None and sum(bucket.numel for bucket in buckets) * size <= KEPT * torch.float32.itemsize
    all_sums = []
    for bucket in buckets:
        s = bucket.scalars
        sums = torch.zeros(len(bucket.params), 2, dtype=exact, device=device)
        for owners, pieces in chunk_by_numel(_rows(bucket), numel):
            _, g, m, v, *_ = map(list, zip(*pieces, strict=True))
            _update_moments(g, m, v, s)
            d = _denominator(v, s)
            a_norms = _norms(_divide(m, d, s.eps), exact)
            u = _direction(m, d, s)
            u_norms = _norms(u, exact)
            if keeps:
                bucket.directions.append(u)
            rows = torch.tensor(owners, device="cpu").to(device, non_blocking=True)
            sums.index_add_(0, rows, torch.stack([a_norms, u_norms], dim=1).square_())
        sums[:, 0] *= s.c2
        sums[:, 1] *= s.c2 ** (2 * s.p)
        all_sums.append(sums)
    return torch.cat(all_sums)


def second_half(buckets: list[Bucket], sums: Tensor, numel: int | None = PIECE) -> None:
    """Move the parameters by the direction, with the length of Adam's step.

    Args:
        buckets: as in :func:`first_half`.
        sums: what it returned, summed over the shards of each tensor if there are any.
        numel: as in :func:`first_half`.
    """
    a_squares, u_squares = sums.unbind(1)
    ratios = torch.where(u_squares == 0, torch.ones_like(u_squares), a_squares / u_squares).sqrt_()
    for bucket, ratio in zip(buckets, torch.split(ratios, [len(bucket.params) for bucket in buckets]), strict=True):
        s = bucket.scalars
        # The factor may be outside of float32 where its product with u is not: multiply by its root, twice.
        dtype = _direction_dtype(bucket.exp_avgs[0], s.p)
        roots = list((ratio * (-s.rate * s.c2**s.p)).sqrt_().to(dtype).unbind())
        kept = iter(bucket.directions)
        for owners, pieces in chunk_by_numel(_rows(bucket), numel):
            theta, _, m, v, *comps = map(list, zip(*pieces, strict=True))
            u = next(kept, None) or _direction(m, _denominator(v, s), s)
            factors = [roots[owner] for owner in owners]
            torch._foreach_mul_(u, factors)
            torch._foreach_mul_(u, factors)
            _move(theta, comps, u, -1.0, s)
        bucket.directions.clear()


def whole_step(buckets: list[Bucket], numel: int | None = PIECE) -> None:
    """Make the step in one pass where no length is grafted: grafting="none", or p = 1/2.

    `theta <- theta - eta m_hat / (v_hat^p + eps)`; at p = 1/2 this is Adam's step.

    Args:
        buckets: tensors of one device, with `scalars.needs_norms` False.
        numel: as in :func:`first_half`.
    """
    for bucket in buckets:
        s = bucket.scalars
        for _, pieces in chunk_by_numel(_rows(bucket), numel):
            theta, g, m, v, *comps = map(list, zip(*pieces, strict=True))
            _update_moments(g, m, v, s)
            if s.p == 0.5:
                d = list(torch._foreach_sqrt(v))
            else:
                d = _power([x.to(_direction_dtype(x, s.p), copy=True) for x in v], s.p)
            torch._foreach_add_(d, s.eps * s.c2**s.p)
            _move(theta, comps, _divide(m, d, s.eps), s.rate * s.c2**s.p, s)


def _update_moments(g: list[Tensor], m: list[Tensor], v: list[Tensor], s: Scalars) -> None:
    """`m <- b1 m + (1-b1) g`, `v <- b2 v + (1-b2) g^2`."""
    g = [grad.to(moment.dtype) for grad, moment in zip(g, m, strict=True)]
    if s.maximize:
        g = list(torch._foreach_neg(g))
    torch._foreach_lerp_(m, g, 1 - s.beta1)
    torch._foreach_mul_(v, s.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - s.beta2)


def _denominator(v: list[Tensor], s: Scalars) -> list[Tensor]:
    """`d' = sqrt(v) + sqrt(c2) eps`."""
    d = list(torch._foreach_sqrt(v))
    torch._foreach_add_(d, s.c2**0.5 * s.eps)
    return d


def _divide(m: list[Tensor], d: list[Tensor], eps: float) -> list[Tensor]:
    """`m / d`; with eps = 0 it is 0 where d is: no gradient yet, or one whose square underflowed."""
    a = list(torch._foreach_div(m, d))
    if eps == 0:
        a = [step.masked_fill_(denominator == 0, 0.0) for step, denominator in zip(a, d, strict=True)]
    return a


def _direction(m: list[Tensor], d: list[Tensor], s: Scalars) -> list[Tensor]:
    """`u' = m d'^(-2p)`, in place of d'."""
    zeros = [denominator == 0 for denominator in d] if s.eps == 0 else []
    u = _power([denominator.to(_direction_dtype(denominator, s.p)) for denominator in d], -2 * s.p)
    torch._foreach_clamp_max_(u, torch.finfo(u[0].dtype).max ** 0.95)  # no infinity meets a zero
    torch._foreach_mul_(u, m)
    for direction, zero in zip(u, zeros, strict=False):
        direction.masked_fill_(zero, 0.0)
    return u


def _direction_dtype(moment: Tensor, p: float) -> torch.dtype:
    return moment.dtype if P_RANGE[0] <= p <= P_RANGE[1] else torch.float64


def _power(x: list[Tensor], exponent: float) -> list[Tensor]:
    """`x ** exponent` in place for x >= 0; in float32 faster than torch's pow, which is right to the last bit."""
    if exponent == 0:
        return [tensor.fill_(1.0) for tensor in x]
    if x[0].dtype == torch.float64:
        return [tensor.pow_(exponent) for tensor in x]
    return [tensor.log2_().mul_(exponent).exp2_() for tensor in x]


def _norms(x: list[Tensor], exact: torch.dtype) -> Tensor:
    """2-norms, in float64 where squares of float32 may overflow or underflow."""
    if x[0].is_cpu and x[0].dtype == torch.float32:  # there float64 takes 4 times as long, and a look at them no wait
        norms = torch.stack(torch._foreach_norm(x, 2))
        if 1e-12 < norms.min().item() and norms.max().item() < 1e12:
            return norms.to(exact)
    return torch.stack(torch._foreach_norm(x, 2, dtype=exact))


def _move(theta: list[Tensor], comps: list[list[Tensor]], u: list[Tensor], rate: float, s: Scalars) -> None:
    """`theta <- (1 - eta lambda) theta + rate u`, with a Kahan sum if there are `comps`."""
    values = theta
    if theta[0].dtype != u[0].dtype:
        values = kahan_value(theta, comps[0] if comps else None, u[0].dtype)
    if s.decay_factor != 1:
        torch._foreach_mul_(values, s.decay_factor)
    torch._foreach_add_(values, u, alpha=rate)
    if values is not theta:
        kahan_round(theta, comps[0] if comps else None, values)
