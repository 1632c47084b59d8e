# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (FSDP2, tensor parallelism, their mix with plain ones) give the steps of whole parameters."""

import pytest
import torch
import torch.distributed as dist
from forks import SUPPORT, run_checked
from problems import TORCH
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_nsf import NSF

pytestmark = pytest.mark.skipif(
    TORCH < (2, 9),
    reason="before torch 2.9, FSDP2 on gloo sums gradients rather than averaging them",
)

FEW = ["nsf", "nsf none", "nsf bfloat16", "lcam"]


def launch(*arguments):
    """Run the worker; return the cases that it passed."""
    lines = run_checked(SUPPORT / "sharded_worker.py", *arguments).splitlines()
    return [line.removeprefix("passed: ") for line in lines if line.startswith("passed")]


def test_sharded_training_is_whole_training_with_one_collective_a_step():
    assert launch("2", "--cases", *FEW) == FEW


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "4"])
def test_sharded_training_with_every_path(processes):
    assert set(launch(processes)) > set(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [("2", "4"), ("4", "2")])
def test_a_sharded_run_goes_on_with_another_number_of_processes(processes, tmp_path):
    cases = ["nsf", "nsf none", "lcam"]
    assert launch(*processes, "--cases", *cases, "--half_a_run", str(tmp_path)) == 2 * cases


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh):
    param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    return param


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_a_sharded_parameter_without_a_gradient_gets_no_state(mesh, p):
    params = [sharded(mesh), sharded(mesh)]
    params[1].grad = None
    optimizer = NSF(params, p=p)
    optimizer.step()
    assert optimizer.state_dict()["state"].keys() == {0}
    assert torch.equal(params[1].full_tensor(), torch.ones(4, 3)) and (params[0].full_tensor() < 1).all()
