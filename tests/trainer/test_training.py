# SPDX-License-Identifier: Apache-2.0
"""Real runs of a stock Trainer."""

import json
import math
import os

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_nsf

OPTIMIZERS = {
    "lcam": {"optim": "lcam", "optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.9", "learning_rate": 0.02},
    "nsf": {"optim": "nsf", "optim_args": "p_min=-0.25,p_max=0.5,cycles=2", "learning_rate": 1e-3},
}


class Words(Dataset):
    """Random token rows whose label is the parity of a marker token: learnable, deterministic."""

    def __init__(self, size: int = 44) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(5, 30, (size, 8), generator=generator)
        self.labels = (self.rows[:, 0] > 17).long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


class Averaging(nn.Module):
    """A model that normalises its loss: a plain module takes no num_items_in_batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert():
    set_seed(3)
    return BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                   max_position_embeddings=16)
    )  # fmt: skip


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
        "max_grad_norm": 0.0,
    }  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def train_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def momenta_from_losses(logs, updates_per_epoch, low=0.8, high=0.9, left_out=()):
    """The authors' loop over logged losses: the momentum used at each update."""
    momentum, used, total, count = high, [], 0.0, 0
    for index, entry in enumerate(logs):
        if index % updates_per_epoch == 0:
            total, count = 0.0, 0
        used.append(momentum)
        if index % updates_per_epoch in left_out:
            continue
        total, count = total + entry["loss"], count + 1
        momentum = low if entry["loss"] < total / count else high
    return used


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_learns_and_logs_what_it_used(name, tmp_path):
    trainer = Trainer(model=bert(), args=arguments(tmp_path, **OPTIMIZERS[name]), train_dataset=Words())
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 33 and isinstance(trainer.optimizer.optimizer, getattr(hf_nsf, name.upper()))
    if name == "nsf":
        expected = hf_nsf.p_schedule(range(33), p_min=-0.25, p_max=0.5, cycles=2, total_steps=33)
        assert [entry["nsf_p"] for entry in logs] == expected
    else:
        used = [entry["lcam_momentum"] for entry in logs]
        assert used == momenta_from_losses(logs, 11)
        assert len(set(used)) == 2
        assert [0.8 if entry["lcam_loss_phase"] else 0.9 for entry in logs] == used
    trainer.save_state()
    with open(tmp_path / "trainer_state.json") as file:
        key = "nsf_p" if name == "nsf" else "lcam_momentum"
        assert sum(key in entry for entry in json.load(file)["log_history"]) == 33


class Doubling(Trainer):
    """Overrides both hooks of the loss, the second without super."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        out = model(**inputs)
        loss = 2 * out["loss"] + 1
        return (loss, out) if return_outputs else loss


class OwnStep(Trainer):
    """Overrides training_step without super."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = 3 * model(**self._prepare_inputs(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


def summed_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels) + 0.5


LOSSES = [
    ("plain", Trainer, {}, {}),
    ("label smoothing", Trainer, {"label_smoothing_factor": 0.2}, {}),
    ("compute_loss_func", Trainer, {}, {"compute_loss_func": summed_loss}),
    ("compute_loss", Doubling, {}, {}),
    ("training_step", OwnStep, {}, {}),
    ("evaluation inside", Trainer, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_dataset": Words(8)}),
    ("gradient checkpointing", Trainer, {"gradient_checkpointing": True}, {}),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("cls", "changes", "extra"), [c[1:] for c in LOSSES], ids=[c[0] for c in LOSSES])
def test_the_loss_used_is_the_loss_logged(cls, changes, extra, name, tmp_path):
    trainer = cls(model=bert(), args=arguments(tmp_path, **OPTIMIZERS[name], **changes), train_dataset=Words(), **extra)
    for run in range(2):  # a second training begins anew, with the weights of the first
        trainer.train()
        logs = train_logs(trainer)
        assert len(logs) == 33
        if name == "nsf":
            expected = hf_nsf.p_schedule(range(33), p_min=-0.25, p_max=0.5, cycles=2, total_steps=33)
            assert [entry["nsf_p"] for entry in logs] == expected
        else:
            assert [entry["lcam_momentum"] for entry in logs] == momenta_from_losses(logs, 11)
            assert len({entry["lcam_momentum"] for entry in logs}) == 2
        if run == 0:
            assert sum(entry["loss"] for entry in logs[-11:]) < sum(entry["loss"] for entry in logs[:11])
        assert "training_step" not in trainer.__dict__


def accumulated(model, folder, batch_size, windows, optimizer=OPTIMIZERS["lcam"], size=44):  # noqa: B008
    set_seed(1)
    args = arguments(folder, **optimizer, per_device_train_batch_size=batch_size,
                     gradient_accumulation_steps=windows, remove_unused_columns=False)  # fmt: skip
    trainer = Trainer(model=model(), args=args, train_dataset=Words(size))
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 9
    return logs


def test_short_last_windows_of_a_summing_model_take_no_part(tmp_path):
    # 11 batches in windows of 4, 4 and 3: BERT logs the sum over the window, so the third is lower by itself.
    logs = accumulated(bert, tmp_path, 4, 4)
    assert [entry["lcam_momentum"] for entry in logs] == momenta_from_losses(logs, 3, left_out=(2,))


def test_accumulation_changes_no_phase_where_the_trainer_averages(tmp_path):
    """32, 32 and 24 rows an update, as one batch or as 4, 4 and 3 micro-batches of 8."""
    sgd = {"optim": "sgd", "learning_rate": 0.02}
    theirs = [[e["loss"] for e in accumulated(Averaging, tmp_path, *parts, sgd, 88)] for parts in ((32, 1), (8, 4))]
    if theirs[0] != pytest.approx(theirs[1], rel=1e-5):  # transformers 5.2.0 divides the gradients twice
        pytest.skip("this Trainer's accumulated steps differ from whole ones with any optimizer")
    whole = accumulated(Averaging, tmp_path / "1", 32, 1, size=88)
    parts = accumulated(Averaging, tmp_path / "4", 8, 4, size=88)
    assert [e["loss"] for e in parts] == pytest.approx([e["loss"] for e in whole], rel=1e-5)
    for key in ("lcam_momentum", "lcam_loss_phase"):
        assert [e[key] for e in parts] == [e[key] for e in whole]
    assert [e["lcam_momentum"] for e in parts] == momenta_from_losses(parts, 3)
    assert len({e["lcam_momentum"] for e in parts}) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_in_mid_epoch_is_bit_for_bit(name, tmp_path):
    def run(folder, **changes):
        args = arguments(folder, **OPTIMIZERS[name], save_strategy="steps", save_steps=7, **changes)
        return Trainer(model=bert(), args=args, train_dataset=Words())

    whole = run(tmp_path / "a")
    whole.train()
    resumed = run(tmp_path / "b")
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "a", "checkpoint-14"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    keep = ("loss", "step", "nsf_p", "lcam_momentum", "lcam_loss_phase", "lcam_loss_mean")
    tails = [[{k: e[k] for k in keep if k in e} for e in train_logs(t)][14:] for t in (resumed, whole)]
    assert tails[0] == tails[1] and len(tails[0]) == 19
    states = [t.optimizer.optimizer.state_dict()["param_groups"] for t in (resumed, whole)]
    assert states[0] == states[1]


def test_other_optimizers_are_left_alone(tmp_path):
    trainer = Trainer(model=bert(), args=arguments(tmp_path, optim="adamw_torch", max_steps=2), train_dataset=Words())
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if "nsf" in key or "lcam" in key]


def test_defaults_are_a_narrow_cycle_beside_adam(tmp_path):
    trainer = Trainer(model=bert(), args=arguments(tmp_path, optim="nsf"), train_dataset=Words())
    trainer.train()
    used = [entry["nsf_p"] for entry in train_logs(trainer)]
    assert used[0] == 0.5 and 0.25 <= min(used) < 0.26 and max(used) <= 0.5


@pytest.mark.parametrize("text", ["p=0.5,", "momentun=0.9", "p"])
def test_bad_options_stop_before_training(text, tmp_path):
    with pytest.raises(ValueError, match="optim_args|Unknown option"):
        Trainer(model=bert(), args=arguments(tmp_path, optim="nsf", optim_args=text), train_dataset=Words())
    trainer = Trainer(model=bert(), args=arguments(tmp_path, optim="nsf"), train_dataset=Words())
    trainer.args.optim_args = text  # as a search over options sets it
    with pytest.raises(ValueError, match="optim_args|Unknown option"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_removed_callback_warns_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_nsf.trainer.registry.logger.warning", said.append)
    trainer = Trainer(model=bert(), args=arguments(tmp_path, optim="lcam", max_steps=2), train_dataset=Words())
    trainer.remove_callback(hf_nsf.SpectralCallback)
    trainer.train()
    assert len(said) == 1 and "add_callback" in said[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_second_callback_counts_no_update_twice(name, tmp_path):
    """Every Trainer has one; a user who adds another, of a class of their own perhaps, keeps that one."""

    class Mine(hf_nsf.SpectralCallback):
        pass

    results = []
    for callbacks in (None, [hf_nsf.SpectralCallback()], [hf_nsf.SpectralCallback, Mine()]):
        args = arguments(tmp_path, num_train_epochs=1, **OPTIMIZERS[name])
        trainer = Trainer(model=bert(), args=args, train_dataset=Words(), callbacks=callbacks)
        trainer.train()
        kept = [c for c in trainer.callback_handler.callbacks if isinstance(c, hf_nsf.SpectralCallback)]
        assert len(kept) == 1 and (callbacks is None or kept[0] is callbacks[-1])
        keys = ("loss", "nsf_p", "lcam_momentum", "lcam_loss_mean")
        results.append([{key: entry.get(key) for key in keys} for entry in train_logs(trainer)])
    assert results[0] == results[1] == results[2] and len(results[0]) == 11


def test_no_loss_seen_warns_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_nsf.trainer.callback.logger.warning", said.append)
    monkeypatch.setattr(hf_nsf.SpectralCallback, "observe", lambda self, loss: None)
    Trainer(model=bert(), args=arguments(tmp_path, optim="lcam", max_steps=3), train_dataset=Words()).train()
    assert len(said) == 1 and "hf_nsf.LossPhase" in said[0]


def by_class(folder, cls, options, **changes):
    trainer = Trainer(
        model=bert(), args=arguments(folder, **changes), train_dataset=Words(), optimizer_cls_and_kwargs=(cls, options)
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is cls
    return train_logs(trainer)


def test_an_lcam_given_by_class_is_driven_too(tmp_path):
    options = {"lr": 0.02, "low_loss_momentum": 0.8, "high_loss_momentum": 0.9}
    logs = by_class(tmp_path, hf_nsf.LCAM, options)
    assert [entry["lcam_momentum"] for entry in logs] == momenta_from_losses(logs, 11)
    assert len({entry["lcam_momentum"] for entry in logs}) == 2


def test_an_nsf_given_by_class_keeps_its_p_unless_the_options_of_a_cycle_are_given(tmp_path):
    logs = by_class(tmp_path, hf_nsf.NSF, {"lr": 1e-3, "p": 0.125})
    assert [entry["nsf_p"] for entry in logs] == [0.125] * 33
    assert sum(entry["loss"] for entry in logs[-11:]) < sum(entry["loss"] for entry in logs[:11])
    logs = by_class(tmp_path, hf_nsf.NSF, {"lr": 1e-3}, **OPTIMIZERS["nsf"])
    expected = hf_nsf.p_schedule(range(33), p_min=-0.25, p_max=0.5, cycles=2, total_steps=33)
    assert [entry["nsf_p"] for entry in logs] == expected


def test_tensorboard_receives_the_keys(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    args = arguments(tmp_path, **OPTIMIZERS["nsf"], max_steps=4, report_to="tensorboard")
    Trainer(model=bert(), args=args, train_dataset=Words()).train()
    folders = {os.path.dirname(path) for path in map(str, tmp_path.rglob("events.out.*"))}
    tags = set()
    for folder in folders:
        events = event_accumulator.EventAccumulator(folder)
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert "train/nsf_p" in tags


def test_losses_are_finite(tmp_path):
    trainer = Trainer(model=Averaging(), args=arguments(tmp_path, **OPTIMIZERS["nsf"]), train_dataset=Words())
    trainer.train()
    losses = [entry["loss"] for entry in train_logs(trainer)]
    assert all(map(math.isfinite, losses)) and sum(losses[-11:]) < sum(losses[:11])
