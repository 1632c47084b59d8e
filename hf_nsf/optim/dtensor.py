# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (DTensor: FSDP2, tensor parallelism): shards of gradients, and sums over shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether a value is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def to_local(value: Any) -> Any:
    """Return this process's shard of a DTensor, sharing its memory; return other values unchanged."""
    return value.to_local() if is_sharded(value) else value


def grad_shards(params: list[Any]) -> dict[Any, Tensor]:
    """Return the part of each gradient that belongs to this process's shard of the parameter.

    Gradients that arrive as partial sums (those of norms and biases under tensor parallelism) are summed together, in
    one collective per mesh dimension and dtype. Other gradients whose placements differ from their parameter's are
    redistributed by torch.
    """
    values = [param.grad.to_local() for param in params]
    placements = [list(param.grad.placements) for param in params]
    partial_sums: dict[tuple[Any, int, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        if param.grad.placements == param.placements:
            continue
        partial = [dim for dim, place in enumerate(placements[i]) if place.is_partial()]
        if all(_is_sum(placements[i][dim]) for dim in partial):  # a sum and a maximum do not commute
            for dim in partial:
                partial_sums.setdefault((param.grad.device_mesh, dim, param.grad.dtype), []).append(i)
    for (mesh, dim, _), members in partial_sums.items():
        flat = torch.cat([values[i].reshape(-1) for i in members])
        if mesh.size(dim) > 1:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for i, part in zip(members, torch.split(flat, [values[i].numel() for i in members]), strict=True):
            values[i] = part.view(values[i].shape)
            placements[i][dim] = torch.distributed.tensor.Replicate()
    for i, param in enumerate(params):
        if placements[i] != list(param.placements):
            layout = {"shape": param.grad.shape, "stride": param.grad.stride()}
            grad = param.grad.from_local(values[i], param.grad.device_mesh, placements[i], run_check=False, **layout)
            values[i] = grad.redistribute(param.device_mesh, param.placements).to_local()
    return dict(zip(params, values, strict=True))


def _is_sum(placement: Any) -> bool:
    """Return whether a placement is a partial sum; subclasses of torch's Partial are reduced in other ways."""
    return type(placement).__name__ == "Partial" and placement.reduce_op == "sum"


def sum_over_shards(params: list[Any], values: list[Tensor]) -> None:
    """Sum values over the shards of their DTensors, in place; one collective per mesh dimension.

    Args:
        params: DTensors.
        values: for each, a value of its local shard; all of equal shape.
    """
    for mesh in dict.fromkeys(param.device_mesh for param in params):
        members = [(q.placements, value) for q, value in zip(params, values, strict=True) if q.device_mesh == mesh]
        for dim in range(mesh.ndim):
            if mesh.size(dim) == 1 or all(placements[dim].is_replicate() for placements, _ in members):
                continue
            # Each of n replicas adds 1/n of its value, so that the value counts once.
            shares = [1 / mesh.size(dim) if placements[dim].is_replicate() else 1.0 for placements, _ in members]
            stacked = torch.stack([share * value for share, (_, value) in zip(shares, members, strict=True)])
            torch.distributed.all_reduce(stacked, group=mesh.get_group(dim))
            for total, (_, value) in zip(stacked, members, strict=True):
                value.copy_(total)
