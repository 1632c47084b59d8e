# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: resumed runs equal uninterrupted ones, epochs are the Trainer's, other optimizers' are refused."""

import json

import pytest
import torch
from trainer_runs import (
    HIGH,
    LOW,
    Averages,
    Stream,
    by_the_rule,
    held,
    make_trainer,
    same,
    train_logs,
    used,
    windows,
)

import hf_nsf

SAVE = {"save_strategy": "steps", "save_steps": 1}
CYCLE = {"optim_args": "p_min=0,cycle_steps=9"}


def given(folder, optimizer, **changes):
    """A Trainer with an optimizer passed as an object."""
    model = Averages(0.2)
    extra = {"optimizers": (hf_nsf.LCAM(model.parameters(), lr=0.05), None)}
    return make_trainer(folder, "adamw", model=lambda dropout: model, extra=extra, **{**changes, "dropout": 0.2})


# Optimizer, settings, those of the part before the checkpoint, and the steps to resume from.
RUNS = {
    "around a short window": ("lcam", {"gradient_accumulation_steps": 4}, {}, (2, 3, 5)),
    "inside an epoch": ("nsf", {"gradient_accumulation_steps": 4}, {}, (5,)),
    "a stream": ("lcam", {"data": Stream(passes=99), "gradient_accumulation_steps": 2, "max_steps": 20}, {}, (7,)),
    "windows of an epoch": ("lcam", {"gradient_accumulation_steps": 16}, {}, (1,)),
    "at an epoch's end": ("nsf", CYCLE, {}, (11,)),
    "with more epochs": ("nsf", CYCLE, {"num_train_epochs": 2}, (11, 22)),
    "with more epochs, lcam": ("lcam", {}, {"num_train_epochs": 2}, (22,)),
    "an optimizer passed as an object": (given, {}, {}, (15,)),
    "bfloat16 autocast": ("lcam", {"bf16": True}, {}, (13,)),
    "bfloat16 autocast, nsf": ("nsf", {"bf16": True}, {}, (13,)),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(case, tmp_path):
    optimizer, run, first, steps = RUNS[case]
    make = optimizer if callable(optimizer) else make_trainer
    whole = make(tmp_path / "a", optimizer, **{"dropout": 0.2, **run, **SAVE})
    whole.train()
    if first:
        make(tmp_path / "first", optimizer, **{"dropout": 0.2, **run, **SAVE, **first}).train()
    for step in steps:
        checkpoint = tmp_path / ("first" if first else "a") / f"checkpoint-{step}"
        resumed = make(tmp_path / "b", optimizer, **{"dropout": 0.2, **run})
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same(held(resumed), held(whole))


def test_with_more_epochs_a_number_of_cycles_spans_the_new_length(tmp_path):
    make_trainer(tmp_path, "nsf", num_train_epochs=2, **SAVE).train()
    resumed = make_trainer(tmp_path, "nsf")
    resumed.train(resume_from_checkpoint=True)
    expected = hf_nsf.p_schedule(range(33), p_min=-0.25, p_max=0.5, cycles=2, total_steps=33)
    assert [entry["nsf_p"] for entry in train_logs(resumed)[22:]] == expected[22:]


# The second part of a run after 11 updates of 4 rows, or 7: its changes, whether it starts inside one of its epochs.
OTHER_EPOCHS = [
    (11, {}, False),
    (7, {}, True),
    (11, {"per_device_train_batch_size": 2}, True),  # 22 updates an epoch, of which 11 have been made
    (11, {"per_device_train_batch_size": 8}, True),  # 6 updates an epoch, whose second has started
    (7, {"ignore_data_skip": True}, False),  # the Trainer starts its first epoch again
    (7, {"gradient_accumulation_steps": 2}, True),
    (6, {"gradient_accumulation_steps": 2}, False),
]


@pytest.mark.parametrize(("step", "changes", "inside"), OTHER_EPOCHS)
def test_epochs_after_a_resume_are_the_trainers(step, changes, inside, tmp_path):
    first = make_trainer(tmp_path / "a", **SAVE, max_steps=step)
    first.train()
    _, (momentum, mean, _) = by_the_rule(first.events)
    resumed = make_trainer(tmp_path / "b", **changes, num_train_epochs=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert resumed.events[0] == ("resumed", step)
    accumulation = changes.get("gradient_accumulation_steps", 1)
    expected, _ = by_the_rule(resumed.events, inside, momentum, mean, most=accumulation)
    assert used(resumed.events) == expected and set(expected) == {LOW, HIGH}


def test_a_checkpoint_whose_epoch_is_not_the_trainers_is_resumed_by_its_number(tmp_path):
    """Its state.epoch is a whole number, but global_step says that the Trainer stands inside an epoch."""
    make_trainer(tmp_path / "a", **SAVE, max_steps=3).train()
    second = make_trainer(tmp_path / "b", **SAVE, ignore_data_skip=True)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    state = json.loads((tmp_path / "b" / "checkpoint-14" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.0
    group = torch.load(tmp_path / "b" / "checkpoint-14" / "optimizer.pt")["param_groups"][0]
    mean = group["loss_mean"] * group["loss_count"], group["loss_count"]
    third = make_trainer(tmp_path / "c")
    third.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-14"))
    expected, _ = by_the_rule(third.events, True, group["momentum"], mean, 1)
    assert used(third.events) == expected and windows(third.events) == [1] * 19


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_a_checkpoint_without_optimizer_state_is_warned_of_once(optimizer, tmp_path, warned):
    make_trainer(tmp_path / "a", optimizer, **SAVE, save_only_model=True, max_steps=4).train()
    resumed = make_trainer(tmp_path / "b", optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert len(warned) == 1 and "save_only_model" in warned[0]
    if optimizer == "lcam":
        assert used(resumed.events) == by_the_rule(resumed.events, True, most=1)[0]


OTHERS = [("lcam", "nsf"), ("lcam", "adamw"), ("lcam", "sgd"), ("nsf", "lcam"), ("nsf", "adamw"), ("nsf", "sgd")]


@pytest.mark.parametrize(("optimizer", "other"), OTHERS)
def test_a_checkpoint_of_another_optimizer_is_refused(optimizer, other, tmp_path):
    make_trainer(tmp_path, other, **SAVE, max_steps=2).train()
    for resume in (True, tmp_path / "checkpoint-2"):  # a pathlib.Path
        trainer = make_trainer(tmp_path, optimizer)
        with pytest.raises(ValueError, match="was saved by another optimizer") as error:
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step in (0, 2) and "\n" not in str(error.value)
