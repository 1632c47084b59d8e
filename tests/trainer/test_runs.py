# SPDX-License-Identifier: Apache-2.0
"""Real runs of a stock Trainer: what it logs, whose losses it hears, how the optimizer may be given, what is told."""

import json
import os
import types

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from trainer_runs import (
    HIGH,
    LOW,
    OPTIMIZERS,
    Averages,
    Rows,
    Watched,
    arguments,
    by_the_rule,
    check_rule,
    make_trainer,
    train_logs,
    used,
)
from transformers import Trainer

import hf_nsf

CYCLE = {"p_min": -0.25, "p_max": 0.5, "cycles": 2}


@pytest.fixture
def told(monkeypatch):
    """What has been warned of."""
    said = []
    once = lambda text: text in said or said.append(text)  # noqa: E731
    for module in ("callback", "registry"):
        monkeypatch.setattr(f"hf_nsf.trainer.{module}.logger.warning_once", once)
    return said


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_a_run_learns_and_logs_what_it_used(optimizer, tmp_path, told):
    trainer = make_trainer(tmp_path, optimizer)
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 33 and sum(e["loss"] for e in logs[-11:]) < sum(e["loss"] for e in logs[:11])
    if optimizer == "nsf":
        assert [entry["nsf_p"] for entry in logs] == hf_nsf.p_schedule(range(33), **CYCLE, total_steps=33)
    else:
        check_rule(trainer)
        assert [entry["lcam_momentum"] for entry in logs] == used(trainer.events)
        assert [LOW if entry["lcam_loss_phase"] else HIGH for entry in logs] == used(trainer.events)
        for i in range(1, 33):
            losses = [entry["loss"] for entry in logs[(i - 1) // 11 * 11 : i]]
            assert logs[i]["lcam_loss_mean"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    trainer.save_state()
    with open(tmp_path / "trainer_state.json") as file:
        key = "nsf_p" if optimizer == "nsf" else "lcam_momentum"
        assert sum(key in entry for entry in json.load(file)["log_history"]) == 33
    assert not told and not {"training_step", "train"} & vars(trainer).keys()


class OwnLoss(Watched):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = 2 * outputs["loss"] + 1
        return (loss, outputs) if return_outputs else loss


class OwnStep(Trainer):
    """A training_step that does not call its parent's."""

    events = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = 3 * model(**self._prepare_inputs(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class HandsOver(OwnStep):
    """Does as the warning says."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        hf_nsf.PhaseCallback.from_trainer(self).observe(loss)
        return loss


class Configured(Averages):
    config = types.SimpleNamespace()  # label smoothing looks into it


def other_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels) + 0.5


LOSSES = [
    ("label smoothing", Watched, {"label_smoothing_factor": 0.2, "model": Configured}, {}),
    ("compute_loss_func", Watched, {}, {"compute_loss_func": other_loss}),
    ("compute_loss", OwnLoss, {}, {}),
    ("training_step that hands over", HandsOver, {}, {}),
    ("evaluation inside", Watched, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_dataset": Rows(8)}),
]


@pytest.mark.parametrize(("cls", "changes", "extra"), [case[1:] for case in LOSSES], ids=[case[0] for case in LOSSES])
def test_the_loss_used_is_the_loss_logged(cls, changes, extra, tmp_path, told):
    trainer = make_trainer(tmp_path, cls=cls, extra=extra, **changes)
    trainer.train()
    logs = train_logs(trainer)
    events = []
    for i, entry in enumerate(logs):
        epoch = [("epoch", None)] if i % 11 == 0 else []
        events += [*epoch, ("momentum", None), ("loss", torch.tensor(entry["loss"])), ("update", 1)]
    expected, _ = by_the_rule(events)
    assert [entry["lcam_momentum"] for entry in logs] == expected
    assert len(logs) == 33 and set(expected) == {LOW, HIGH} and not told


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_a_second_training_begins_anew(optimizer, tmp_path):
    """LCAM's phase begins anew; NSF's cycle goes on with its parameters' updates, of which a training has two whole."""
    trainer = make_trainer(tmp_path, optimizer)
    for run in range(2):
        trainer.train()
        if optimizer == "lcam":
            check_rule(trainer)
        else:
            schedule = hf_nsf.p_schedule(range(33 * run, 33 * run + 33), **CYCLE, total_steps=33)
            assert [entry["nsf_p"] for entry in train_logs(trainer)] == schedule


def test_other_optimizers_are_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, "adamw", max_steps=3)
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if "nsf" in key or "lcam" in key]
    assert "total_steps" not in trainer.optimizer.optimizer.param_groups[0]


def test_defaults_are_a_narrow_cycle_that_begins_as_adam(tmp_path):
    trainer = make_trainer(tmp_path, "nsf", optim_args=None)
    trainer.train()
    logs = train_logs(trainer)
    assert [entry["nsf_p"] for entry in logs] == hf_nsf.p_schedule(range(33), total_steps=33)
    assert logs[0]["nsf_p"] == 0.5 and trainer.optimizer.optimizer.param_groups[0]["total_steps"] == 33


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
@pytest.mark.parametrize("given", ["class", "instance"])
def test_an_optimizer_given_without_the_name_is_driven_too(optimizer, given, tmp_path):
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
    assert type(trainer.optimizer.optimizer) is cls
    logs = train_logs(trainer)
    if optimizer == "nsf":
        assert [entry["nsf_p"] for entry in logs] == hf_nsf.p_schedule(range(33), **CYCLE, total_steps=33)
    else:
        check_rule(trainer)
        assert [entry["lcam_momentum"] for entry in logs] == used(trainer.events)


def test_a_constant_p_of_the_users_instance_stays(tmp_path):
    model = Averages()
    extra = {"optimizers": (hf_nsf.NSF(model.parameters(), p=0.125), None)}
    trainer = make_trainer(tmp_path, "adamw", model=lambda dropout: model, extra=extra, max_steps=5)
    trainer.train()
    assert [entry["nsf_p"] for entry in train_logs(trainer)] == [0.125] * 5


@pytest.mark.parametrize("optimizer", ["lcam", "nsf", "adamw"])
@pytest.mark.parametrize("changes", [{"num_train_epochs": 0}, {"max_steps": 0}], ids=str)
def test_a_training_of_no_length_returns(optimizer, changes, tmp_path):
    """With max_steps=0 the Trainer makes one update with any optimizer."""
    trainer = make_trainer(tmp_path, optimizer, **changes)
    before = [q.detach().clone() for q in trainer.model.parameters()]
    result = trainer.train()
    assert result.global_step == trainer.state.global_step == ("max_steps" in changes)
    if not result.global_step:
        assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_a_second_callback_counts_no_loss_twice(optimizer, tmp_path, told):
    """The losses go to the last one, which may be of a class of the user's."""

    class Mine(hf_nsf.PhaseCallback):
        def observe(self, loss):
            self.count = getattr(self, "count", 0) + 1
            super().observe(loss)

    found = []
    for callbacks in ([], [hf_nsf.PhaseCallback()], [hf_nsf.PhaseCallback, Mine()]):
        trainer = make_trainer(tmp_path, optimizer, extra={"callbacks": list(callbacks)}, num_train_epochs=1)
        trainer.train()
        if optimizer == "lcam":
            check_rule(trainer)
        keys = ("loss", "nsf_p", "lcam_momentum", "lcam_loss_mean")
        found.append([{key: entry.get(key) for key in keys} for entry in train_logs(trainer)])
    assert found[0] == found[1] == found[2] and len(found[0]) == 11 and not told
    assert callbacks[-1] is hf_nsf.PhaseCallback.from_trainer(trainer) and callbacks[-1].count == 11


def test_a_training_step_without_its_parents_is_told_once_what_to_do(tmp_path, told):
    trainer = make_trainer(tmp_path, cls=OwnStep, num_train_epochs=1)
    trainer.train()
    assert len(told) == 1 and "PhaseCallback.from_trainer(self).observe(loss)" in told[0]
    assert {entry["lcam_momentum"] for entry in train_logs(trainer)} == {HIGH}


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_a_removed_callback_is_told(optimizer, tmp_path, told):
    trainer = make_trainer(tmp_path, optimizer, max_steps=2, optim_args=None)
    trainer.remove_callback(hf_nsf.PhaseCallback)
    trainer.train()
    assert set(told) and all("add_callback(hf_nsf.PhaseCallback)" in text for text in told)


SCHEDULERS = [
    (OneCycleLR, {"max_lr": 0.1, "total_steps": 40}, 1),
    (OneCycleLR, {"max_lr": 0.1, "total_steps": 40, "cycle_momentum": False}, 0),
    (CyclicLR, {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4}, 1),
]


@pytest.mark.parametrize(("cls", "options", "warnings"), SCHEDULERS)
def test_a_scheduler_that_writes_the_momentum_is_told_once(cls, options, warnings, tmp_path, told):
    model = Averages()
    optimizer = hf_nsf.LCAM(model.parameters(), lr=0.1, low_loss_momentum=LOW, high_loss_momentum=HIGH)
    extra = {"optimizers": (optimizer, cls(optimizer, **options))}
    trainer = make_trainer(tmp_path, model=lambda dropout: model, extra=extra)
    trainer.train()
    assert len(told) == warnings and all("OneCycleLR" in text for text in told)
    assert [entry["lcam_momentum"] for entry in train_logs(trainer)] == used(trainer.events)  # the truth is logged
    if not warnings:
        check_rule(trainer)


def test_tensorboard_receives_the_keys(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make_trainer(tmp_path, "nsf", max_steps=4, report_to="tensorboard").train()
    tags = set()
    for folder in {os.path.dirname(path) for path in map(str, tmp_path.rglob("events.out.*"))}:
        events = event_accumulator.EventAccumulator(folder)
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert "train/nsf_p" in tags


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
@pytest.mark.parametrize("text", ["p=0.5,", "momentun=0.9", "p", "p=1_0", "fused=true,foreach=true"])
def test_invalid_options_are_refused_when_the_trainer_is_made(text, optimizer, tmp_path):
    with pytest.raises(ValueError, match="Invalid"):
        Trainer(model=Averages(), args=arguments(tmp_path, optimizer, optim_args=text), train_dataset=Rows())


def test_options_changed_later_are_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, "nsf")
    trainer.args.optim_args = OPTIMIZERS["lcam"]["optim_args"]  # as a search over optim sets it
    with pytest.raises(ValueError, match="optim=nsf has no option 'low_loss_momentum'"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("text", ["  ", "", "kahan_sum=None"])
@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_blanks_are_no_options(text, optimizer, tmp_path):
    trainer = make_trainer(tmp_path, optimizer, optim_args=text, max_steps=2)
    trainer.train()
    q, rate = [nn.Parameter(torch.zeros(1))], trainer.args.learning_rate
    plain = hf_nsf.LCAM(q, rate) if optimizer == "lcam" else hf_nsf.NSF(q, rate, weight_decay=0.0)
    made = trainer.optimizer.optimizer.defaults
    assert {name: made[name] for name in plain.defaults} == plain.defaults


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_arguments_of_the_trainer_reach_the_optimizer(optimizer, tmp_path):
    changes = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "learning_rate": 0.02}
    trainer = make_trainer(tmp_path, optimizer, **changes)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["lr"] == 0.02
    if optimizer == "nsf":
        assert groups[0]["betas"] == (0.8, 0.95) and groups[0]["eps"] == 1e-6
