# SPDX-License-Identifier: Apache-2.0
"""Runs of a stock Trainer: logged values, losses used, ways to pass the optimizer, warnings, added callbacks."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from trainer_runs import (
    HIGH,
    LOW,
    Averages,
    Rows,
    Watched,
    arguments,
    by_the_rule,
    check,
    check_learning,
    check_rule,
    held,
    make_trainer,
    same,
    train_logs,
    used,
)
from transformers import Trainer, TrainerCallback
from transformers import trainer as host
from transformers.trainer_callback import DefaultFlowCallback

import hf_nsf

CYCLE = {"p_min": -0.25, "p_max": 0.5, "cycles": 2}
OURS = pytest.mark.parametrize("optimizer", ["lcam", "nsf"])


class Sees(TrainerCallback):
    """Counts the logs in which a callback of the user's finds our values."""

    count = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.count += bool({"nsf_p", "lcam_momentum"} & logs.keys())


@OURS
def test_a_run_learns_and_logs_the_values_used(optimizer, tmp_path, warned):
    sees = Sees()
    trainer = make_trainer(tmp_path, optimizer, extra={"callbacks": [sees]})
    trainer.train()
    check(trainer, optimizer, 33)
    check_learning(trainer, 11)
    assert sees.count == 33
    logs = train_logs(trainer)
    if optimizer == "lcam":
        assert [LOW if entry["lcam_loss_phase"] else HIGH for entry in logs] == used(trainer.events)
        for i in range(1, 33):
            losses = [entry["loss"] for entry in logs[(i - 1) // 11 * 11 : i]]
            assert logs[i]["lcam_loss_mean"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert not any(key in trainer.state.log_history[-1] for key in ("nsf_p", "lcam_momentum"))  # the run's summary
    trainer.save_state()
    with open(tmp_path / "trainer_state.json") as file:
        key = "nsf_p" if optimizer == "nsf" else "lcam_momentum"
        assert sum(key in entry for entry in json.load(file)["log_history"]) == 33
    assert not warned and not {"training_step", "train"} & vars(trainer).keys()


class OwnStep(Trainer):
    """A training_step that does not call its parent's."""

    events = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = 3 * model(**self._prepare_inputs(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class Reports(OwnStep):
    """Follows the warning's advice."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        hf_nsf.PhaseCallback.from_trainer(self).observe(loss)
        return loss


class Renames(Watched):
    """Logs its training loss under another key, as SetFit does."""

    def log(self, logs, *args, **kwargs):
        super().log({"embedding_loss" if key == "loss" else key: value for key, value in logs.items()}, *args, **kwargs)


def other_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels) + 0.5


LOSSES = {
    "compute_loss_func": (Watched, {}, {"compute_loss_func": other_loss}),
    "training_step that reports": (Reports, {}, {}),
    "another key": (Renames, {}, {}),
    "evaluation inside": (Watched, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_dataset": Rows(8)}),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_used_is_the_loss_logged(case, tmp_path, warned):
    cls, changes, extra = LOSSES[case]
    trainer = make_trainer(tmp_path, cls=cls, extra=extra, **changes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    events = []
    for index, entry in enumerate(logs):
        loss = torch.tensor(entry["embedding_loss" if cls is Renames else "loss"])
        events += [("epoch", None)] * (index % 11 == 0) + [("loss", loss), ("momentum", None), ("update", 1)]
    expected, _ = by_the_rule(events)
    assert [entry["lcam_momentum"] for entry in logs] == expected
    assert len(logs) == 33 and set(expected) == {LOW, HIGH} and not warned


@OURS
def test_a_second_training_starts_anew(optimizer, tmp_path):
    """LCAM's phase and NSF's cycle."""
    trainer = make_trainer(tmp_path, optimizer)
    for _ in range(2):
        trainer.train()
        check(trainer, optimizer, 33)


@pytest.mark.parametrize("removed", [False, True])
def test_other_optimizers_are_left_alone(removed, tmp_path):
    trainer = make_trainer(tmp_path, "adamw", max_steps=3)
    if removed:
        trainer.remove_callback(hf_nsf.PhaseCallback)
    trainer.train()
    assert (hf_nsf.PhaseCallback.from_trainer(trainer) is None) == removed  # none is added
    assert not [key for entry in trainer.state.log_history for key in entry if "nsf" in key or "lcam" in key]
    assert "total_steps" not in trainer.optimizer.optimizer.param_groups[0]


@OURS
@pytest.mark.parametrize("given", ["class", "instance"])
def test_an_optimizer_passed_without_the_name_is_driven_too(optimizer, given, tmp_path):
    cls, options = {
        "lcam": (hf_nsf.LCAM, {"lr": 0.1, "low_loss_momentum": LOW, "high_loss_momentum": HIGH}),
        "nsf": (hf_nsf.NSF, {"lr": 1e-2, **CYCLE}),
    }[optimizer]
    model = Averages()
    if given == "class":
        extra = {"optimizer_cls_and_kwargs": (cls, options)}
    else:
        extra = {"optimizers": (cls(model.parameters(), **options), None)}
    trainer = make_trainer(tmp_path, "adamw", model=lambda dropout: model, extra=extra)
    trainer.train()
    check(trainer, optimizer, 33)
    if optimizer == "nsf":  # groups added later know the length of the run, too
        trainer.optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        assert {group["total_steps"] for group in trainer.optimizer.optimizer.param_groups} == {33}


@OURS
@pytest.mark.parametrize("changes", [{"num_train_epochs": 0}, {"max_steps": 0}], ids=str)
def test_a_training_of_no_length_returns(optimizer, changes, tmp_path):
    """With max_steps=0 the Trainer makes one update with any optimizer."""
    trainer = make_trainer(tmp_path, optimizer, **changes)
    before = [q.detach().clone() for q in trainer.model.parameters()]
    result = trainer.train()
    assert result.global_step == trainer.state.global_step == ("max_steps" in changes)
    if not result.global_step:
        assert all(map(torch.equal, before, trainer.model.parameters()))


@OURS
def test_a_second_callback_counts_no_loss_twice(optimizer, tmp_path, warned):
    """The losses go to the last one, which may be of a subclass."""

    class Mine(hf_nsf.PhaseCallback):
        def observe(self, loss):
            self.count = getattr(self, "count", 0) + 1
            super().observe(loss)

    for callbacks in ([hf_nsf.PhaseCallback()], [hf_nsf.PhaseCallback, Mine()]):
        trainer = make_trainer(tmp_path, optimizer, extra={"callbacks": list(callbacks)})
        trainer.train()
        check(trainer, optimizer, 33)
    assert callbacks[-1] is hf_nsf.PhaseCallback.from_trainer(trainer) and callbacks[-1].count == 33 and not warned


@OURS
@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_missing_callback_is_added_first(how, optimizer, tmp_path, warned, monkeypatch):
    """It also continues a run inside or at the end of an epoch, and the user's callbacks see its values."""
    if how == "replaced":  # transformers' default callbacks, as ms-swift does
        monkeypatch.setattr(host, "DEFAULT_CALLBACKS", [type("Flow", (DefaultFlowCallback,), {})])

    def make(name, **changes):
        trainer = make_trainer(tmp_path / name, optimizer, dropout=0.2, gradient_accumulation_steps=4, **changes)
        if how == "removed":
            trainer.remove_callback(hf_nsf.PhaseCallback)
        assert not any(isinstance(each, hf_nsf.PhaseCallback) for each in trainer.callback_handler.callbacks)
        return trainer

    sees = Sees()
    whole = make("whole", extra={"callbacks": [sees]}, save_strategy="steps", save_steps=1)
    whole.train()
    check(whole, optimizer, 9)
    assert sees.count == 9 and isinstance(whole.callback_handler.callbacks[0], hf_nsf.PhaseCallback)
    for step in (2, 3):
        resumed = make("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(held(resumed), held(whole))
    assert not warned


@pytest.mark.parametrize("optimizer", ["lcam", "adamw"])
@pytest.mark.parametrize("registered", [True, False])
def test_the_state_is_saved_where_the_environment_asks(optimizer, registered, tmp_path, monkeypatch):
    """By a default callback, or by one that is added if the variable is set later. Without it there is none."""
    make_trainer(tmp_path, optimizer, max_steps=2).train()
    monkeypatch.setenv("HF_NSF_SAVE_STATE", str(tmp_path / "state.json"))
    try:
        if registered:
            hf_nsf.register()
        trainer = make_trainer(tmp_path, optimizer, max_steps=2)
        names = [type(each).__name__ for each in trainer.callback_handler.callbacks]
        assert names.count("SaveState") == registered and not (tmp_path / "state.json").exists()
        trainer.train()
    finally:
        monkeypatch.delenv("HF_NSF_SAVE_STATE")
        hf_nsf.register()
    names = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    assert names.count("SaveState") == 1 and "SaveState" not in [each.__name__ for each in host.DEFAULT_CALLBACKS]
    logs = json.loads((tmp_path / "state.json").read_text())["log_history"]
    assert logs == trainer.state.log_history and len(logs) == 3


def test_a_training_step_without_its_parents_is_warned_of_once(tmp_path, warned):
    trainer = make_trainer(tmp_path, cls=OwnStep, num_train_epochs=1)
    trainer.train()
    assert len(warned) == 1 and "PhaseCallback.from_trainer(self).observe(loss)" in warned[0]
    assert {entry["lcam_momentum"] for entry in train_logs(trainer)} == {HIGH}


SCHEDULERS = [
    (OneCycleLR, {"max_lr": 0.1, "total_steps": 40}, 1),
    (OneCycleLR, {"max_lr": 0.1, "total_steps": 40, "cycle_momentum": False}, 0),
    (CyclicLR, {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4}, 1),
]


@pytest.mark.parametrize(("cls", "options", "count"), SCHEDULERS)
def test_a_scheduler_that_writes_the_momentum_is_warned_of_once(cls, options, count, tmp_path):
    model = Averages()
    optimizer = hf_nsf.LCAM(model.parameters(), lr=0.1, low_loss_momentum=LOW, high_loss_momentum=HIGH)
    extra = {"optimizers": (optimizer, cls(optimizer, **options))}
    trainer = make_trainer(tmp_path, model=lambda dropout: model, extra=extra)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    assert ["OneCycleLR" in str(each.message) for each in seen if "LCAM" in str(each.message)] == [True] * count
    assert [entry["lcam_momentum"] for entry in train_logs(trainer)] == used(trainer.events)  # the values used
    if not count:
        check_rule(trainer)


@OURS
@pytest.mark.parametrize("text", ["p=0.5,", "momentun=0.9", "p", "p=1_0", "fused=true,foreach=true"])
def test_invalid_options_are_refused_when_the_trainer_is_made(text, optimizer, tmp_path):
    with pytest.raises(ValueError, match="Invalid"):
        Trainer(model=Averages(), args=arguments(tmp_path, optimizer, optim_args=text), train_dataset=Rows())


@OURS
@pytest.mark.parametrize("text", ["  ", "\t", "", "foreach=None", "foreach=false"])
def test_options_are_read_and_the_arguments_stay(text, optimizer, tmp_path):
    """But for blanks, on which the Trainer's own parser fails."""
    trainer = make_trainer(tmp_path, optimizer, optim_args=text, max_steps=2)
    trainer.train()
    assert trainer.args.optim_args == (None if text.isspace() else text)
    group = trainer.optimizer.optimizer.param_groups[0]
    q, rate = [nn.Parameter(torch.zeros(1))], trainer.args.learning_rate
    plain = hf_nsf.LCAM(q, rate) if optimizer == "lcam" else hf_nsf.NSF(q, rate, weight_decay=0.0, total_steps=2)
    expected = {**plain.defaults, "foreach": False if "false" in text else None}
    written = ("momentum", "loss_count", "loss_mean", "loss_phase")
    assert all(group[name] == value for name, value in expected.items() if name not in written)


@OURS
def test_arguments_of_the_trainer_reach_the_optimizer(optimizer, tmp_path):
    changes = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "learning_rate": 0.02}
    trainer = make_trainer(tmp_path, optimizer, **changes)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["lr"] == 0.02
    if optimizer == "nsf":
        assert groups[0]["betas"] == (0.8, 0.95) and groups[0]["eps"] == 1e-6
