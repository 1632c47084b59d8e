# SPDX-License-Identifier: Apache-2.0
"""One process of test_sharded.py, started by torchrun: sharded and whole parameters stepped side by side."""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_nsf import LCAM, NSF

STEPS = 50
SHAPES = [(7, 6), (1, 8), (4, 4), (5,), (3, 2, 2)]  # uneven shards, and an empty one
RELATIVE = 1e-6


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(sharded, plain, what: str) -> None:
    for i, (a, b) in enumerate(zip(sharded, plain, strict=True)):
        error = float(torch.linalg.vector_norm(whole(a) - b) / torch.linalg.vector_norm(b))
        assert error <= RELATIVE, f"{what}: tensor {i} differs by {error:.2e}"


class Collectives:
    """Counts the sums over processes that are made inside the block."""

    def __enter__(self):
        self.count, self._all_reduce = 0, dist.all_reduce

        def counted(*args, **kwargs):
            self.count += 1
            return self._all_reduce(*args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *error):
        dist.all_reduce = self._all_reduce


def placements_of(mesh, index: int):
    """A different placement for each tensor: every mix of shards and replicas that fits the mesh; None is plain."""
    choices = {1: [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], None]}
    choices[2] = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], None]
    return choices[mesh.ndim][index]


def lockstep(mesh, make, per_step: int) -> None:
    """The same random gradients for sharded, replicated and plain parameters and for whole ones."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    plain = [v.clone().requires_grad_() for v in values]
    mixed = []
    for i, value in enumerate(values):
        places = placements_of(mesh, i)
        tensor = value.clone() if places is None else distribute_tensor(value, mesh, places)
        mixed.append(torch.nn.Parameter(tensor))
    ours, reference = make(mixed), make(plain)
    for step in range(STEPS):
        for i, (a, b) in enumerate(zip(mixed, plain, strict=True)):
            if step % 10 == 9 and i == 2:  # now and then one has no gradient
                a.grad = b.grad = None
                continue
            g = torch.randn(b.shape, generator=generator)
            b.grad = g
            places = placements_of(mesh, i)
            a.grad = g.clone() if places is None else distribute_tensor(g, mesh, places)
        with Collectives() as made:
            ours.step()
        reference.step()
        assert made.count == per_step, f"{made.count} collectives in a step, expected {per_step}"
    assert_equal(mixed, plain, f"lockstep on a mesh of {mesh.ndim} dimensions")


def build_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))


def train(model, optimizer, steps, rank, world, rows=8) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        x, y = torch.randn(rows, 8, generator=generator), torch.randn(rows, 3, generator=generator)
        part = slice(rank * rows // world, (rank + 1) * rows // world)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()


def fsdp2(mesh, make) -> None:
    """Training under fully_shard is the training of the whole model; its DCP checkpoint goes on bit for bit."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain, model = build_model(), build_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    reference, ours = make(plain.parameters()), make(model.parameters())
    train(plain, reference, range(STEPS), 0, 1)
    train(model, ours, range(STEPS // 2), rank, world)

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, ours)}
    save(saved, checkpoint_id=folder[0])
    train(model, ours, range(STEPS // 2, STEPS), rank, world)
    assert_equal(model.parameters(), plain.parameters(), "fully_shard")

    other = build_model()
    with torch.no_grad():
        for param in other.parameters():
            param.fill_(0.5)
    for layer in (other[0], other[2], other):
        fully_shard(layer, mesh=mesh)
    resumed = make(other.parameters())
    target = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    # That steps once with gradients of zero and lr = 0, to make the states that it will fill.
    assert all(torch.equal(whole(q), torch.full_like(whole(q), 0.5)) for q in other.parameters()), "loading moves"
    load(target, checkpoint_id=folder[0])
    other.load_state_dict(target["model"])
    set_optimizer_state_dict(other, resumed, target["optimizer"])
    train(other, resumed, range(STEPS // 2, STEPS), rank, world)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(a), whole(b)), "a run resumed from a DCP checkpoint differs"


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    meshes = {1: line}
    if world == 4:
        meshes[2] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    makers = {f"nsf p={p}": (lambda q, p=p: NSF(q, lr=1e-2, p=p), int(p != 0.5)) for p in (0.5, 0.0, -0.25)}
    makers["nsf raw"] = (lambda q: NSF(q, lr=1e-2, p=0.25, step_scale="raw"), 0)
    makers["lcam"] = (lambda q: LCAM(q, lr=1e-2, weight_decay=0.01), 0)
    makers["lcam foreach"] = (lambda q: LCAM(q, lr=1e-2, weight_decay=0.01, foreach=True), 0)
    for name, (make, per_step) in makers.items():
        for mesh in meshes.values():
            lockstep(mesh, make, per_step * mesh.ndim)
        fsdp2(line, make)
        if dist.get_rank() == 0:
            print("passed:", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
