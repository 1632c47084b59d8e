# SPDX-License-Identifier: Apache-2.0
"""The loop of one's own: it learns, resumes bit for bit, and keeps all processes alike."""

import functools
import json
import tempfile
from pathlib import Path

import accelerate_loop
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from embedded_data import load_digits_images
from forks import launch
from loop_jobs import run_job
from trainer_runs import same
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_nsf import LCAM, LossPhase, p_schedule

OPTIMIZERS = ("nsf", "lcam")
ROWS, BATCH, ACCUMULATION, EPOCHS, UPDATES, AN_EPOCH = 112, 16, 2, 3, 12, 4  # the fourth has one micro-batch
RATES = {"nsf": "1e-3", "lcam": "1e-2"}


@functools.cache
def inputs():
    """A folder with parts of the digits, and with tiny ViTs with and without dropout (the ResNet draws no numbers)."""
    folder = Path(tempfile.mkdtemp())
    digits = load_digits_images()
    for split, rows in (("train", ROWS), ("validation", 50)):
        digits[split].select(range(rows)).to_parquet(folder / f"{split}.parquet")
    for name, dropout in (("dropout", 0.2), ("plain", 0.0)):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, hidden_dropout_prob=dropout, num_labels=10,
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)
    return folder


def command_line(output, optim, *more, model="dropout"):
    folder = inputs()
    args = {
        "output_dir": output, "optim": optim, "model_name_or_path": folder / model, "learning_rate": RATES[optim],
        "num_train_epochs": EPOCHS, "batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION,
        "checkpointing_steps": 2, **{f"{split}_file": folder / f"{split}.parquet" for split in ("train", "validation")},
    }  # fmt: skip
    if optim == "nsf":
        args["optim_args"] = "cycles=3"
    return [str(part) for name, value in args.items() for part in (f"--{name}", value)] + [*map(str, more)]


@functools.cache
def whole(optim):
    """What an uninterrupted run in one process holds at its end, and its folder."""
    folder = Path(tempfile.mkdtemp())
    return run_job(command_line(folder, optim)), folder


def losses(held):
    return [entry["loss"] for entry in held["report"]["log"]]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The process's own Accelerator, on the CPU, and none left behind for other tests."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# ---- one process


@pytest.mark.parametrize(("update", "batches"), [(4, 7), (6, 4), (10, 4)])  # 7 are an epoch
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumes_bit_for_bit(optim, update, batches, tmp_path):
    held, folder = whole(optim)
    checkpoint = folder / f"checkpoint-{update}"
    assert json.loads((checkpoint / "log.json").read_text())[-1]["batches"] == batches
    assert same(run_job(command_line(tmp_path, optim, "--resume_from_checkpoint", checkpoint)), held)
    log = held["report"]["log"]
    assert len(log) == UPDATES == held["report"]["updates"]
    assert json.loads((tmp_path / "metrics.json").read_text())["log"] == log
    knob = {"nsf": "p", "lcam": "momentum"}[optim]
    assert len({entry[knob] for entry in log[6:]}) > 1  # the resumed part has changes to get right


@pytest.mark.parametrize("first_scale", [None, 2.0**127])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_values_of_each_update(optim, first_scale, tmp_path):
    """Without a loss scaler, and with the CPU's: its first scale overflows, and it doubles until it does so again."""
    held = whole(optim)[0] if first_scale is None else run_job(command_line(tmp_path, optim), first_scale=first_scale)
    log, group = held["report"]["log"], held["optimizer"]["param_groups"][0]
    made = held["scheduler"]["last_epoch"]
    # The schedule moves on with every update that was made, and with no other.
    schedule = [float(RATES[optim]) * min(k, (UPDATES - k) / (UPDATES - 1)) for k in range(UPDATES + 1)]
    rates = [entry["lr"] for entry in log] + held["scheduler"]["_last_lr"]
    skipped = [rates[index] == rates[index + 1] for index in range(UPDATES)]
    assert sum(skipped) == UPDATES - made
    if first_scale is not None:
        assert skipped[0] and 0 < sum(skipped[-AN_EPOCH:]) < AN_EPOCH
    phase, exponents = LossPhase(LCAM([torch.zeros(1)])), p_schedule(range(UPDATES), cycles=3, total_steps=UPDATES)
    expected, done = phase.optimizer.param_groups[0], 0
    for index, entry in enumerate(log):
        if index % AN_EPOCH == 0:
            phase.start_epoch()
        assert entry["lr"] == pytest.approx(schedule[done])
        if optim == "lcam":
            assert entry["momentum"] == expected["momentum"]
        elif not skipped[index]:
            assert entry["p"] == exponents[done]
        phase.step(entry["loss"], skipped[index] or index % AN_EPOCH == AN_EPOCH - 1)  # the last has one micro-batch
        done += not skipped[index]
    if optim == "lcam":
        assert len({entry["momentum"] for entry in log}) == 2 and group["loss_count"] == expected["loss_count"]
        assert group["loss_mean"] == pytest.approx(expected["loss_mean"])
    else:
        assert held["optimizer"]["state"][0]["step"] == made
    if first_scale is not None:
        args = command_line(tmp_path / "resumed", optim, "--resume_from_checkpoint", tmp_path / "checkpoint-6")
        assert same(run_job(args, first_scale=first_scale), held)


def test_the_loss_and_the_gradient_are_those_of_the_whole_update(tmp_path):
    """One update an epoch of all rows at once equals one that accumulates, with a last micro-batch of its own."""
    at_once = ["--batch_size", ROWS, "--gradient_accumulation_steps", 1, "--num_train_epochs", 4]
    parts = ["--batch_size", ROWS // 4, "--gradient_accumulation_steps", 5, "--num_train_epochs", 4]
    a, b = (run_job(command_line(tmp_path, "nsf", *more, model="plain")) for more in (at_once, parts))
    assert losses(a) == pytest.approx(losses(b), rel=1e-5) and len(losses(a)) == 4
    moments_a, moments_b = (each["optimizer"]["state"][0]["exp_avg"] for each in (a, b))
    assert torch.allclose(moments_a, moments_b, rtol=1e-3, atol=1e-7) and moments_a.abs().max() > 1e-4


def test_a_killed_save_is_passed_over(tmp_path):
    args = command_line(tmp_path, "lcam", "--resume_from_checkpoint", "last")
    assert "report" not in run_job(args, killed_in_save=3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "partial-checkpoint"}
    assert same(run_job(args), whole("lcam")[0])
    assert not (tmp_path / "partial-checkpoint").exists()


def test_bf16_autocast(tmp_path):
    held, exact = run_job(command_line(tmp_path, "nsf", "--mixed_precision", "bf16")), whole("nsf")[0]
    assert losses(held) != losses(exact) and losses(held) == pytest.approx(losses(exact), rel=0.02)
    assert all(value.dtype == torch.float32 for value in held["weights"].values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--mixed_precision fp16", "mixed_precision=fp16 needs a GPU: allowed are no and bf16"),
        ("--optim_args p_min=0.7", "p_min=0.7 is above p_max=0.5 (the default)"),
        ("--optim lcam --optim_args low_loss_momentum=2", "allowed is a number in [0, 1)"),
        ("--learning_rate -1", "lr=-1.0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0 is not allowed: give 1 or more"),
        ("--num_train_epochs 0 --optim lcam", "num_train_epochs=0 is not allowed: give 1 or more"),
        ("--checkpointing_steps -3", "checkpointing_steps=-3 is not allowed: give 1 or more"),
        ("--batch_size 0", "batch_size=0"),
        ("--train_file gone.csv", "gone.csv"),
        ("--optim_args momentum=0.9", "optim=nsf has no option 'momentum'"),
        ("--resume_from_checkpoint gone", "Tried to find gone but folder does not exist"),
        (f"--resume_from_checkpoint {Path(__file__).parent}", "No such file or directory"),
        ("--momentum 0.9", "--momentum"),
    ],
)
def test_a_wrong_value_is_one_sentence(flags, sentence, tmp_path):
    with pytest.raises(SystemExit) as caught:
        accelerate_loop.main(["--output_dir", str(tmp_path), *flags.split()])
    assert str(caught.value).startswith("error: ") and sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_optimizers_checkpoint_is_refused(tmp_path):
    checkpoint = whole("nsf")[1] / "checkpoint-2"
    error = run_job(command_line(tmp_path, "lcam", "--resume_from_checkpoint", checkpoint))["error"]
    assert error.startswith("error: ") and "LCAM" in error and "\n" not in error


def test_learns_the_digits(tmp_path):
    report = run_job(["--output_dir", str(tmp_path), "--num_train_epochs", "4", "--architecture", "wrn-10-1"])["report"]
    assert report["test_accuracy"] >= 0.95
    assert sum(entry["loss"] for entry in report["log"][-10:]) < sum(entry["loss"] for entry in report["log"][:10]) / 5


# ---- two processes


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "launcher"), [("lcam", "torchrun"), ("nsf", "torchrun"), ("nsf", "accelerate")])
def test_two_processes(optim, launcher, tmp_path):
    jobs = [
        {"name": "whole", "args": command_line(tmp_path / "whole", optim)},
        {"name": "resumed", "args": command_line(
            tmp_path / "resumed", optim, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-6")},
        {"name": "plain", "args": command_line(tmp_path / "plain", optim, model="plain")},
        {"name": "bf16", "args": command_line(tmp_path / "bf16", optim, "--mixed_precision", "bf16")},
        {"name": "odd", "args": command_line(tmp_path, optim, "--batch_size", 15)},
    ]  # fmt: skip
    done, ranks = launch("loop_jobs.py", jobs, tmp_path, launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the batch size (15) needs to be a round multiple of the number of processes (2)" in ranks["odd"][0]["error"]
    for name in ("whole", "resumed", "plain", "bf16"):
        a, b = ranks[name]
        assert same({**a, "random": None}, {**b, "random": None})  # one model, one log
        assert not torch.equal(a["random"], b["random"])  # but each its own dropout
    assert same(ranks["resumed"], ranks["whole"])
    exact, rounded = losses(ranks["whole"][0]), losses(ranks["bf16"][0])
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)
    # Two processes share each batch: they make the updates of one process.
    one = run_job(command_line(tmp_path / "one", optim, model="plain"))["report"]
    two = ranks["plain"][0]["report"]
    for mine, other in zip(one["log"], two["log"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert one["validation_accuracy"] == two["validation_accuracy"]


@pytest.mark.slow
def test_two_processes_one_of_them_killed_while_saving(tmp_path):
    good, broken = (command_line(tmp_path / name, "lcam", "--resume_from_checkpoint", "last") for name in ("a", "b"))
    job = {"name": "killed", "args": broken, "killed_in_save": 3, "kill_rank": 1}
    killed, _ = launch("loop_jobs.py", [job], tmp_path)
    assert killed.returncode != 0
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"checkpoint-2", "checkpoint-4", "partial-checkpoint"}
    jobs = [{"name": "whole", "args": good}, {"name": "broken", "args": broken}]
    done, ranks = launch("loop_jobs.py", jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Resuming from") == 1 and "checkpoint-4" in done.stdout
    assert same(ranks["broken"], ranks["whole"])
