# SPDX-License-Identifier: Apache-2.0
"""Which losses decide: the momentum of every update equals that of the tests' own loop over the losses."""

import collections
import copy

import pytest
from trainer_runs import (
    HIGH,
    LOW,
    Averages,
    Counts,
    SometimesNaN,
    Stream,
    Sums,
    WrongLength,
    by_the_rule,
    check_rule,
    make_trainer,
    train_logs,
    used,
    windows,
)
from transformers import TrainerCallback

import hf_nsf


class StopsEpoch(TrainerCallback):
    """Ends every epoch in the middle of its fourth window."""

    count = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.count += 1
        control.should_epoch_stop = self.count % 4 == 0


class AsksOnceMore(TrainerCallback):
    """Has the trainer make one training step more, at one kind of event in every fourth update."""

    def __init__(self, event):
        self.trainer = None

        def asks(args, state, control, **kwargs):
            if state.global_step % 4 == 2:
                batch = {key: value[None] for key, value in self.trainer.train_dataset[0].items()}
                self.trainer.training_step(self.trainer.model, batch)

        setattr(self, event, asks)


class Sets(TrainerCallback):
    """Changes the accumulation after some updates."""

    def __init__(self, changes):
        self.changes = changes

    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = self.changes.get(state.global_step, args.gradient_accumulation_steps)


ACCUMULATE = {"gradient_accumulation_steps": 4}
STREAM = {"max_steps": 40, "gradient_accumulation_steps": 2}
EMA = {"optim_args": f"low_loss_momentum={LOW},high_loss_momentum={HIGH},loss_average=ema,loss_ema_decay=0.75"}
# Name, changes of the run, callbacks, and the number of updates by their number of micro-batches.
CASES = [
    ("no accumulation", {}, [], {1: 33}),
    ("a short last window, averaged", ACCUMULATE, [], {4: 6, 3: 3}),
    ("a short last window, summed", {**ACCUMULATE, "model": Sums}, [], {4: 6, 3: 3}),
    ("a short last window, by items", {**ACCUMULATE, "model": Counts}, [], {4: 6, 3: 3}),
    ("accumulation beyond the epoch", {"gradient_accumulation_steps": 16, "num_train_epochs": 8, **EMA}, [], {11: 8}),
    ("losses of NaN", {"model": SometimesNaN}, [], {1: 33}),
    ("a moving average", {**ACCUMULATE, **EMA}, [], {4: 6, 3: 3}),
    ("bfloat16 parameters", {**ACCUMULATE, "model": lambda dropout: Sums().bfloat16()}, [], {4: 6, 3: 3}),
    ("bfloat16 autocast", {**ACCUMULATE, "bf16": True}, [], {4: 6, 3: 3}),
    ("a stream that does not divide", {**STREAM, "data": Stream()}, [], {2: 33, 3: 7}),
    ("a stream, summed", {**STREAM, "data": Stream(), "model": Sums}, [], {2: 33, 3: 7}),
    ("a stream without an end", {**STREAM, "data": Stream(passes=99)}, [], {2: 40}),
    ("a stream that reports too many rows", {**STREAM, "data": WrongLength(100)}, [], {2: 17, 3: 3}),
    ("a stream that reports too few rows", {**STREAM, "data": WrongLength(28)}, [], {2: 30, 1: 10}),
    ("epochs stopped in a window", {"gradient_accumulation_steps": 2}, [StopsEpoch], {2: 7, 3: 2}),
    ("one step more after an update", {"num_train_epochs": 2}, [lambda: AsksOnceMore("on_step_end")], {1: 17, 2: 5}),
    ("one step more before an update", {}, [lambda: AsksOnceMore("on_pre_optimizer_step")], {1: 25, 2: 8}),
    ("one step more whose gradient is dropped", {}, [lambda: AsksOnceMore("on_optimizer_step")], {1: 33}),
    ("more accumulation in mid-run", {**STREAM, "data": Stream(passes=99)}, [lambda: Sets({9: 4})], {2: 10, 4: 30}),
    ("less accumulation in mid-run", {**STREAM, "data": Stream(passes=99)}, [lambda: Sets({9: 1})], {2: 9, 1: 31}),
]


@pytest.mark.parametrize(("run", "callbacks", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_every_momentum_follows_the_rule(run, callbacks, expected, tmp_path):
    trainer = make_trainer(tmp_path, **run)
    for make in callbacks:
        callback = make()
        callback.trainer = trainer
        trainer.add_callback(callback)
    trainer.train()
    assert collections.Counter(windows(trainer.events)) == expected
    check_rule(trainer, decay=0.75 if "optim_args" in run else None)
    assert [entry["lcam_momentum"] for entry in train_logs(trainer)] == used(trainer.events)


class Zero(Averages):
    def forward(self, x, labels=None):
        return {"loss": 0.0 * super().forward(x)["logits"].sum()}


def test_a_mean_of_zero_is_logged_after_the_first_decision(tmp_path):
    trainer = make_trainer(tmp_path, model=Zero)
    trainer.train()
    means = [entry.get("lcam_loss_mean") for entry in train_logs(trainer)]
    assert means == [None] + [0.0] * 32 and used(trainer.events) == [HIGH] * 33


class ContainsARun(TrainerCallback):
    """Trains a deep copy of the running trainer in the middle of one of its windows."""

    def __init__(self, trainer):
        self.trainer, self.copy = trainer, None

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 4 and self.copy is None:
            self.copy = "in the making"
            self.copy = copy.deepcopy(self.trainer)
            self.copy.train()


def test_a_deep_copy_of_the_running_trainer_is_independent(tmp_path):
    trainer = make_trainer(tmp_path, **ACCUMULATE)
    nested = ContainsARun(trainer)
    trainer.add_callback(nested)
    trainer.train()
    assert trainer.optimizer is not nested.copy.optimizer and len(used(nested.copy.events)) == 9
    check_rule(trainer)
    assert used(nested.copy.events) == by_the_rule(nested.copy.events)[0]


def test_a_replaced_optimizer_is_followed(tmp_path):
    """AdamW for 5 updates, LCAM for 12, NSF for the rest: each is driven, and the log has the current one's values."""

    class Replaces(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            cycle = {"p_min": -0.25, "p_max": 0.5, "cycles": 3}
            new = {
                5: lambda q: hf_nsf.LCAM(q, lr=0.1, low_loss_momentum=LOW, high_loss_momentum=HIGH),
                17: lambda q: hf_nsf.NSF(q, lr=0.01, **cycle),
            }.get(state.global_step)
            if new is not None:
                self.trainer.optimizer = self.trainer.accelerator.prepare(new(model.parameters()))
                self.trainer.callback_handler.optimizer = self.trainer.optimizer

    trainer = make_trainer(tmp_path, "adamw")
    callback = Replaces()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    logs = train_logs(trainer)
    driven = [(key in entry) for entry in logs for key in ("lcam_momentum", "nsf_p")]
    assert driven == [False, False] * 5 + [True, False] * 12 + [False, True] * 16
    updates = [i for i, (kind, _) in enumerate(trainer.events) if kind == "update"]
    events = trainer.events[updates[4] + 1 : updates[16] + 1]
    assert [entry["lcam_momentum"] for entry in logs[5:17]] == by_the_rule(events)[0] == used(events)
    expected = hf_nsf.p_schedule(range(16), p_min=-0.25, p_max=0.5, cycles=3, total_steps=33)
    assert [entry["nsf_p"] for entry in logs[17:]] == expected


def test_data_without_the_usual_number_of_micro_batches_is_warned_of(tmp_path, warned):
    """Passes of 3 micro-batches with an accumulation of 2: every update but the first has 3."""
    trainer = make_trainer(tmp_path, data=Stream(12), **STREAM)
    trainer.train()
    assert collections.Counter(windows(trainer.events)) == {2: 1, 3: 39}
    assert used(trainer.events) == by_the_rule(trainer.events)[0]
    assert len(warned) == 1 and "gradient_accumulation_steps=2" in warned[0]
