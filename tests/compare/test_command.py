# SPDX-License-Identifier: Apache-2.0
"""The comparison's command line: what it refuses, and the commands that it starts."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import Bench

import hf_nsf
from hf_nsf.compare.__main__ import Comparison, main, parse
from hf_nsf.compare.plan import Run

# The arguments after "--optims nsf", and the last line of the error. cfg.json is empty.
REFUSED = {
    "nsf -- -m x": "two of --optims are the same",
    "--start_lr lcam=0.1 -- -m x": "--start_lr names lcam, which is not among --optims",
    "--start_lr 0.1 -- -m x": "0.1 is not of the form OPTIMIZER=RATE",
    "--start_lr nsf=high -- -m x": "nsf=high is not of the form OPTIMIZER=RATE",
    "--start_lr nsf=0 -- -m x": "nsf: 0 is not a finite number above 0",
    "--adam_lr nan -- -m x": "adam_lr: nan is not a finite number above 0",
    "--seeds 0 -- -m x": "seeds: 0 is not a finite number above 0",
    "--max_learning_rates 2 -- -m x": "--max_learning_rates 2 is below --learning_rates",
    "'' -- -m x": "one of --optims has no name",
    "--factor 1.0001 -- -m x": "--factor must be at least 1.01, got 1.0001",
    "--launcher 'no_such_program -m' -- -m x": "no program for --launcher no_such_program -m",
    "--devices_per_run 2 -- -m x": "--devices_per_run is 2, but there are 0 devices",
    "-- -m x --learning-rate=3 --seed 1": "leave --learning-rate=3 and --seed out",
    "nsf:p=0 -- tool {optim} {seed}": "{optim_args}, {learning_rate}, {output_dir}, too",
    "--template no.json -- tool no.json": "No such file or directory: 'no.json'",
    "--template cfg.json -- tool other.json": "must also stand among the script's arguments",
    "--template cfg.json -- tool cfg.json": "must contain {optim}, {learning_rate}",
    "-- no.py": "no script no.py",
    "": "they stand after --",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_arguments(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    Path("cfg.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(shlex.split(f"--output_dir cmp --optims nsf {arguments}"))
    assert REFUSED[arguments] in capsys.readouterr().err.splitlines()[-1]


def test_better_is_lower_for_losses_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for options, better in {
        "--metric eval_f1": "higher",
        "--metric eval_loss": "lower",
        "--metric eval_f1 --lower_is_better": "lower",
        "--metric loss --higher_is_better": "higher",
    }.items():
        assert parse(shlex.split(f"--output_dir cmp --optims lcam {options} -- -m x"))[0].better == better, options


def command(*arguments, optim="nsf:p=0"):
    run = Run(optim, 2e-5, 7)
    made = Comparison(*parse(["--output_dir", "cmp", "--optims", optim, *arguments]))
    folder = Path("cmp").resolve() / "runs" / run.name
    words, files = made.command(run)
    return [word.replace(str(folder), "RUN") for word in words], files


def test_the_command_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ours = ["--optim", "nsf", "--optim_args", "p=0", "--learning_rate", "2.0e-05", "--seed", "7"]
    ours += ["--output_dir", "RUN/output"]
    start, script = [sys.executable, "-m", "hf_nsf"], ["-m", "trl.cli", "sft", "--packing", "true"]
    assert command("--", *script) == ([*start, *script, *ours], {})
    assert "--optim_args" not in command("--", *script, optim="nsf")[0]
    other = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 -m hf_nsf"
    assert command("--launcher", other, "--", *script)[0] == [*other.split(), *script, *ours]
    # Filled in where the command says, nothing is appended.
    script = ["axolotl", "train", "c.yaml", "--optimizer", "{optim}", "--optim_args={optim_args}", "{learning_rate}"]
    filled = ["axolotl", "train", "c.yaml", "--optimizer", "nsf", "--optim_args=p=0", "2.0e-05", "7:RUN/output", "{x}"]
    assert command("--", *script, "{seed}:{output_dir}", "{x}") == ([*start, *filled], {})
    # Files are written to the folder of the run.
    Path("cfg.json").write_text("{optim} {seed} {learning_rate} {output_dir}")
    words, files = command("--template", "cfg.json", "--", "tool", "config=cfg.json", optim="nsf")
    assert words == [*start, "tool", "config=RUN/cfg.json"] and files[Path("cfg.json")].startswith("nsf 7 2.0e-05 /")


def test_dry_run_prints_the_plan_and_later_the_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bench = Bench(tmp_path)
    options = ["--optims", "a", "nsf:p=0,eps=1e-6", "--seeds", "4", "--search_seeds", "2"]
    assert main(bench.arguments(*options, "--jobs", "2", "--dry_run")) == 0
    text = capsys.readouterr().out
    assert "nsf:p=0,eps=1e-6: learning rates 5e-05, 0.0001, 0.0002" in text
    assert "20 runs, up to 44, 2 at a time, such as" in text  # 2 (3 * 2 + 4), 2 (9 * 2 + 4)
    assert "--optim a --learning_rate" in text and "took" not in text
    assert not bench.out.exists() and not bench.starts()
    # Of 6 runs one has a result, after 100 s; two at a time make 250 s of the other five.
    arguments = bench.arguments("--optims", "a", "--seeds", "3", "--jobs", "2", "--dry_run")
    comparison = Comparison(*parse(arguments))
    result = {"code": 0, "seconds": 100.0, "log_history": [], "all_results": {"eval_accuracy": 0.5}}
    (bench.out / "runs" / "a-lr0.0001-seed1001").mkdir(parents=True)
    comparison.finish(Run("a", 1e-4, 1001), result)
    capsys.readouterr()
    assert main(arguments) == 0
    assert "1 of them took 100 s on average, the other 5 take about 04:10, up to 09:10 if" in capsys.readouterr().out


def test_start_without_posix_signals_locks_and_process_groups():
    """As on Windows; torch and transformers are not needed either."""
    code = """
import os, signal, sys, types
sys.modules["hf_nsf"] = types.ModuleType("hf_nsf")
sys.modules["hf_nsf"].__path__ = [sys.argv[1]]
sys.modules["fcntl"] = sys.modules["torch"] = sys.modules["transformers"] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"): vars(signal).pop(name, None)
for name in ("getpgid", "sched_getaffinity"): vars(os).pop(name, None)
from hf_nsf.compare.__main__ import Stop, main
with Stop(): pass
main(["--help"])
"""
    folder = str(Path(hf_nsf.__file__).parent)
    tested = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert "Number of seeds for the final runs (default: 5)" in tested.stdout, tested.stderr
