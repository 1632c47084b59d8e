# SPDX-License-Identifier: Apache-2.0
"""fp16's loss scaling, on a CPU too: an update that overflows leaves no trace, with fused=True either."""

import copy

import pytest
import torch
from problems import MAKERS, PATHS, needs_numba
from torch import nn
from trainer_runs import held, make_trainer, same
from transformers import TrainerCallback

from hf_nsf import LossPhase

CASES = [("lcam", path) for path in PATHS]
CASES += [pytest.param("nsf", path, marks=needs_numba if path == "fused" else ()) for path in PATHS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
POISONED = (0, 5)


@pytest.mark.parametrize(("name", "path"), [CASES[0], CASES[3], CASES[4], CASES[7]])
def test_an_update_skipped_by_the_trainer_changes_nothing(name, path, tmp_path):
    """Weights, moments, step counts, groups, phase and mean stay as they are in two of ten updates."""
    text = {"lcam": "low_loss_momentum=0.8,high_loss_momentum=0.9", "nsf": "p_min=-0.25,p_max=0.5,cycle_steps=9"}[name]
    text += "".join(f",{key}={value}" for key, value in PATHS[path].items())
    trainer = make_trainer(tmp_path, name, optim_args=text, lr_scheduler_type="constant", max_steps=10)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    snapshots = []

    class Poisons(TrainerCallback):
        """Makes a gradient infinite, as an overflow does, and notes what the optimizer holds before each update."""

        def on_step_begin(self, args, state, control, **kwargs):
            now = held(trainer)
            snapshots.append(copy.deepcopy((now["weights"], now["state"], [{**g, "params": 0} for g in now["groups"]])))

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step in POISONED:
                next(trainer.model.parameters()).grad.fill_(float("inf"))

    trainer.add_callback(Poisons())
    trainer.train()
    assert trainer.optimizer.scaler is not None and len(snapshots) == 10
    for index in range(9):
        assert same(snapshots[index], snapshots[index + 1]) == (index in POISONED), index


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_plain_loop_continues_as_without_the_skipped_update(name, path, device):
    def run(poisoned):
        torch.manual_seed(0)
        model = nn.Linear(6, 3).to(device)
        optimizer = MAKERS[name](model.parameters(), lr=0.05, **PATHS[path])
        phase = LossPhase(optimizer) if name == "lcam" else None
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=10**6)
        order = [(x, False) for x in torch.randn(12, 8, 6, generator=torch.Generator().manual_seed(1))]
        for position in reversed(poisoned):
            order.insert(position, (torch.full((8, 6), float("inf")), True))
        for x, skipped in order:
            optimizer.zero_grad()
            loss = model(x.to(device)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            assert (scaler.get_scale() < before) == skipped
            if phase is not None:
                phase.step(loss.detach(), skipped=skipped)
        return [q.detach() for q in model.parameters()], optimizer.state_dict()

    # Scales are powers of two, so that nothing is rounded.
    assert same(run([]), run([0, 4]))
