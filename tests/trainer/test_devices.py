# SPDX-License-Identifier: Apache-2.0
"""What holds on a GPU, where there is one."""

import pytest
import torch
from problems import MAKERS, PATHS, drive, identical, make_nsf, make_parameters, relative_error
from tiny_run import make_trainer

from hf_nsf import LCAM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parameters(dtype=torch.float32, device="cuda"):
    params = make_parameters(dtype, gaps=False)
    for q in params:
        q.data = q.data.to(device)
    return params


@pytest.mark.parametrize("grafting", ["adam", "none"])
@pytest.mark.parametrize("path", PATHS)
def test_nsf_on_a_gpu_is_the_one_in_float64(path, grafting):
    ours, exact = parameters(), parameters(torch.float64, "cpu")
    drive(make_nsf(ours, grafting=grafting, **PATHS[path]), ours, 20)
    drive(make_nsf(exact, grafting=grafting, foreach=False), exact, 20)
    assert relative_error([q.cpu() for q in ours], exact) <= 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_lcam_on_a_gpu_is_sgd_on_it(path):
    ours, theirs = parameters(), parameters()
    drive(LCAM(ours, lr=0.1, low_loss_momentum=0.9, high_loss_momentum=0.9, **PATHS[path]), ours, 20)
    drive(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, **PATHS[path]), theirs, 20)
    assert identical(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nsf", "none", "lcam"])
def test_a_step_waits_for_no_gpu(name, dtype):
    params = parameters(dtype)
    optimizer = make_nsf(params, grafting="none") if name == "none" else MAKERS[name](params)
    for q in params:
        q.grad = torch.ones_like(q)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["nsf", "lcam"])
def test_the_trainer_in_mixed_precision(name, precision, tmp_path):
    trainer = make_trainer(tmp_path, name, use_cpu=False, **{precision: True})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    half = len(losses) // 2
    assert sum(losses[half:]) < sum(losses[:half])
    state = next(iter(trainer.optimizer.optimizer.state.values()))
    assert state["exp_avg" if name == "nsf" else "momentum_buffer"].dtype == torch.float32
