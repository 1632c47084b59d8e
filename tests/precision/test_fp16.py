# SPDX-License-Identifier: Apache-2.0
"""fp16's loss scaling, with the CPU's GradScaler: an update that overflows leaves no trace."""

import copy

import pytest
import torch
from tiny_run import held, make_trainer, same
from torch import nn

import hf_nsf
from hf_nsf import LCAM, NSF, LossPhase, PCycle
from hf_nsf.optim.nsf import compiled_loops

PATHS = [
    ("lcam", {}),
    ("lcam", {"foreach": True}),
    ("lcam", {"fused": True}),
    ("lcam", {"foreach": False}),
    ("nsf", {}),
    ("nsf", {"foreach": True}),
    ("nsf", {"foreach": False}),
    pytest.param("nsf", {"fused": True}, marks=pytest.mark.skipif(compiled_loops() is None, reason="needs numba")),
]
IDS = [
    "lcam-default", "lcam-foreach", "lcam-fused", "lcam-single",
    "nsf-default", "nsf-foreach", "nsf-single", "nsf-fused",
]  # fmt: skip


class Poisoned:
    """Makes a gradient infinite before the given updates, as an overflow does."""

    def __init__(self, trainer, updates):
        self.updates, self.count = updates, 0
        training_step = trainer.training_step

        def step(*args, **kwargs):
            loss = training_step(*args, **kwargs)
            if self.count in self.updates:
                next(trainer.model.parameters()).grad.fill_(float("inf"))
            self.count += 1
            return loss

        trainer.training_step = step


@pytest.mark.parametrize(("name", "options"), PATHS, ids=IDS)
@pytest.mark.parametrize("poisoned", [(0, 5), (7,)], ids=["first and sixth", "eighth"])
def test_trainer_skips_without_a_trace(name, options, poisoned, tmp_path):
    of_path = "".join(f",{key}={value}" for key, value in options.items())
    text = {"lcam": "low_loss_momentum=0.8,high_loss_momentum=0.9", "nsf": "p_min=-0.25,p_max=0.5,cycle_steps=9"}[name]
    trainer = make_trainer(tmp_path, name, optim_args=f"{text}{of_path}", lr_scheduler_type="constant", max_steps=20)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    snapshots = []

    class Looks(hf_nsf.SpectralCallback.__mro__[1]):
        def on_step_begin(self, args, state, control, **kwargs):
            snapshots.append(copy.deepcopy((held(trainer)["weights"], held(trainer)["state"], groups(trainer))))

    trainer.add_callback(Looks())
    Poisoned(trainer, poisoned)
    trainer.train()
    assert all(trainer.optimizer.optimizer.param_groups[0][key] == value for key, value in options.items())
    assert trainer.optimizer.scaler is not None and len(snapshots) == 20
    for index in range(19):
        assert same(snapshots[index], snapshots[index + 1]) == (index in poisoned), index


def groups(trainer):
    skip = ("params", "loss_window")
    return [{k: v for k, v in g.items() if k not in skip} for g in held(trainer)["groups"]]


@pytest.mark.parametrize(("name", "options"), PATHS, ids=IDS)
def test_plain_loop_is_as_if_the_skipped_update_had_not_been(name, options):
    def run(poisoned):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = {"lcam": LCAM, "nsf": NSF}[name](model.parameters(), lr=0.05, **options)
        control = LossPhase(optimizer) if name == "lcam" else PCycle(optimizer, cycle_steps=5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
        data = torch.randn(12, 8, 6, generator=torch.Generator().manual_seed(1))
        order = [(x, False) for x in data]
        for position in reversed(poisoned):
            order.insert(position, (torch.full((8, 6), float("inf")), True))
        for x, skipped in order:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            assert (scaler.get_scale() < before) == skipped
            if name == "lcam":
                control.step(loss.detach(), skipped=skipped)
            elif not skipped:
                control.step()
        return [*model.parameters()], optimizer.state_dict()

    (a, state_a), (b, state_b) = run([]), run([0, 4])
    # Scales are powers of two, so that nothing is rounded.
    assert same(a, b) and same(state_a, state_b)
