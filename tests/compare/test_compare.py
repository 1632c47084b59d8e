# SPDX-License-Identifier: Apache-2.0
"""The comparison of optimizers, over a script that only writes what a Trainer would write."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_nsf import compare

# The best rate of each optimizer lies where BEST says; the metric falls with the square of the distance in octaves.
SCRIPT = """
import json, math, os, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
optim, seed, rate = given["--optim"], int(given["--seed"]), float(given["--learning_rate"])
key = optim + (":" + given["--optim_args"] if "--optim_args" in given else "")
with open(given["--starts"], "a") as file:
    file.write(f"{key} {rate:g} {seed}\\n")
with open(given["--starts"] + ".pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
sleep = Path(given["--starts"]).with_name("sleep")
time.sleep(float(sleep.read_text()) if sleep.exists() else 0)
if key == "broken":
    sys.exit("last words of a broken run")
best = {"adamw": 1e-4, "sgd": 0.32, "sgd:momentum=0.9": 0.02, "nsf:p=0,eps=1e-6": 1e-4}.get(key, 1e-4)
value = 0.9 - 0.01 * math.log2(rate / best) ** 2 + 0.001 * seed + (0.02 if key.startswith("nsf") else 0)
loss = math.nan if rate > 2 * best or key == "diverging" else 0.5
history = [{"loss": loss, "step": 5}]
speed = 2 if key.startswith("nsf") else 1
history += [{"eval_accuracy": value * min(speed * k / 10, 1), "eval_loss": loss, "step": 10 * k} for k in range(1, 11)]
history += [{"train_runtime": 50.0, "train_loss": 0.4, "step": 100}, {"eval_accuracy": value, "step": 100}]
out = Path(given["--output_dir"])
out.mkdir()  # an error where an earlier try left something
state = Path(os.environ["HF_NSF_SAVE_STATE"]) if given.get("--saves") == "callback" else out / "trainer_state.json"
if given.get("--saves") != "nothing":
    state.write_text(json.dumps({"log_history": history}))
if given.get("--saves") == "metrics":
    (out / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.25, "eval_loss": 1.0}))
"""


class Bench:
    """One folder with the script, and short ways to call the comparison and to see what it did."""

    def __init__(self, folder: Path):
        self.folder, self.script = folder, folder / "script.py"
        self.out, self.starts = folder / "cmp", folder / "starts"
        self.script.write_text(SCRIPT)

    def arguments(self, *options: str, script: tuple[str, ...] = ()) -> list[str]:
        launcher = f"{sys.executable} -S"  # without the packages of the environment it starts at once
        ours = ["--output_dir", str(self.out), "--launcher", launcher, "--metric", "eval_accuracy", "--jobs", "2"]
        return [*ours, *options, "--", str(self.script), "--starts", str(self.starts), *script]

    def compare(self, *options: str, script: tuple[str, ...] = ()) -> dict:
        """The summary, by optimizer, of a comparison that must succeed."""
        assert compare.main(self.arguments(*options, script=script)) == 0
        return {row["optim"]: row for row in json.loads((self.out / "comparison.json").read_text())["optimizers"]}

    def started(self) -> list[tuple[str, float, int]]:
        lines = self.starts.read_text().splitlines() if self.starts.exists() else []
        return [(optim, float(rate), int(seed)) for optim, rate, seed in map(str.split, lines)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.Comparison, "picture", lambda self, path: None)
    return Bench(tmp_path)


def test_protocol(bench, capsys):
    rows = bench.compare("--optims", "adamw", "nsf:p=0,eps=1e-6", "sgd", "--seeds", "3", "--search_seeds", "2")
    started = bench.started()
    assert len(set(started)) == len(started)
    # sgd's best rate is four doublings above its start: all grids grew until it lay inside, adamw's at its better end.
    rates = {optim: sorted({rate for o, rate, seed in started if o == optim and seed > 1000}) for optim in rows}
    assert rates["sgd"] == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]
    assert {len(of_one) for of_one in rates.values()} == {7}
    assert all(b == pytest.approx(2 * a, rel=1e-3) for of_one in rates.values() for a, b in itertools.pairwise(of_one))
    assert rows["sgd"]["learning_rate"] == 0.32 and not rows["sgd"]["rate_on_edge"]
    assert rows["adamw"]["learning_rate"] == rows["nsf:p=0,eps=1e-6"]["learning_rate"] == 1e-4
    # The seeds of the result are the same for all, and none of the search.
    for optim, row in rows.items():
        mine = [(rate, seed) for o, rate, seed in started if o == optim and seed < 1000]
        assert sorted(mine) == [(row["learning_rate"], seed) for seed in (1, 2, 3)]
    values = [0.901, 0.902, 0.903]
    first, nsf = rows["adamw"], rows["nsf:p=0,eps=1e-6"]
    assert list(first["values"].values()) == pytest.approx(values)
    assert first["mean"] == pytest.approx(0.902)
    assert first["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert first["difference"] is None
    assert nsf["difference"] == pytest.approx(0.02) and nsf["difference_error"] == pytest.approx(0, abs=1e-12)
    # Runs of adamw reach their own mean at the end, if at all; nsf stands above it half-way.
    assert (first["reached"], first["updates_to_target"], first["seconds_to_target"]) == (2, 100, 50)
    assert (nsf["reached"], nsf["updates_to_target"], nsf["seconds_to_target"]) == (3, 50, 25)
    text = capsys.readouterr().out
    assert "every optimizer is tried at the same number of rates (3)" in " ".join(text.split())
    assert "| `nsf:p=0,eps=1e-6` | 0.0001 | 0.922 ± 0.00058 | +0.02 ± " in text
    assert text.count("seed 1001") == 21
    # Nothing is repeated; more seeds and another metric ask for what is missing only.
    assert bench.compare("--optims", "adamw", "nsf:p=0,eps=1e-6", "sgd", "--seeds", "3", "--search_seeds", "2") == rows
    assert bench.started() == started
    bench.compare("--optims", "adamw", "nsf:p=0,eps=1e-6", "sgd", "--seeds", "4", "--search_seeds", "2")
    assert {seed for _, _, seed in bench.started()[len(started) :]} == {4}
    assert len(bench.started()) == len(started) + 3


def test_the_grid_ends_at_its_maximum_and_says_so(bench, capsys):
    rows = bench.compare("--optims", "adamw", "sgd", "--seeds", "1", "--max_learning_rates", "5", "--sgd_lr", "0.04")
    assert rows["sgd"]["learning_rate"] == 0.32 and rows["sgd"]["rate_on_edge"]
    assert len(rows["sgd"]["search"]) == len(rows["adamw"]["search"]) == 5
    assert "| 0.32 (edge) |" in capsys.readouterr().out


def test_rates_lower_metrics_and_a_run_without_a_search(bench):
    options = ["--optims", "adamw", "sgd", "sgd:momentum=0.9", "--seeds", "1", "--learning_rates", "1"]
    rows = bench.compare(*options, "--start_lr", "sgd:momentum=0.9=0.02", "sgd=0.32", "adamw=0.0001")
    assert [(row["learning_rate"], row["mean"]) for row in rows.values()] == [
        (1e-4, pytest.approx(0.901)),
        (0.32, pytest.approx(0.901)),
        (0.02, pytest.approx(0.901)),
    ]
    assert {seed for _, _, seed in bench.started()} == {1}
    for options, better in [
        (["--metric", "eval_f1"], "higher"),
        (["--metric", "eval_loss"], "lower"),
        (["--metric", "eval_f1", "--lower_is_better"], "lower"),
        (["--metric", "loss", "--higher_is_better"], "higher"),
    ]:
        assert compare.parse(bench.arguments("--optims", "lcam", *options))[0].better == better
    comparison = compare.Comparison(
        *compare.parse(bench.arguments("--optims", "lcam:x=1", "my_sgd", "nsf", "adafactor"))
    )
    assert [grid[1] for grid in comparison.grids.values()] == [0.02, 0.02, 1e-4, 1e-4]


def test_a_lower_metric_moves_the_grid_to_the_lower_end(bench):
    # Of this script's "accuracy" the lowest is the farthest from the best rate, and higher rates diverge.
    rows = bench.compare("--optims", "adamw", "--seeds", "2", "--lower_is_better", "--max_learning_rates", "4")
    assert rows["adamw"]["learning_rate"] == pytest.approx(2.5e-5) and rows["adamw"]["rate_on_edge"]
    assert list(rows["adamw"]["search"]) == ["2.5e-05", "5e-05", "0.0001", "0.0002"]


def test_failed_and_diverged_runs(bench, capsys):
    options = ["--optims", "adamw", "broken", "diverging", "--seeds", "2", "--max_learning_rates", "4"]
    rows = bench.compare(*options)
    assert rows["adamw"]["lost"] == 0 and rows["adamw"]["mean"] == pytest.approx(0.9015)
    # What fails is left out after its first rates, and does not let the others grow; what diverges goes lower first.
    assert sum(optim == "broken" for optim, _, _ in bench.started()) == 3
    assert rows["broken"]["runs"] == 0 and rows["broken"]["mean"] is None
    assert rows["diverging"]["learning_rate"] == 2.5e-5
    assert (rows["diverging"]["lost"], rows["diverging"]["mean"], rows["diverging"]["difference"]) == (2, None, None)
    text = capsys.readouterr().out
    assert text.count("last words of a broken run") == 3
    assert f"{bench.out}/runs/broken-lr5e-05-seed1001/log.txt" in text
    assert "broken: all runs failed" in text and "DIVERGED" in text
    assert "3 runs failed; the same command tries them again." in text
    before = len(bench.started())
    bench.compare(*options)
    assert [optim for optim, _, _ in bench.started()[before:]] == ["broken"] * 3


def test_without_a_result_of_the_first_optimizer_there_is_still_a_table(bench, capsys):
    assert compare.main(bench.arguments("--optims", "broken", "adamw", "--seeds", "1")) == 1
    assert "| `adamw` | 0.0001 | 0.901 | – | – | – | 0 of 1 | 0 of 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("saves", ["callback", "metrics", "nothing"])
def test_where_results_are_read(bench, capsys, saves):
    options = ["--optims", "adamw", "--seeds", "1", "--learning_rates", "1"]
    code = compare.main(bench.arguments(*options, script=("--saves", saves)))
    text = capsys.readouterr().out
    expected = {"callback": "eval_accuracy 0.901", "metrics": "eval_accuracy 0.25", "nothing": "FAILED, neither"}
    assert expected[saves] in text
    assert code == (saves == "nothing")


def test_the_plan(bench, capsys):
    options = ["--optims", "adamw", "nsf:p=0,eps=1e-6", "--seeds", "4", "--search_seeds", "2", "--dry_run"]
    assert compare.main(bench.arguments(*options)) == 0
    text = capsys.readouterr().out
    assert "nsf:p=0,eps=1e-6: learning rates 5e-05, 0.0001, 0.0002" in text
    assert "20 runs, up to 44, such as" in text  # 2 (3 * 2 + 4), 2 (9 * 2 + 4)
    assert "--optim adamw --learning_rate 5e-05 --seed 1 --output_dir" in text
    assert not bench.out.exists() and not bench.started()


def test_the_command_of_a_run(bench):
    arguments = ["--output_dir", "cmp", "--optims", "nsf:p=0", "--", "-m", "trl.cli", "sft", "--packing", "true"]
    comparison = compare.Comparison(*compare.parse(arguments))
    run = compare.Run("nsf:p=0", 2e-5, 7)
    folder = Path("cmp").resolve() / "runs" / "nsf_p=0-lr2e-05-seed7" / "output"
    ours = [
        "--optim",
        "nsf",
        "--optim_args",
        "p=0",
        "--learning_rate",
        "2e-05",
        "--seed",
        "7",
        "--output_dir",
        str(folder),
    ]
    script = ["-m", "trl.cli", "sft", "--packing", "true"]
    assert comparison.command(run) == [sys.executable, "-m", "hf_nsf", *script, *ours]
    comparison.options.launcher = "torchrun --nproc_per_node 2 -m hf_nsf"
    assert comparison.command(run)[:5] == ["torchrun", "--nproc_per_node", "2", "-m", "hf_nsf"]


@pytest.mark.parametrize(
    ("options", "script", "sentence"),
    [
        (["--optims", "nsf", "nsf"], [], "two of --optims are the same"),
        (["--optims", "nsf", "--start_lr", "lcam=0.1"], [], "--start_lr names lcam, which is not among --optims"),
        (["--optims", "nsf", "--seeds", "0"], [], "0 is not above 0"),
        (["--optims", "nsf", "--factor", "1"], [], "--factor must be above 1"),
        (["--optims", "nsf", "--start_lr", "0.1"], [], "0.1 is not of the form OPTIMIZER=RATE"),
        (["--optims", "nsf", "--launcher", "no_such_program -m"], [], "no program for --launcher no_such_program -m"),
        (["--optims", "nsf"], ["--learning-rate=3", "--seed", "1"], "leave --learning-rate=3 and --seed out"),
    ],
)
def test_wrong_arguments(bench, capsys, options, script, sentence):
    with pytest.raises(SystemExit):
        compare.main(bench.arguments(*options, script=tuple(script)))
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_script_and_a_missing_metric(bench, capsys):
    for script, sentence in (["--", "no.py"], "there is no script no.py"), ([], "they stand after --"):
        with pytest.raises(SystemExit):
            compare.main(["--output_dir", "cmp", "--optims", "nsf", *script])
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="--metric eval_f1 is not among .*: eval_accuracy, eval_loss."):
        compare.main(bench.arguments("--optims", "adamw", "--metric", "eval_f1", "--jobs", "1"))
    assert len(bench.started()) == 1
    bench.compare("--optims", "adamw", "--seeds", "1")  # the finished run serves another metric
    assert len(bench.started()) == 4


def test_other_arguments_of_the_script_are_refused(bench):
    options = ["--optims", "adamw", "--seeds", "1", "--learning_rates", "1"]
    bench.compare(*options)
    with pytest.raises(SystemExit, match=f"{bench.out} holds runs of another command, .* take another --output_dir"):
        compare.main(bench.arguments(*options, script=("--saves", "metrics")))


def start(bench, seconds, options=("--optims", "adamw", "sgd", "--seeds", "1")):
    """The comparison in a process of its own, with runs that take so long, and the processes of its first runs."""
    (bench.folder / "sleep").write_text(str(seconds))
    # compare.py by its path: it needs nothing of the package before the picture, and so starts at once.
    tool = subprocess.Popen(
        [sys.executable, compare.__file__, *bench.arguments(*options)],
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background, such as these tests may be, has Ctrl-C ignored, and its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(processes(bench)) == 2)
    return tool, processes(bench)


def processes(bench):
    """Those of all runs that were started and are alive."""
    pids = Path(f"{bench.starts}.pids")
    return [pid for pid in map(int, pids.read_text().split()) if alive(pid)] if pids.exists() else []


def at_work(bench):
    """Whether any process has to do with the comparison: also a run that has not come as far as to note itself."""
    for process in psutil.process_iter():
        try:
            if any(str(bench.out) in word for word in process.cmdline()):
                return True
        except psutil.Error:  # it has ended
            pass
    return False


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "\tZ" in status.read_text())  # nobody may be there to ask how it ended


# The second launcher's runs are children of a shell, as those of torchrun are of its agent.
@pytest.mark.parametrize("launcher", [(), ("sh", "-c", '"$0" "$@" & wait', sys.executable, "-S")])
def test_kill_and_resume(bench, launcher):
    options = ["--optims", "adamw", "sgd", "--seeds", "1", *(["--launcher", shlex.join(launcher)] if launcher else [])]
    tool, left = start(bench, 60, options)
    parents = {psutil.Process(pid).ppid() for pid in left} - {tool.pid}
    for process in (tool.pid, *parents):
        os.kill(process, signal.SIGKILL)
    tool.wait()
    assert all(map(alive, left))  # they go on alone, until the next call ends them and starts their runs again
    (bench.folder / "sleep").write_text("0.3")
    tool = subprocess.Popen([sys.executable, compare.__file__, *bench.arguments(*options)])
    wait_for(lambda: len(list(bench.out.glob("runs/*/result.json"))) >= 3)
    assert not any(map(alive, left))
    tool.kill()
    tool.wait()
    finished = {path.parent.name for path in bench.out.glob("runs/*/result.json")}
    (bench.folder / "sleep").write_text("0")
    wait_for(lambda: not at_work(bench))  # the runs that it left end soon
    before = len(bench.started())
    rows = bench.compare(*options)
    again = [f"{optim}-lr{rate:g}-seed{seed}" for optim, rate, seed in bench.started()[before:]]
    assert not finished & set(again)
    assert len(finished) + len(again) == 16 == len(finished | set(again))
    assert rows["sgd"]["learning_rate"] == 0.32


def test_processes_of_finished_runs_and_of_others_are_left_alone(bench):
    """Such as one that still uploads what a finished run has logged."""
    options = ["--optims", "adamw", "--seeds", "1", "--learning_rates", "1"]
    bench.compare(*options)
    (state,) = (path.with_name("trainer_state.json") for path in bench.out.glob("runs/*/result.json"))
    sleeps = [
        subprocess.Popen(["sleep", "60"], env={**os.environ, "HF_NSF_SAVE_STATE": str(path)})
        for path in (state, bench.folder / "cmp2" / "runs" / "a" / "trainer_state.json")
    ]
    try:
        bench.compare(*options)
        assert [process.poll() for process in sleeps] == [None, None]
    finally:
        for process in sleeps:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_runs(bench, number):
    tool, children = start(bench, 60)
    tool.send_signal(number)
    _, errors = tool.communicate(timeout=30)
    assert tool.returncode == 130 and "Stopped. Finished runs are kept" in errors
    assert not any(map(alive, children))


def test_two_comparisons_do_not_share_a_folder(bench):
    tool, _ = start(bench, 60)
    with pytest.raises(SystemExit, match="Another comparison is at work in"):
        compare.main(bench.arguments("--optims", "adamw"))
    tool.terminate()
    tool.communicate()


TRAINER_SCRIPT = """
import sys
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
x = torch.randn(320, 8)
data = [{"x": row, "labels": int(row[0] * row[1] > 0)} for row in x]
torch.manual_seed(args.seed)
accuracy = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
trainer = Trainer(Model(), args, train_dataset=data[:256], eval_dataset=data[256:], compute_metrics=accuracy)
trainer.train()
trainer.evaluate()  # and saves nothing
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["", f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m hf_nsf"]
)
def test_a_real_trainer(tmp_path, launcher):
    (tmp_path / "train.py").write_text(TRAINER_SCRIPT)
    options = ["--optims", "adamw_torch", "nsf:p_min=0,cycles=2", "--seeds", "1", "--learning_rates", "1"]
    options += ["--adam_lr", "0.01", "--metric", "eval_accuracy", "--output_dir", str(tmp_path / "cmp")]
    script = ["--use_cpu", "true", "--num_train_epochs", "3", "--eval_strategy", "epoch", "--logging_steps", "1"]
    script += ["--save_strategy", "no", "--report_to", "none"]
    script = ["--", str(tmp_path / "train.py"), *script]
    assert compare.main([*options, *(["--launcher", launcher] if launcher else []), *script]) == 0
    rows = json.loads((tmp_path / "cmp" / "comparison.json").read_text())["optimizers"]
    assert [row["optim"] for row in rows] == ["adamw_torch", "nsf:p_min=0,cycles=2"]
    assert all(0.5 < row["mean"] <= 1 for row in rows)
    for row in rows:
        name = compare.Run(row["optim"], 0.01, 1).name
        history = json.loads((tmp_path / "cmp" / "runs" / name / "result.json").read_text())["log_history"]
        assert sum("eval_accuracy" in entry for entry in history) == 4  # three epochs and the script's own
        assert any("nsf_p" in entry for entry in history) == row["optim"].startswith("nsf")
    assert (tmp_path / "cmp" / "comparison.png").stat().st_size > 10_000
