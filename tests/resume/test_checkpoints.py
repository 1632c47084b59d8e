# SPDX-License-Identifier: Apache-2.0
"""Resuming in the less usual ways: epoch boundaries, more epochs, parts of a checkpoint, another optimizer's state."""

import os
import shutil

import pytest
import torch
from tiny_run import held, make_trainer, same
from transformers import Trainer

import hf_nsf
from hf_nsf.trainer.checkpoints import is_whole, last_whole_checkpoint

OURS = ["lcam", "nsf"]
STEPS = {"save_strategy": "steps", "save_steps": 6, "dropout": 0.1, "lr_scheduler_type": "constant"}  # 12 an epoch


def trained(folder, optimizer, resume=None, **changes):
    trainer = make_trainer(folder, optimizer, **{**STEPS, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("optimizer", OURS)
def test_at_an_epoch_boundary(optimizer, tmp_path):
    whole = trained(tmp_path / "a", optimizer)
    resumed = trained(tmp_path / "b", optimizer, resume=str(tmp_path / "a" / "checkpoint-12"))
    assert same(held(resumed), held(whole)) and len(held(whole)["logs"]) == 36


@pytest.mark.parametrize(("optimizer", "options"), [("lcam", {}), ("nsf", {"optim_args": "p_min=0,cycle_steps=9"})])
def test_with_more_epochs(optimizer, options, tmp_path):
    trained(tmp_path / "a", optimizer, num_train_epochs=2, **options)
    longer = trained(tmp_path / "a", optimizer, resume=True, num_train_epochs=3, **options)
    assert same(held(longer), held(trained(tmp_path / "b", optimizer, num_train_epochs=3, **options)))


def test_with_more_epochs_a_number_of_cycles_spans_the_new_length(tmp_path):
    trained(tmp_path, "nsf", num_train_epochs=2)
    logs = held(trained(tmp_path, "nsf", resume=True, num_train_epochs=3))["logs"]
    expected = hf_nsf.p_schedule(range(36), p_min=-0.25, p_max=0.5, cycles=2, total_steps=36)
    assert [entry["nsf_p"] for entry in logs[25:]] == expected[25:]


@pytest.mark.parametrize("optimizer", OURS)
def test_save_only_model_says_what_is_lost(optimizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_nsf.trainer.callback.logger.warning", said.append)
    trained(tmp_path, optimizer, save_only_model=True)
    assert not said
    logs = held(trained(tmp_path, optimizer, resume=str(tmp_path / "checkpoint-18"), save_only_model=True))["logs"]
    assert len(said) == 1 and "lost" in said[0] and len(logs) == 36
    if optimizer == "nsf":
        assert logs[18]["nsf_p"] == hf_nsf.p_schedule([18], p_min=-0.25, p_max=0.5, cycles=2, total_steps=36)[0]
    else:
        assert logs[18]["lcam_momentum"] == 0.9 and "lcam_loss_mean" not in logs[18]


def _without_state(folder):
    os.remove(folder / "trainer_state.json")


def _state_cut(folder):
    os.truncate(folder / "trainer_state.json", 100)


def _optimizer_cut(folder):
    os.truncate(folder / "optimizer.pt", (folder / "optimizer.pt").stat().st_size // 2)


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("optimizer", OURS)
@pytest.mark.parametrize("damage", [_without_state, _state_cut, _optimizer_cut, _empty])
def test_a_save_that_was_interrupted_is_passed_over(damage, optimizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_nsf.trainer.registry.logger.warning", said.append)
    whole = trained(tmp_path, optimizer)
    damage(tmp_path / "checkpoint-36")
    damage(tmp_path / "checkpoint-30")
    resumed = trained(tmp_path, optimizer, resume=True)
    assert same(held(resumed), held(whole))
    assert len(said) == 1 and "checkpoint-30" in said[0] and said[0].endswith("checkpoint-24.")


def test_without_any_whole_checkpoint_the_trainer_says_so(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        os.makedirs(tmp_path / "empty")
        trained(tmp_path / "empty", "nsf", resume=True)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("adamw", "nsf"), ("nsf", "adamw"), ("sgd", "lcam"), ("lcam", "sgd"), ("lcam", "nsf"), ("nsf", "lcam")],
)
def test_another_optimizers_checkpoint_is_refused_in_a_sentence(saved, loaded, tmp_path):
    trained(tmp_path, saved, max_steps=6)
    with pytest.raises(ValueError, match="holds the optimizer state of .* this run trains with"):
        trained(tmp_path, loaded, resume=True)
    with pytest.raises(ValueError, match="holds the optimizer state of .* this run trains with"):
        trained(tmp_path, loaded, resume=str(tmp_path / "checkpoint-6"))


def test_an_optimizer_given_as_an_object_resumes_too(tmp_path):
    def run(resume=None):
        plain = make_trainer(tmp_path, "", **STEPS)
        optimizer = hf_nsf.LCAM(plain.model.parameters(), lr=0.05)
        trainer = Trainer(plain.model, plain.args, train_dataset=plain.train_dataset, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    assert same(held(run(str(tmp_path / "checkpoint-18"))), held(whole))


def test_other_optimizers_are_left_to_the_trainer(tmp_path):
    trained(tmp_path, "adamw", max_steps=12)
    resumed = trained(tmp_path, "adamw", resume=True, max_steps=18)
    assert resumed.state.global_step == 18
    os.remove(tmp_path / "checkpoint-18" / "trainer_state.json")
    with pytest.raises(FileNotFoundError):
        trained(tmp_path, "adamw", resume=True)
    assert torch.isfinite(next(resumed.model.parameters())).all()


@pytest.mark.parametrize("optimizer", OURS)
def test_a_save_of_several_processes_is_whole_with_the_random_states_of_them_all(optimizer, tmp_path):
    """Whatever the number of processes that resume: it is the saving ones that count, and they are in the groups."""
    trained(tmp_path, optimizer, num_train_epochs=1)
    newest = tmp_path / "checkpoint-12"
    assert is_whole(str(newest))
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    assert [group["processes"] for group in state["param_groups"]] == [1] * len(state["param_groups"])
    for group in state["param_groups"]:
        group["processes"] = 2
    torch.save(state, newest / "optimizer.pt")
    os.rename(newest / "rng_state.pth", newest / "rng_state_0.pth")
    assert last_whole_checkpoint(str(tmp_path)) == (str(tmp_path / "checkpoint-6"), [str(newest)])
    shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
    assert last_whole_checkpoint(str(tmp_path)) == (str(newest), [])
