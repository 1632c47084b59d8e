# SPDX-License-Identifier: Apache-2.0
"""What the kernels of both kinds of device read: chunks of all tensors, their addresses, and numbers for each tensor.

The tensors of all buckets are numbered in order, so that one launch takes them all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..nsf_update import Bucket

#: Columns of :func:`addresses`.
ADDRESSES = ("param", "grad", "exp_avg", "exp_avg_sq", "kahan_comp")
#: Columns of :func:`scalars`.
SCALARS = ("sign", "b1c", "b2", "b2c", "root_c2", "eps", "exponent", "decay_factor", "rate")


class Chunks(NamedTuple):
    """Pieces of one launch, the chunks of each tensor side by side."""

    owner: np.ndarray  #: of each chunk, the number of its tensor (int32)
    low: np.ndarray  #: of each chunk, its first element in the tensor (int64)
    length: np.ndarray  #: of each chunk, its number of elements (int64)
    first: np.ndarray  #: chunks of tensor k are first[k] .. first[k + 1]; none if it is empty (N + 1 times int64)


@functools.lru_cache(maxsize=16)
def chunk_table(sizes: tuple[int, ...], chunk: int) -> Chunks:
    """Cut tensors into chunks; the arrays are shared by all callers and must not be written to.

    Args:
        sizes: number of elements of each tensor.
        chunk: most elements of a chunk.
    """
    numel = np.array(sizes, dtype=np.int64)
    counts = -(-numel // chunk)
    first = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(numel)), counts)
    low = (np.arange(len(owner)) - first[owner]) * chunk
    table = Chunks(owner.astype(np.int32), low, np.minimum(chunk, numel[owner] - low), first)
    for array in table:
        array.setflags(write=False)
    return table


def sizes(buckets: list[Bucket]) -> tuple[int, ...]:
    """Number of elements of each tensor."""
    return tuple(param.numel() for bucket in buckets for param in bucket.params)


def addresses(buckets: list[Bucket]) -> np.ndarray:
    """Where each tensor's data begin: (N, 5) int64, columns as in ADDRESSES; 0 where there is no such tensor.

    Raises:
        RuntimeError: the memory of a tensor has been freed (`untyped_storage().resize_(0)`), which no kernel would see.
    """
    rows = np.zeros((len(ADDRESSES), sum(len(bucket.params) for bucket in buckets)), dtype=np.int64)
    low = 0
    for b in buckets:
        high = low + len(b.params)
        for row, tensors in zip(rows, (b.params, b.grads, b.exp_avgs, b.exp_avg_sqs, b.kahan_comps), strict=True):
            if tensors is not None:
                row[low:high] = list(map(Tensor.data_ptr, tensors))
                if not row[low:high].all() and any(q.numel() and not q.data_ptr() for q in tensors):
                    raise RuntimeError("NSF cannot step a parameter whose memory, or that of its gradient, was freed.")
        low = high
    return rows.T


def scalars(buckets: list[Bucket], halves: bool) -> np.ndarray:
    """Numbers of each tensor's step: (N, 9) float64, columns as in SCALARS.

    Args:
        buckets: the tensors.
        halves: `exponent` is 1 - 2p, that of d in u = a d^(1-2p); else 2p, that of sqrt(v_hat) in the whole step. At
            p = 1/2 the grafted step is the paper's, so the whole step needs not know the kind of grafting.
    """
    rows = []
    for bucket in buckets:
        s = bucket.scalars
        sign, exponent = (-1 if s.maximize else 1), (1 - 2 * s.p if halves else 2 * s.p)
        rows.append((sign, 1 - s.beta1, s.beta2, 1 - s.beta2, s.c2**-0.5, s.eps, exponent, s.decay_factor, s.rate))
    table = np.array(rows, dtype=np.float64).reshape(-1, len(SCALARS))
    return table.repeat([len(bucket.params) for bucket in buckets], axis=0)
