# SPDX-License-Identifier: Apache-2.0
"""SaveState inside a real Trainer, and comparisons of scripts that train."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_runs import Averages, Rows, make_trainer
from transformers import Trainer, TrainerCallback

from hf_nsf.compare.__main__ import main
from hf_nsf.trainer.save_state import SaveState, has_diverged


class AlwaysNaN(Averages):
    def forward(self, x, labels):
        outputs = super().forward(x, labels)
        return {**outputs, "loss": outputs["loss"] * math.nan}


def trainer(folder, model=Averages, callbacks=(), **changes):
    extra = {"eval_dataset": Rows(), "callbacks": [SaveState(), *callbacks]}
    return make_trainer(folder / "out", "adamw", model, cls=Trainer, extra=extra, **changes)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Reads what has been saved."""
    monkeypatch.setenv("HF_NSF_SAVE_STATE", str(tmp_path / "trainer_state.json"))
    return lambda name="trainer_state.json": json.loads((tmp_path / name).read_text())


def test_log_and_progress_are_saved(tmp_path, saved):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(saved("progress.json") if state.global_step else None)

    made = trainer(tmp_path, callbacks=[Look()], max_steps=3)
    made.evaluate()
    assert not (tmp_path / "trainer_state.json").exists()  # no update was made: another Trainer's runs may be
    made.train()
    assert [(now["step"], now["max_steps"]) for now in seen[1:]] == [(1, 3), (2, 3)]
    assert all(now["loss"] > 0 and now["learning_rate"] > 0 for now in seen[1:])
    assert saved()["log_history"][-1]["train_runtime"] > 0 and not saved()["diverged"]
    made.evaluate()
    made.log({"test_accuracy": 0.5})
    assert saved()["log_history"] == made.state.log_history and saved()["log_history"][-1]["test_accuracy"] == 0.5
    assert not list(tmp_path.glob("*.part"))


def test_values_that_json_does_not_know(tmp_path, saved):
    values = {
        "float32": (np.float32(1.5), 1.5),
        "int64": (np.int64(3), 3),
        "array of one": (np.array([2.0]), 2.0),
        "tensor": (torch.tensor(1.5), 1.5),
        "bool": (np.bool_(True), True),
        "array": (np.array([1, 2]), "[1 2]"),
        "date": (np.datetime64("2026-01-01"), "2026-01-01"),
        "set": ({1, 2}, "{1, 2}"),
    }
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.log({name: value for name, (value, _) in values.items()})
    before = saved()
    assert before["log_history"][-1].items() >= {name: plain for name, (_, plain) in values.items()}.items()
    recursive = {}
    recursive["a"] = recursive
    made.log(recursive)  # ends nothing, and leaves the file as it is
    assert saved() == before


@pytest.mark.parametrize("obstacle", ["no folder", "a folder in its place", "no variable"])
def test_a_state_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, obstacle):
    path = tmp_path / ("none/" * (obstacle == "no folder")) / "state.json"
    if obstacle == "a folder in its place":
        (path / "x").mkdir(parents=True)
    monkeypatch.setenv("HF_NSF_SAVE_STATE", str(path) if obstacle != "no variable" else "")
    made = trainer(tmp_path, max_steps=2)
    made.train()
    assert made.state.global_step == 2


@pytest.mark.parametrize("is_filtered", [True, False])
def test_a_run_stops_at_a_loss_that_is_not_finite(tmp_path, saved, is_filtered):
    # With the filter, the Trainer logs a loss of 0; transformers 5.2 logs the gradient's norm only where it clips.
    made = trainer(tmp_path, AlwaysNaN, max_steps=20, max_grad_norm=1.0, logging_nan_inf_filter=is_filtered)
    made.train()
    assert made.state.global_step == 1 and saved()["diverged"]
    made.model = made.model_wrapped = Averages()
    made.optimizer = made.lr_scheduler = None
    made.train()
    assert made.state.global_step == 20 and not saved()["diverged"]


@pytest.mark.parametrize(
    ("logs", "diverged"),
    [
        ({"loss": 0.5, "grad_norm": math.nan}, False),  # as where fp16 skips a step
        ({"loss": 0.0, "grad_norm": 1.0}, False),
        ({"loss": 0.0, "grad_norm": math.nan}, True),
        ({"eval_loss": math.inf}, True),
        ({"eval_f1": math.nan}, False),
        ({"loss": "0.5"}, False),
        ({"loss": torch.tensor(math.nan)}, True),
        ({"loss": 10**400}, False),
        ({}, False),
    ],
)
def test_which_logs_show_divergence(logs, diverged):
    assert has_diverged(logs) is diverged


TRAINER_SCRIPT = """
import sys
from stock_script import Classifier, Rows
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

parser = HfArgumentParser(TrainingArguments)
is_file = sys.argv[1].endswith(".json")  # as in transformers' run_clm.py and its like
(args,) = parser.parse_json_file(sys.argv[1]) if is_file else parser.parse_args_into_dataclasses()
set_seed(args.seed)
accuracy = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
trainer = Trainer(Classifier(), args, train_dataset=Rows(256), eval_dataset=Rows(64), compute_metrics=accuracy)
trainer.train()
trainer.evaluate()  # and saves nothing
"""
SETTINGS = {"use_cpu": True, "num_train_epochs": 3, "eval_strategy": "epoch", "logging_steps": 1}
SETTINGS |= {"save_strategy": "no", "report_to": "none"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "options in two processes"])
def test_comparison_of_a_script_that_trains(tmp_path, kind, monkeypatch):
    (tmp_path / "train.py").write_text(TRAINER_SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), prepend=os.pathsep)
    optims = ["adamw_torch", "nsf:p_min=0,cycles=2"]
    options = ["--optims", *optims, "--seeds", "1", "--learning_rates", "1", "--adam_lr", "0.01"]
    options += ["--metric", "eval_accuracy", "--output_dir", str(tmp_path / "cmp")]
    script = ["--", str(tmp_path / "train.py")]
    if kind == "file":
        ours = {"optim": "{optim}", "optim_args": "{optim_args}", "learning_rate": "RATE", "seed": "SEED"}
        text = json.dumps({**SETTINGS, **ours, "output_dir": "{output_dir}"})
        (tmp_path / "args.json").write_text(text.replace('"RATE"', "{learning_rate}").replace('"SEED"', "{seed}"))
        options += ["--template", str(tmp_path / "args.json")]
        script += [str(tmp_path / "args.json")]
    else:
        script += [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
        launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m hf_nsf"
        options += ["--launcher", launcher]
    assert main([*options, *script]) == 0
    rows = json.loads((tmp_path / "cmp" / "comparison.json").read_text())["optimizers"]
    assert [row["optim"] for row in rows] == optims and all(0.8 < row["mean"] <= 1 for row in rows)
    for path in (tmp_path / "cmp").glob("runs/*/result.json"):
        history = json.loads(path.read_text())["log_history"]
        assert sum("eval_accuracy" in entry for entry in history) == 4  # three epochs and the script's own
        assert any("nsf_p" in entry for entry in history) == path.parent.name.startswith("nsf")
    assert (tmp_path / "cmp" / "comparison.png").stat().st_size > 10_000
    assert "HF_NSF_SAVE_STATE" not in os.environ
