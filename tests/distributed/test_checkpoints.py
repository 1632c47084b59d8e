# SPDX-License-Identifier: Apache-2.0
"""Resuming in the less usual ways: at an epoch's boundary, with more epochs, an optimizer of the user's, SGD's state.

Refused and planted states, other batches and inexact epochs stand in tests/trainer/test_resume.py.
"""

import pytest
from kill_chain import newest_checkpoint
from tiny_run import held, make_trainer, same
from transformers import Trainer

import hf_nsf

STEPS = {"save_strategy": "steps", "save_steps": 6, "dropout": 0.1, "lr_scheduler_type": "constant"}  # 12 an epoch


def trained(folder, optimizer, resume=None, **changes):
    trainer = make_trainer(folder, optimizer, **{**STEPS, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CYCLES = {"lcam": {}, "nsf": {"optim_args": "p_min=0,cycle_steps=9"}}


@pytest.mark.parametrize("optimizer", CYCLES)
def test_at_an_epoch_boundary_and_with_more_epochs(optimizer, tmp_path):
    whole = trained(tmp_path / "a", optimizer, **CYCLES[optimizer])
    resumed = trained(tmp_path / "b", optimizer, str(tmp_path / "a" / "checkpoint-12"), **CYCLES[optimizer])
    assert same(held(resumed), held(whole)) and len(held(whole)["logs"]) == 36
    trained(tmp_path / "c", optimizer, num_train_epochs=2, **CYCLES[optimizer])
    assert same(held(trained(tmp_path / "c", optimizer, True, **CYCLES[optimizer])), held(whole))


def test_with_more_epochs_a_number_of_cycles_spans_the_new_length(tmp_path):
    trained(tmp_path, "nsf", num_train_epochs=2)
    logs = held(trained(tmp_path, "nsf", True, num_train_epochs=3))["logs"]
    expected = hf_nsf.p_schedule(range(36), p_min=-0.25, p_max=0.5, cycles=2, total_steps=36)
    assert [entry["nsf_p"] for entry in logs[24:]] == expected[24:]


def test_an_optimizer_given_as_an_object_resumes_too(tmp_path):
    def run(resume=None):
        plain = make_trainer(tmp_path, "", **STEPS)
        optimizer = hf_nsf.LCAM(plain.model.parameters(), lr=0.05)
        trainer = Trainer(plain.model, plain.args, train_dataset=plain.train_dataset, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    assert same(held(run(str(tmp_path / "checkpoint-18"))), held(whole))


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_sgds_checkpoint_is_refused_in_a_sentence(optimizer, tmp_path):
    trained(tmp_path, "sgd", max_steps=6)
    for resume in (True, str(tmp_path / "checkpoint-6")):
        with pytest.raises(ValueError, match="was saved by another optimizer"):
            trained(tmp_path, optimizer, resume)


def test_the_newest_checkpoint_that_can_be_resumed(tmp_path):
    """What the tests of killed runs resume from: a save that was interrupted is passed over."""
    trained(tmp_path, "nsf", max_steps=24)
    found = [newest_checkpoint(tmp_path, 1)]
    for step, name in ((24, "trainer_state.json"), (18, "rng_state.pth")):
        path = tmp_path / f"checkpoint-{step}" / name
        path.write_bytes(path.read_bytes()[:100])
        found.append(newest_checkpoint(tmp_path, 1))
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    found.append(newest_checkpoint(tmp_path, 1))
    assert found == [str(tmp_path / f"checkpoint-{step}") for step in (24, 18, 12, 6)]
