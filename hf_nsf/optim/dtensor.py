# SPDX-License-Identifier: Apache-2.0
"""What an optimizer needs to know of sharded parameters (DTensor: FSDP2, tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    if type(tensor) in (torch.nn.Parameter, Tensor):  # nearly always, and faster than asking for attributes
        return False
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def to_local(value: Any) -> Any:
    """This process's shard of a DTensor, sharing its memory; anything else as it is."""
    return value.to_local() if is_sharded(value) else value


def grad_shards(params: list[Any]) -> Iterator[Tensor]:
    """Give the part of each gradient that belongs to this process's shard of the parameter, one after the other.

    Gradients that arrive as partial sums (those of norms and biases under tensor parallelism) are summed together, in
    one collective per mesh dimension and dtype. What else differs from the parameter's placements, torch redistributes.
    """
    values = [param.grad.to_local() for param in params]
    placements = [list(param.grad.placements) for param in params]
    buckets: dict[tuple[Any, int, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        if param.grad.placements == param.placements:
            continue
        partial = [dim for dim, place in enumerate(placements[i]) if place.is_partial()]
        if all(_is_sum(placements[i][dim]) for dim in partial):  # sums do not commute with a maximum over other shards
            for dim in partial:
                buckets.setdefault((param.grad.device_mesh, dim, param.grad.dtype), []).append(i)
    for (mesh, dim, _), members in buckets.items():
        flat = torch.cat([values[i].reshape(-1) for i in members])
        if mesh.size(dim) > 1:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for i, part in zip(members, torch.split(flat, [values[i].numel() for i in members]), strict=True):
            values[i] = part.view(values[i].shape)
            placements[i][dim] = torch.distributed.tensor.Replicate()
    for i, param in enumerate(params):
        value, grad = values[i], param.grad
        if placements[i] != list(param.placements):
            grad = grad.from_local(
                value, grad.device_mesh, placements[i], run_check=False, shape=grad.shape, stride=grad.stride()
            )
            value = grad.redistribute(param.device_mesh, param.placements).to_local()
        yield value


def _is_sum(placement: Any) -> bool:
    """Whether the shards are to be added; subclasses of torch's Partial have work of their own to do."""
    return type(placement).__name__ == "Partial" and placement.reduce_op == "sum"


def sum_over_shards(values: list[Tensor], meshes: list[Any], placements: list[Any]) -> list[Tensor]:
    """Sum each value over the shards of its tensor; all values of a mesh dimension travel in one collective.

    Args:
        values: of equal shape, each computed from this process's shard of a DTensor.
        meshes: the device mesh of each DTensor.
        placements: the placements of each DTensor.

    Returns:
        The sums, equal on all processes of a mesh.
    """
    sums = list(values)
    for mesh in dict.fromkeys(meshes):
        members = [i for i, other in enumerate(meshes) if other == mesh]
        for dim in range(mesh.ndim):
            if mesh.size(dim) == 1 or all(placements[i][dim].is_replicate() for i in members):
                continue
            # Replicas would be counted once each, so they count as their share.
            shares = [1 / mesh.size(dim) if placements[i][dim].is_replicate() else 1.0 for i in members]
            stacked = torch.stack([sums[i] * share for i, share in zip(members, shares, strict=True)])
            torch.distributed.all_reduce(stacked, group=mesh.get_group(dim))
            for i, value in zip(members, stacked.unbind(), strict=True):
                sums[i] = value
    return sums
