# SPDX-License-Identifier: Apache-2.0
"""What an optimizer needs to know of sharded parameters (DTensor: FSDP2, tensor parallelism)."""

from __future__ import annotations

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


def grad_shard(param: Any) -> Tensor:
    """The part of the gradient that belongs to this process's shard of the parameter."""
    grad = param.grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


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
