# SPDX-License-Identifier: Apache-2.0
"""Accumulation windows that are shorter than the others: is their loss comparable, and does asking leave no trace?"""

import os

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_nsf  # noqa: F401

LOW, HIGH = 0.8, 0.9


class Rows(Dataset):
    """Rows of tokens, each a noisy count upwards; the labels are the row with some tokens left out."""

    def __init__(self, classes=False, size=44):
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, 24, (size, 1), generator=generator)
        noise = torch.randint(0, 2, (size, 8), generator=generator)
        self.rows = (start + torch.arange(8) + noise) % 32
        self.labels = self.rows.masked_fill(torch.rand(size, 8, generator=generator) < 0.4, -100)
        if classes:
            self.labels = (self.rows[:, 0] > 12).long()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


def llama(dropout=0.0):
    set_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    attention_dropout=dropout, attn_implementation="eager", max_position_embeddings=16)
    )  # fmt: skip


def bert():
    set_seed(3)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(config)


class Normed(nn.Module):
    """Batch statistics and random numbers also in evaluation; divides by the number of items that it is told."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(32, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.frozen, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        hidden = self.frozen(self.drop(self.norm(self.embed(input_ids).mean(1))))
        logits = self.head(hidden + 0.1 * torch.randn_like(hidden))
        total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / (len(labels) if num_items_in_batch is None else num_items_in_batch), "logits": logits}


def run(folder, model, batch_size=4, windows=4, cls=Trainer, data=None, resume=None, extra=None, **changes):
    values = {
        "output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": windows, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "seed": 5, "max_grad_norm": 0.0, "remove_unused_columns": False,
        "optim": "lcam", "optim_args": f"low_loss_momentum={LOW},high_loss_momentum={HIGH}", "learning_rate": 0.05,
    }  # fmt: skip
    set_seed(1)
    trainer = cls(
        model=model, args=TrainingArguments(**{**values, **changes}), train_dataset=data or Rows(), **(extra or {})
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs_of(trainer):
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 9
    return logs


def used(trainer):
    return [(entry["lcam_momentum"], entry.get("lcam_loss_mean")) for entry in logs_of(trainer)]


def decided(losses, left_out=()):
    """METHOD's rule applied to losses of three updates an epoch: each update's momentum and the mean behind it."""
    momentum, mean, result = HIGH, None, []
    for index, loss in enumerate(losses):
        total, count = (0.0, 0) if index % 3 == 0 else (total, count)  # noqa: F821
        result.append((momentum, mean))
        if index % 3 not in left_out:
            total, count = total + loss, count + 1
            mean = total / count
            momentum = LOW if loss < mean else HIGH
    return result


def asked(trainer):
    """1 or 0, the answer; -1 if nobody asked."""
    answers = {group["loss_windows_average"] for group in trainer.optimizer.optimizer.param_groups}
    assert len(answers) == 1
    return answers.pop()


def test_a_causal_model_has_the_same_phases_however_its_batches_are_cut(tmp_path):
    """Updates of 32, 32 and 24 rows: whole, and in micro-batches of 8, the last of the three being a short window."""
    sgd, data = {"optim": "sgd", "optim_args": None}, Rows(size=88)
    cuts = (32, 1), (8, 4)
    theirs = [[entry["loss"] for entry in logs_of(run(tmp_path, llama(), *cut, data=data, **sgd))] for cut in cuts]
    if theirs[1] != pytest.approx(theirs[0], rel=1e-4):  # transformers 5.2.0 divides the gradients once more
        pytest.skip("this Trainer's accumulated steps differ from whole ones with any optimizer")
    whole, parts = (run(tmp_path, llama(), *cut, data=data) for cut in cuts)
    losses = [[entry["loss"] for entry in logs_of(trainer)] for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert used(whole) == decided(losses[0]) and used(parts) == decided(losses[1])
    assert [momentum for momentum, _ in used(whole)] == [momentum for momentum, _ in used(parts)]
    assert {momentum for momentum, _ in used(whole)} == {LOW, HIGH}
    assert (asked(whole), asked(parts)) == (-1, 1)


def test_a_classifier_that_ignores_the_number_of_items_leaves_short_windows_out(tmp_path):
    trainer = run(tmp_path, bert(), data=Rows(classes=True))
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert asked(trainer) == 0 and used(trainer) == decided(losses, left_out=(2,))


class Offset(Trainer):
    """Ignores what the model could do with the number of items; lists, counts and logs what it computes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.noted, self.count = {"losses": []}, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.count += 1
        labels = inputs.pop("labels")
        logits = model(**inputs)["logits"][:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()) + 1
        self.noted["losses"].append(loss.item())
        self.log({"offset": self.count})
        return loss


class Divides(Offset):
    """Divides by itself, as the losses of some trainers do, and leaves the same traces."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss / num_items_in_batch


class AddsAfterwards(Trainer):
    """A training_step whose loss is not the one of compute_loss alone."""

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs) + 0.25


class OwnStep(Trainer):
    """A training_step that asks nobody for its loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class Declares(OwnStep):
    """The Trainer's way of saying how the loss is scaled is about compute_loss, which is not called here."""

    loss_is_scaled_for_ga = True


def summed(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def averaged(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


CASES = [
    ("compute_loss_func that divides", Trainer, {}, {"compute_loss_func": summed}, 1),
    ("compute_loss_func that does not", Trainer, {}, {"compute_loss_func": averaged}, 0),
    ("gradient checkpointing", Trainer, {"gradient_checkpointing": True}, {}, 1),
    ("bfloat16 autocast", Trainer, {"bf16": True}, {}, 1),
    ("compute_loss that does not divide", Offset, {}, {}, 0),
    ("compute_loss that divides", Divides, {}, {}, 1),
    ("training_step that adds", AddsAfterwards, {}, {}, 0),
    ("training_step without compute_loss", OwnStep, {}, {}, 0),
    ("the same, declared", Declares, {}, {}, 0),
]
if Version(transformers.__version__) >= Version("5.15"):  # older label smoothing takes no number of items
    CASES.append(("label smoothing", Trainer, {"label_smoothing_factor": 0.1}, {}, 1))


@pytest.mark.parametrize(("cls", "changes", "extra", "answer"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_who_makes_the_loss_decides_whether_short_windows_take_part(cls, changes, extra, answer, tmp_path):
    trainer = run(tmp_path, llama(), cls=cls, extra=extra, **changes)
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert asked(trainer) == answer
    assert used(trainer) == decided(losses, left_out=() if answer else (2,))
    assert not {"training_step", "compute_loss"} & vars(trainer).keys()


@pytest.mark.parametrize("cls", [Offset, Divides])
def test_asking_a_subclass_leaves_no_trace_in_it(cls, tmp_path):
    trainer = run(tmp_path, llama(), cls=cls)
    assert asked(trainer) >= 0
    assert trainer.count == len(trainer.noted["losses"]) == 33
    assert [e["offset"] for e in trainer.state.log_history if "offset" in e] == list(range(1, 34))


def test_asking_moves_neither_random_numbers_nor_statistics_nor_modes(tmp_path, monkeypatch):
    """The same bits as a run in which the answer is known beforehand and nobody is asked."""

    class Watching(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.states = [*getattr(self, "states", []), torch.get_rng_state()]
            modes = [module.training for module in model.modules()]
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.modes = {*getattr(self, "modes", ()), tuple(modes), tuple(m.training for m in model.modules())}
            return loss

    def trained(folder):
        set_seed(3)
        return run(folder, Normed().train(), cls=Watching, data=Rows(classes=True))

    calls = []
    forward = Normed.forward

    def counted(self, *args, **kwargs):
        calls.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Normed, "forward", counted)
    first = trained(tmp_path)
    assert asked(first) == 1 and calls.count(False) == 2 and calls.count(True) == 33
    assert first.modes == {(True, True, True, True, False, True)}
    monkeypatch.setattr("hf_nsf.trainer.loss_listener.LossListener.windows_average", lambda self: True)
    second = trained(tmp_path)
    assert calls.count(False) == 2 and asked(second) == 1
    assert all(map(torch.equal, first.states, second.states)) and len(first.states) == 33
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert used(first) == used(second)


def test_resume_beside_a_short_window_is_bit_for_bit(tmp_path):
    """From before and after the first short window, and from before the second."""
    whole = run(tmp_path / "a", llama(0.2), save_strategy="steps", save_steps=1)
    assert used(whole) == decided([entry["loss"] for entry in logs_of(whole)]) and asked(whole) == 1
    for step in (2, 3, 5):
        resumed = run(tmp_path / "b", llama(0.2), resume=os.path.join(tmp_path, "a", f"checkpoint-{step}"))
        assert used(resumed) == used(whole) and asked(resumed) == 1
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_windows_of_another_length_after_a_resume_take_part(tmp_path):
    run(tmp_path / "a", bert(), 2, 8, data=Rows(classes=True), save_strategy="steps", save_steps=3)
    resumed = run(tmp_path / "b", bert(), 4, 4, data=Rows(classes=True), resume=str(tmp_path / "a" / "checkpoint-3"))
    losses = [entry["loss"] for entry in logs_of(resumed)]
    assert used(resumed)[4:] == decided(losses, left_out=(2,))[4:]


def test_a_question_that_fails_ends_no_training(tmp_path, monkeypatch):
    class OnlyInTraining(Normed):
        def forward(self, *args, **kwargs):
            if not self.training:
                raise RuntimeError("no loss in evaluation")
            return super().forward(*args, **kwargs)

    said = []
    monkeypatch.setattr("hf_nsf.trainer.loss_listener.logger.warning", said.append)
    trainer = run(tmp_path, OnlyInTraining(), data=Rows(classes=True))
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert asked(trainer) == -1 and used(trainer) == decided(losses, left_out=(2,))
    assert len(said) == 3 and "no loss in evaluation" in said[0]
