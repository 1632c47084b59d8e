# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a resumed run is the uninterrupted one, its epochs are the Trainer's, and nobody's files are read."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from trainer_runs import HIGH, LOW, OPTIMIZERS, Rows, Stream, by_the_rule, make_trainer, train_logs, used, windows

import hf_nsf  # noqa: F401

SAVE = {"save_strategy": "steps", "save_steps": 1}
LOGGED = ("loss", "step", "nsf_p", "lcam_momentum", "lcam_loss_phase", "lcam_loss_mean")


def held(trainer, after=0):
    """What must be the same bits: weights, groups, and the logs of the later updates."""
    logs = [{key: entry.get(key) for key in LOGGED} for entry in train_logs(trainer) if entry["step"] > after]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.optimizer.param_groups]
    return [q.detach().tolist() for q in trainer.model.parameters()], groups, logs


RUNS = [
    ("lcam", {"gradient_accumulation_steps": 4}, (2, 3, 5)),  # before and after a short window, before the next
    ("nsf", {"gradient_accumulation_steps": 4}, (5,)),
    ("lcam", {"data": Stream(passes=99), "gradient_accumulation_steps": 2, "max_steps": 20}, (7,)),
    ("lcam", {"gradient_accumulation_steps": 16}, (1,)),  # each update has the 11 micro-batches of an epoch
]


@pytest.mark.parametrize(("optimizer", "run", "steps"), RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(optimizer, run, steps, tmp_path):
    whole = make_trainer(tmp_path / "a", optimizer, dropout=0.2, **run, **SAVE)
    whole.train()
    for step in steps:
        resumed = make_trainer(tmp_path / "b", optimizer, dropout=0.2, **run)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert held(resumed, step) == held(whole, step)


# The second part of a run after 11 updates of 4 rows, or 7: its changes, whether it begins inside one of its epochs.
OTHER_EPOCHS = [
    (11, {}, False),
    (7, {}, True),
    (11, {"per_device_train_batch_size": 2}, True),  # 22 updates an epoch, of which 11 have been made
    (11, {"per_device_train_batch_size": 8}, True),  # 6 updates an epoch, whose second has begun
    (7, {"ignore_data_skip": True}, False),  # the Trainer begins its first epoch again
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
def test_a_checkpoint_without_optimizer_state_is_told_once(optimizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_nsf.trainer.callback.logger.warning_once", lambda text: text in said or said.append(text))
    make_trainer(tmp_path / "a", optimizer, **SAVE, save_only_model=True, max_steps=4).train()
    resumed = make_trainer(tmp_path / "b", optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert len(said) == 1 and "save_only_model" in said[0]
    if optimizer == "lcam":
        assert used(resumed.events) == by_the_rule(resumed.events, True, most=1)[0]


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
@pytest.mark.parametrize("other", ["lcam", "nsf", "adamw"])
def test_a_checkpoint_of_another_optimizer_is_refused(optimizer, other, tmp_path):
    if optimizer == other:
        pytest.skip("the same")
    make_trainer(tmp_path / "a", other, **SAVE, max_steps=2).train()
    trainer = make_trainer(tmp_path / "b", optimizer)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")  # a pathlib.Path
    assert trainer.state.global_step in (0, 2) and "\n" not in str(error.value)


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resume_executes_no_planted_pickle(optimizer, tmp_path):
    make_trainer(tmp_path / "a", optimizer, **SAVE, max_steps=2).train()
    folder = tmp_path / "a" / "checkpoint-2" / "optimizer_0"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    for checkpoint in (str(folder.parent), True):
        resumed = make_trainer(tmp_path / "a", optimizer, max_steps=4)
        resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 4 and not (tmp_path / "executed").exists()


def test_adamws_checkpoint_of_torchs_old_file_format_is_resumed(tmp_path):
    make_trainer(tmp_path / "a", "adamw", **SAVE, max_steps=2).train()
    path = tmp_path / "a" / "checkpoint-2" / "optimizer.pt"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    resumed = make_trainer(tmp_path / "b", "adamw", data=Rows(), max_steps=4)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert resumed.state.global_step == 4
