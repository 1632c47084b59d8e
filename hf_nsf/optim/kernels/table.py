# SPDX-License-Identifier: Apache-2.0
"""Cutting the tensors of a bucket into the chunks that kernels work on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np


class Chunks(NamedTuple):
    """Chunks of all tensors of a bucket, those of one tensor in a row."""

    owner: np.ndarray  #: index of each chunk's tensor (int32)
    low: np.ndarray  #: index of each chunk's first element in its tensor (int64)
    length: np.ndarray  #: number of elements of each chunk (int64)
    first: np.ndarray  #: tensor k has the chunks first[k] .. first[k + 1] - 1, none if it is empty (int64, N + 1)


@functools.lru_cache(maxsize=64)
def chunk_table(sizes: tuple[int, ...], chunk: int) -> Chunks:
    """Cut tensors into chunks. The result is cached, so the arrays are read-only.

    Args:
        sizes: number of elements of each tensor.
        chunk: largest number of elements of a chunk.
    """
    numel = np.array(sizes, dtype=np.int64)
    first = np.concatenate(([0], np.cumsum(-(-numel // chunk))))
    owner = np.repeat(np.arange(len(numel)), np.diff(first))
    low = (np.arange(len(owner)) - first[owner]) * chunk
    table = Chunks(owner.astype(np.int32), low, np.minimum(chunk, numel[owner] - low), first)
    for array in table:
        array.setflags(write=False)
    return table
