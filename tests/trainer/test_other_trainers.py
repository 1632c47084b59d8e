# SPDX-License-Identifier: Apache-2.0
"""Other ways into training that transformers has: Seq2SeqTrainer, a search by optuna, batch sizes found by trial."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_nsf import p_schedule

OPTIMIZERS = {
    "lcam": {"optim": "lcam", "optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.9", "learning_rate": 0.02},
    "nsf": {"optim": "nsf", "optim_args": "p_min=-0.25,p_max=0.5,cycles=2", "learning_rate": 1e-2},
}
COMMON = {
    "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "seed": 5, "max_grad_norm": 0.0, "num_train_epochs": 3,
}  # fmt: skip


class Copies(Dataset):
    """Rows of tokens; the label is the row itself, or whether its first token is large."""

    def __init__(self, sequence):
        self.rows = torch.randint(5, 30, (32, 6), generator=torch.Generator().manual_seed(0))
        self.labels = self.rows if sequence else (self.rows[:, 0] > 17).long()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


def bert():
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(config)


def check_log(history, optimizer):
    """The momenta follow from the logged losses, or p from its schedule."""
    logs = [entry for entry in history if "loss" in entry]
    assert len(logs) == 24
    if optimizer == "nsf":
        schedule = p_schedule(range(24), p_min=-0.25, p_max=0.5, cycles=2, total_steps=24)
        assert [entry["nsf_p"] for entry in logs] == pytest.approx(schedule, abs=1e-12)
        return logs
    momentum, losses = 0.9, []
    for index, entry in enumerate(logs):
        losses = losses if index % 8 else []
        assert entry["lcam_momentum"] == momentum
        losses.append(entry["loss"])
        momentum = 0.8 if entry["loss"] < sum(losses) / len(losses) else 0.9
    return logs


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_seq2seq_trainer(optimizer, tmp_path):
    set_seed(1)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), **COMMON, **OPTIMIZERS[optimizer])
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=Copies(sequence=True))
    trainer.train()
    logs = check_log(trainer.state.log_history, optimizer)
    assert sum(e["loss"] for e in logs[-8:]) < sum(e["loss"] for e in logs[:8])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_auto_find_batch_size(optimizer, tmp_path):
    """The first try, with 8 rows, runs out of memory in its third update; the next one has its own phases and p."""
    set_seed(1)
    tries = []

    class Small(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            tries.append(len(inputs["labels"]))
            if len(inputs["labels"]) > 4 and len(tries) == 3:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    options = {**COMMON, "per_device_train_batch_size": 8, "auto_find_batch_size": True}
    args = TrainingArguments(output_dir=str(tmp_path), **options, **OPTIMIZERS[optimizer])
    trainer = Small(model=bert(), args=args, train_dataset=Copies(sequence=False))
    trainer.train()
    assert tries[:3] == [8, 8, 8] and tries[-1] < 8
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 * -(-32 // max(tries[3:]))  # the second try's alone
    first = {"nsf": ("nsf_p", 0.5), "lcam": ("lcam_momentum", 0.9)}[optimizer]
    assert logs[0][first[0]] == first[1]


def test_optuna_searches_over_optim_and_its_options(tmp_path):
    pytest.importorskip("optuna")
    seen = []

    def space(trial):
        low = trial.suggest_categorical("p_min", [-0.25, 0.25])
        return {"optim": "nsf", "optim_args": f"p_min={low},p_max=0.5,cycles=2"}

    class Recording(Trainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            used = [entry["nsf_p"] for entry in self.state.log_history if "nsf_p" in entry]
            seen.append((self.args.optim_args, min(used)))
            return result

    args = TrainingArguments(output_dir=str(tmp_path), **COMMON, optim="lcam")
    data = Copies(sequence=False)
    trainer = Recording(model_init=lambda trial=None: bert(), args=args, train_dataset=data, eval_dataset=data)
    trainer.hyperparameter_search(
        hp_space=space, compute_objective=lambda metrics: metrics["eval_loss"], n_trials=4, backend="optuna"
    )
    assert len(seen) == 4
    for text, low in seen:
        assert low == pytest.approx(-0.25 if "p_min=-0.25" in text else 0.25, abs=0.02)
