# SPDX-License-Identifier: Apache-2.0
"""Other ways to train with transformers: Seq2SeqTrainer, a search by optuna, batch sizes found by trial."""

import pytest
import torch
from trainer_runs import OPTIMIZERS, Averages, Rows, Watched, arguments, check, check_learning, make_trainer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

OURS = pytest.mark.parametrize("optimizer", ["lcam", "nsf"])


class WatchedSeq2Seq(Watched, Seq2SeqTrainer):
    pass


@OURS
def test_seq2seq_trainer(optimizer, tmp_path):
    rows = torch.randint(5, 30, (32, 6), generator=torch.Generator().manual_seed(0))
    shape = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    trainer = make_trainer(
        tmp_path, optimizer, cls=WatchedSeq2Seq, data=[{"input_ids": row, "labels": row} for row in rows],
        model=lambda dropout: T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)),
        kind=Seq2SeqTrainingArguments,
    )  # fmt: skip
    trainer.train()
    check(trainer, optimizer, 24)
    check_learning(trainer)


@OURS
def test_auto_find_batch_size(optimizer, tmp_path):
    """The first try, with 8 rows, runs out of memory in its third update; the next one starts anew."""
    tries = []

    class Small(Watched):
        def training_step(self, model, inputs, *args, **kwargs):
            tries.append(len(inputs["labels"]))
            if len(inputs["labels"]) > 4 and len(tries) == 3:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    changes = {"per_device_train_batch_size": 8, "auto_find_batch_size": True, "data": Rows(32)}
    trainer = make_trainer(tmp_path, optimizer, cls=Small, **changes)
    trainer.train()
    assert tries[:3] == [8, 8, 8] and tries[-1] < 8
    updates = 3 * -(-32 // max(tries[3:]))  # those of the second try
    check(trainer, optimizer, updates)
    check_learning(trainer, updates // 3)


def test_optuna_searches_over_optim_and_its_options(tmp_path):
    optuna = pytest.importorskip("optuna")
    choices, seen = {"optim": ["lcam", "nsf"], "more": ["", ",foreach=false"]}, []

    def space(trial):
        optim, more = (trial.suggest_categorical(name, values) for name, values in choices.items())
        return {**OPTIMIZERS[optim], "optim_args": OPTIMIZERS[optim]["optim_args"] + more}

    class Recording(Watched):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            check(self, self.args.optim.value, 24)
            seen.append((self.args.optim.value, self.optimizer.optimizer.param_groups[0]["foreach"] is False))
            return result

    trainer = Recording(
        model_init=lambda trial=None: Averages(), args=arguments(tmp_path, "lcam"), train_dataset=Rows(32),
        eval_dataset=Rows(32),
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=space, compute_objective=lambda metrics: metrics["eval_loss"], backend="optuna", n_trials=4,
        sampler=optuna.samplers.GridSampler(choices),
    )  # fmt: skip
    assert sorted(seen) == [("lcam", False), ("lcam", True), ("nsf", False), ("nsf", True)]
