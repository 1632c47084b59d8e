# SPDX-License-Identifier: Apache-2.0
"""Other ways into training that transformers has: Seq2SeqTrainer, a search by optuna, batch sizes found by trial."""

import pytest
import torch
from torch.utils.data import Dataset
from trainer_runs import OPTIMIZERS, Averages, Rows
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_nsf import p_schedule

COMMON = {
    "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "seed": 5, "max_grad_norm": 0.0, "num_train_epochs": 3, "dataloader_pin_memory": False,
}  # fmt: skip


class Copies(Dataset):
    """Rows of tokens; the label is the row itself."""

    def __init__(self):
        self.rows = torch.randint(5, 30, (32, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def check_log(history, optimizer, low=0.8, p_min=-0.25, per_epoch=8, first=0):
    """The momenta follow from the logged losses, or p from its schedule; and the loss falls over three epochs."""
    logs = [entry for entry in history if "loss" in entry]
    assert len(logs) == 3 * per_epoch
    if optimizer == "nsf":
        steps = range(first, first + len(logs))
        schedule = p_schedule(steps, p_min=p_min, p_max=0.5, cycles=2, total_steps=len(logs))
        assert [entry["nsf_p"] for entry in logs] == pytest.approx(schedule, abs=1e-12)
    else:
        momentum, losses = 0.9, []
        for index, entry in enumerate(logs):
            losses = losses if index % per_epoch else []
            assert entry["lcam_momentum"] == momentum
            losses.append(entry["loss"])
            momentum = low if entry["loss"] < sum(losses) / len(losses) else 0.9
        assert len({entry["lcam_momentum"] for entry in logs}) == 2
    assert sum(e["loss"] for e in logs[-per_epoch:]) < sum(e["loss"] for e in logs[:per_epoch])


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_seq2seq_trainer(optimizer, tmp_path):
    set_seed(1)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), **COMMON, **OPTIMIZERS[optimizer])
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=Copies())
    trainer.train()
    check_log(trainer.state.log_history, optimizer)


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_auto_find_batch_size(optimizer, tmp_path):
    """The first try, with 8 rows, runs out of memory in its third update; the next one has its own phases.

    The Trainer keeps the optimizer, so NSF's cycle goes on from the two updates made.
    """
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
    trainer = Small(model=Averages(), args=args, train_dataset=Rows(32))
    trainer.train()
    assert tries[:3] == [8, 8, 8] and tries[-1] < 8
    # The second try's alone.
    check_log(trainer.state.log_history, optimizer, per_epoch=-(-32 // max(tries[3:])), first=2)


def test_optuna_searches_over_optim_and_its_options(tmp_path):
    optuna = pytest.importorskip("optuna")
    options = {
        "lcam": ["low_loss_momentum=0.7,high_loss_momentum=0.9", "low_loss_momentum=0.8,high_loss_momentum=0.9"],
        "nsf": ["p_min=-0.25,p_max=0.5,cycles=2", "p_min=0.25,p_max=0.5,cycles=2"],
    }
    choices = {"optim": list(options), "which": [0, 1]}
    seen = []

    def space(trial):
        optim, which = (trial.suggest_categorical(name, values) for name, values in choices.items())
        rate = OPTIMIZERS[optim]["learning_rate"]
        return {"optim": optim, "optim_args": options[optim][which], "learning_rate": rate}

    class Recording(Trainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            value = float(self.args.optim_args.partition("=")[2].partition(",")[0])
            check_log(self.state.log_history, self.args.optim.value, low=value, p_min=value)
            seen.append((self.args.optim.value, value))
            return result

    args = TrainingArguments(output_dir=str(tmp_path), **COMMON, optim="lcam")
    data = Rows(32)
    trainer = Recording(model_init=lambda trial=None: Averages(), args=args, train_dataset=data, eval_dataset=data)
    trainer.hyperparameter_search(
        hp_space=space, compute_objective=lambda metrics: metrics["eval_loss"], n_trials=4, backend="optuna",
        sampler=optuna.samplers.GridSampler(choices),
    )  # fmt: skip
    assert sorted(seen) == [("lcam", 0.7), ("lcam", 0.8), ("nsf", -0.25), ("nsf", 0.25)]


def test_a_search_with_one_string_for_both_is_refused_in_one_sentence(tmp_path):
    """The space above has a string for each optimizer."""
    pytest.importorskip("optuna")
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON, **OPTIMIZERS["lcam"])
    data = Rows(32)
    trainer = Trainer(model_init=lambda trial=None: Averages(), args=args, train_dataset=data, eval_dataset=data)
    with pytest.raises(ValueError, match="optim=nsf has no option 'low_loss_momentum'"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"optim": trial.suggest_categorical("optim", ["nsf"])}, n_trials=1, backend="optuna"
        )
