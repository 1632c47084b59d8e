# SPDX-License-Identifier: Apache-2.0
"""Sharded and whole parameters stepped side by side, on as many ranks as asked for."""

import argparse

import torch
import torch.distributed as dist
from forks import fork
from problems import relative_error, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from hf_nsf import LCAM, NSF

STEPS, COUNTED = 16, 4
SHAPES = [(7, 6), (1, 8), (4, 4), (5,), (3, 2, 2)]  # uneven shards, and an empty one


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(sharded, plain, what: str, bound: float = 1e-6) -> None:
    error = relative_error([whole(tensor.detach()) for tensor in sharded], plain)
    assert error <= bound, f"{what}: a tensor differs by {error:.2e}"


def step_counted(optimizer, mesh, partial_sums: int) -> None:
    """Step; NSF makes one collective per mesh dimension for all norms, and as few as possible for partial gradients.

    LCAM's step is that of torch's SGD.
    """
    with CommDebugMode() as mode:
        optimizer.step()
    if isinstance(optimizer, NSF):
        norms = mesh.ndim if optimizer.param_groups[0]["grafting"] == "adam" and optimizer.last_p != 0.5 else 0
        made = mode.get_total_counts()
        assert made == partial_sums + norms, f"{made} collectives in a step, expected {partial_sums} + {norms}"


CASES = {
    "nsf": lambda q: NSF(q, lr=1e-2, p_min=-0.25, cycle_steps=7, cycle_shape="sawtooth"),
    "nsf none": lambda q: NSF(q, lr=1e-2, p=0.25, grafting="none"),
    "nsf bfloat16": lambda q: NSF(q, lr=1e-2, p=-0.25),
    "lcam": lambda q: LCAM(q, lr=1e-2, weight_decay=0.01),
    "nsf adamw": lambda q: NSF(q, lr=1e-2, p=0.5),
    "nsf lists": lambda q: NSF(q, lr=1e-2, p=0.0, foreach=True),
    "nsf reference": lambda q: NSF(q, lr=1e-2, p=-0.5, foreach=False),
}
# A different placement for each of the SHAPES: every mix of shards and replicas that fits the mesh; None is plain.
PLACEMENTS = {
    1: [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], None],
    2: [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], None],
}
# How the gradients arrive at every second step: to be added over ranks, but for the third, which takes a maximum.
PARTIAL = {
    1: [[Partial()], [Shard(0)], [Partial("max")], [Partial()], None],
    2: [[Partial(), Partial()], [Replicate(), Shard(0)], [Shard(0), Partial("max")], [Partial(), Partial()], None],
}


def distribute(value: torch.Tensor, mesh, placements) -> torch.Tensor:
    """The value as a DTensor; where it is partial, each element comes from one rank alone."""
    if placements is None:
        return value.clone()
    whole_places = [Replicate() if place.is_partial() else place for place in placements]
    local = distribute_tensor(value, mesh, whole_places, src_data_rank=None).to_local()
    index = torch.arange(local.numel()).view(local.shape)
    for dim, place in enumerate(placements):
        if place.is_partial():
            others = local - 1 if place.reduce_op == "max" else torch.zeros_like(local)
            local = torch.where(index % mesh.size(dim) == mesh.get_local_rank(dim), local, others)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def lockstep(mesh, make, dtype: torch.dtype) -> None:
    """The same random gradients for sharded, replicated and plain parameters and for whole ones."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    plain = [nn.Parameter(draw(shape)) for shape in SHAPES]
    mixed = [nn.Parameter(distribute(v.detach(), mesh, p)) for v, p in zip(plain, PLACEMENTS[mesh.ndim], strict=True)]
    ours, reference = make(mixed), make(plain)
    for step in range(STEPS):
        arrive = (PARTIAL if step % 2 else PLACEMENTS)[mesh.ndim]
        missing = 2 if step % 4 == 3 or step == 0 else None  # now and then one has no gradient
        for i, (a, b) in enumerate(zip(mixed, plain, strict=True)):
            g = draw(b.shape)
            a.grad = distribute(g, mesh, arrive[i]) if i != missing else None
            b.grad = g if i != missing else None
        versions = [q._version for q in mixed]
        if step < COUNTED and dtype == torch.float32:
            # One for all sums of a mesh dimension, and one for the maximum, which is left to torch.
            partial_sums = mesh.ndim + (missing is None) if step % 2 else 0
            step_counted(ours, mesh, partial_sums)
        else:
            ours.step()
        assert step or len(ours.state) == len(mixed) - 1, "a state for a parameter without a gradient"
        if step >= COUNTED:  # under CommDebugMode torch's lists change no version
            assert all(q._version > v for i, (q, v) in enumerate(zip(mixed, versions, strict=True)) if i != missing)
        reference.step()
    bound = 1e-6 if dtype == torch.float32 else 1e-4
    assert_equal(values(ours, mixed), values(reference, plain), f"lockstep on {mesh.ndim} dimensions", bound)


class Block(nn.Module):
    """A transformer's feed-forward block between two norms, in float64, since biases of 0 divide by the smallest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.last = nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.double()

    def forward(self, x):
        return self.last(self.down(torch.tanh(self.up(self.norm(x)))))


def tensor_parallel(mesh, make) -> None:
    """Training a block whose sequence and matrices are sharded is training the whole one.

    The norms' gradients are partial sums: each rank has those of its part of the sequence.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(use_local_output=True),
    }
    plain, model = Block(), parallelize_module(Block(), mesh, plan)
    reference, ours = make(plain.parameters()), make(model.parameters())

    def backward(block, x, y) -> None:
        block.zero_grad()
        ((block(x) - y).square().sum() / 100).backward()

    for step in range(STEPS):
        x, y = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(step)).double()
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        backward(plain, x, y)
        reference.step()
        backward(model, x[:, mine], y[:, mine])
        if step >= 2:
            ours.step()
            continue
        assert sum(q.grad.placements == (Partial(),) for q in model.parameters()) >= 4, "no partial gradients"
        step_counted(ours, mesh, partial_sums=1)
    assert_equal(model.parameters(), plain.parameters(), "tensor parallelism")


def work(names: list[str]) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    meshes = [line] + ([init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))] if world == 4 else [])
    for name in names:
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        for mesh in meshes:
            lockstep(mesh, CASES[name], dtype)
        if dtype == torch.float32:
            tensor_parallel(line, CASES[name])
        if dist.get_rank() == 0:
            print("passed:", name, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int, help="Number of ranks.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    fork(arguments.processes, work, arguments.cases)
