# SPDX-License-Identifier: Apache-2.0
"""fp16's loss scaling, on a CPU too: an update that overflows leaves no trace, with fused=True either."""

import copy

import pytest
import torch
from problems import CASES, PATHS
from trainer_runs import held, make_trainer, same
from transformers import TrainerCallback

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
POISONED = (0, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "path"), CASES)
def test_an_update_skipped_by_the_trainer_changes_nothing(name, path, device, tmp_path):
    """Weights, moments, step counts, groups, phase and mean stay as they are in two of ten updates."""
    text = {"lcam": "low_loss_momentum=0.8,high_loss_momentum=0.9", "nsf": "p_min=-0.25,p_max=0.5,cycle_steps=9"}[name]
    text += "".join(f",{key}={value}" for key, value in PATHS[path].items())
    trainer = make_trainer(tmp_path, name, optim_args=text, max_steps=10, use_cpu=device == "cpu")
    trainer.accelerator.scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    trainer.accelerator.native_amp = True
    snapshots = []

    class Poisons(TrainerCallback):
        """Makes a gradient infinite, as an overflow does, and notes what the optimizer holds before each update."""

        def on_step_begin(self, args, state, control, **kwargs):
            now = held(trainer)
            snapshots.append(copy.deepcopy((now["weights"], now["state"], now["groups"])))

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step in POISONED:
                next(trainer.model.parameters()).grad.fill_(float("inf"))

    trainer.add_callback(Poisons())
    trainer.train()
    assert trainer.optimizer.scaler is not None and len(snapshots) == 10
    for index in range(9):
        assert same(snapshots[index], snapshots[index + 1]) == (index in POISONED), index
