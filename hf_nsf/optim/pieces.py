# SPDX-License-Identifier: Apache-2.0
"""Cutting and grouping tensors, so that a step works on pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Row = tuple[Tensor, ...]
PLAIN = (Tensor, torch.nn.Parameter)


def same_dense_layout(first: Tensor, *others: Tensor) -> bool:
    """Whether these are plain tensors of one shape and layout without gaps in memory.

    The layout may be any, `torch.channels_last` for one: element by element it does not matter. Of other tensors,
    kernels that walk through memory (torch's fused ones on a CPU, ours) read wrong elements without an error.
    """
    if type(first) not in PLAIN:
        return False
    size, contiguous, device, strided = first.numel(), first.is_contiguous(), first.device, torch.strided
    for other in others:
        if type(other) not in PLAIN or other.layout is not strided or other.device != device:
            return False
        if other.numel() != size or other.is_contiguous() is not contiguous:
            return False
        if other.is_neg() or other._is_zerotensor():  # memory holds other numbers, or there is none
            return False
    return contiguous or (_is_dense(first) and all(other.stride() == first.stride() for other in others))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their part of memory, in some order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def chunk_by_numel(rows: Iterable[Row], numel: int | None) -> Iterator[tuple[list[int], list[Row]]]:
    """Group rows of tensors of equal shape into chunks of at most `numel` elements a column.

    Rows with more elements are cut into views: of memory if their layouts agree, else along a dimension.

    Args:
        rows: tensors that belong together, such as a parameter, its gradient and its states.
        numel: largest number of elements of a chunk; None for one uncut row a chunk.

    Yields:
        For each chunk the index of the row that each piece is of, and the pieces. Rows without elements are left out.
    """
    owners: list[int] = []
    chunk: list[Row] = []
    room = numel or 0
    for owner, row in enumerate(rows):
        size = row[0].numel()
        if size == 0:
            continue
        for piece in _cut(row, numel) if numel and size > numel else (row,):
            size = piece[0].numel()
            if chunk and size > room:
                yield owners, chunk
                owners, chunk, room = [], [], numel or 0
            owners.append(owner)
            chunk.append(piece)
            room -= size
    if chunk:
        yield owners, chunk


def _cut(row: Row, numel: int) -> Iterator[Row]:
    if same_dense_layout(*row):
        flat = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in row]
        yield from zip(*(torch.split(tensor, numel) for tensor in flat), strict=True)
        return
    dim = max(range(row[0].dim()), key=row[0].size)
    rows = max(1, numel * row[0].size(dim) // row[0].numel())
    for piece in zip(*(torch.split(tensor.detach(), rows, dim) for tensor in row), strict=True):
        yield from _cut(piece, numel) if piece[0].numel() > numel else (piece,)
