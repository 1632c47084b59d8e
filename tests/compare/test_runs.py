# SPDX-License-Identifier: Apache-2.0
"""Whatever a run does: its results, its files, its processes and the signals to its comparison."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time

import psutil
import pytest
from stand_in import Bench, alive, wait_for

from hf_nsf.compare import __main__ as tool
from hf_nsf.compare import runs as runs_module

fcntl = pytest.importorskip("fcntl", reason="signals, process groups and terminals of POSIX")
termios = pytest.importorskip("termios")

SLEEPS = "time.sleep(60)"
ERASES_ITS_ENVIRONMENT = """import ctypes
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
ctypes.memset(int(fields[47]), 0, int(fields[48]) - int(fields[47]))
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(tool, "picture", lambda plan, path: None)
    bench = Bench(tmp_path)
    yield bench
    for pid in bench.alive():
        os.kill(pid, signal.SIGKILL)


# What a run does, what is said of it, and whether the next call tries it again.
RESULTS = {
    "crash after its results": ("results('{\"eval_accuracy\": 0.25}'); sys.exit(3)",
        "eval_accuracy 0.25 (exit code 3 after its results)", False),
    "null": ("results('{\"eval_accuracy\": null}')", "DIVERGED", False),
    "NaN": ("results('{\"eval_accuracy\": NaN}')", "DIVERGED", False),
    "stopped by SaveState": ("state.write_text(json.dumps({'log_history': log, 'diverged': True}))", "DIVERGED", False),
    "no metric beside runs that have it": ("save(log[:1])", "FAILED, --metric eval_accuracy is not among", False),
    "nothing": ("pass", "FAILED, neither a trainer_state.json nor an all_results.json", True),
    "truncated": ("state.write_text(json.dumps({'log_history': log})[:60])", "FAILED, neither", True),
    "not UTF-8": ("state.write_bytes(b'\\xff\\xfe')", "FAILED, neither", True),
    "a list": ("state.write_text('[1]'); results('7')", "FAILED, neither", True),
    "deep": ("state.write_text('[' * 100000)", "FAILED, neither", True),
    "a foreign log": ("state.write_text('{\"log_history\": {\"a\": 1}}')", "FAILED, neither", True),
    "entries of other kinds": ("save([1, None, 'a', *log, {'step': 'x', 'eval_f1': []}])", "eval_accuracy 0.9", False),
    "only a state in output": ("save(log, out / 'trainer_state.json')", "eval_accuracy 0.901", False),
    "results beside a damaged state": ("state.write_text('{'); results('{\"eval_accuracy\": 0.25}')", "0.25", False),
    "its folder removed": ("import shutil; shutil.rmtree(out.parent)", "FAILED, neither", True),
    "last words": ("sys.exit('last words' + chr(0x2192))", "FAILED, exit code 1", True),
    "a log of 10 MB": ("[print('x' * 10**6) for _ in range(10)]; sys.exit('last words')", "last words", True),
}  # fmt: skip


def test_results_of_runs(bench, capsys):
    """All kinds in one comparison: none ends the others."""
    bench.set_faults(**{kind: code for kind, (code, _, _) in RESULTS.items()})
    reports = []
    for _ in range(2):
        assert tool.main(bench.one_rate("good", *RESULTS)) == 0  # the good one first, so that the metric is known
        text, _, table = capsys.readouterr().out.partition("| optimizer |")
        parts = re.split(r"^(.*), lr 0.0001, seed 1, ", text, flags=re.MULTILINE)
        reports.append(dict(zip(parts[1::2], parts[2::2], strict=True)))
    rows = {row["optim"]: row for row in bench.summary()["optimizers"]}
    assert rows["good"]["mean"] == pytest.approx(0.901)
    for kind, (_, sentence, again) in RESULTS.items():
        assert sentence in reports[0][kind], (kind, reports[0][kind])
        assert (kind in reports[1]) == again and bench.starts().count((kind, 1e-4, 1)) == 1 + again, kind
        lost = again or sentence.startswith(("DIVERGED", "FAILED"))
        assert (rows[kind]["mean"] is None) == lost == bool(rows[kind]["lost"]), kind
    assert "which ends with\n    last words" in reports[0]["last words"] and len(reports[0]["a log of 10 MB"]) < 10_000
    assert "`crash after its results` ended with exit code 3 (seed 1)" in table


def test_every_run_failed(bench, capfd):
    bench.set_faults(x="print('first words'); sys.exit('last words')", y="sys.exit(1)")
    assert tool.main(bench.one_rate("x", "y")) == 1
    out, err = capfd.readouterr()
    assert err.rstrip().endswith("log.txt ends with\n    first words\n    last words") and "Every run failed." in err
    assert "| optimizer |" not in out and not (bench.out / "comparison.json").exists()


def test_a_mistyped_metric_ends_the_comparison_at_once(bench):
    options = bench.arguments("--optims", "a")
    wrong = [option.replace("eval_accuracy", "eval_f1") for option in options]
    with pytest.raises(SystemExit, match="--metric eval_f1 is not among what it reports: eval_accuracy."):
        tool.main(wrong)
    assert len(bench.starts()) == 1
    for _ in range(2):
        assert tool.main(options) == 0  # the finished run serves another metric
        assert len(bench.starts()) == 8
        with pytest.raises(SystemExit, match="eval_f1 is not among"):
            tool.main(wrong)


def test_finished_runs_are_not_repeated(bench):
    arguments = bench.arguments("--optims", "a", "b:x=1/2", "b:x=1_2", "--seeds", "2")
    assert tool.main(arguments) == 0
    summary, starts = bench.summary(), bench.starts()
    assert summary["optimizers"][0]["learning_rate"] == 1e-4 and len(set(starts)) < len(starts) == 3 * (5 + 2)
    assert tool.main(arguments) == 0 and bench.summary() == summary and bench.starts() == starts
    assert tool.main(bench.arguments("--optims", "a", "b:x=1/2", "--seeds", "3")) == 0
    assert [seed for _, _, seed in bench.starts()[len(starts) :]] == [3, 3]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def leave_record(run, **changes):
    edit((run / "result.json").rename(run / "process.json"), **{"inode": run.stat().st_ino, **changes})


# What happens to a file of the comparison between two calls, and what the second says; without a sentence it succeeds.
FILES = {
    "result truncated": (lambda run: (run / "result.json").write_text('{"run": ["a"'), None),
    "result of another run": (lambda run: edit(run / "result.json", run=["b", 1e-4, 1]), None),
    "result without its log": (lambda run: edit(run / "result.json", log_history=None), None),
    "result whose code is text": (lambda run: edit(run / "result.json", code="0"), None),
    "record without a token": (leave_record, None),
    "record with a list as token": (lambda run: leave_record(run, token=["t"], time=2**33), None),
    "record with text as time": (lambda run: leave_record(run, token="t", time="now"), None),
    "a file in place of the run": (replace_by_file, None),
    "a file in place of the runs": (lambda run: replace_by_file(run.parent), "director"),
    "a file in place of the folder": (lambda run: replace_by_file(run.parents[1]), "File exists"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_of_a_comparison(bench, kind):
    damage, sentence = FILES[kind]
    arguments = bench.one_rate("a")
    assert tool.main(arguments) == 0
    before = bench.summary()
    damage(bench.out / "runs" / "a-lr0.0001-seed1")
    if sentence:
        with pytest.raises(SystemExit, match=sentence):
            tool.main(arguments)
    else:
        assert tool.main(arguments) == 0
        assert bench.summary() == before and len(bench.starts()) == 2


def test_a_command_without_results_may_be_corrected(bench):
    bench.set_faults(x="sys.exit(1)")
    arguments = bench.one_rate("x")
    assert tool.main([*arguments, "--wrong", "1"]) == 1
    bench.set_faults()
    assert tool.main(arguments) == 0
    with pytest.raises(SystemExit, match="holds runs of another command.*script.py. Take another"):
        tool.main([*arguments, "--wrong", "1"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_told(bench, monkeypatch, number):
    bench.set_faults(a=SLEEPS)
    real = runs_module.write

    def write(path, content):
        if "pid" in content:  # the run has been started
            wait_for(bench.alive)
            raise OSError(number, os.strerror(number), str(path))
        real(path, content)

    monkeypatch.setattr(runs_module, "write", write)
    with pytest.raises(SystemExit, match=f"python -m hf_nsf.compare: .*{os.strerror(number)}"):
        tool.main(bench.one_rate("a"))
    assert not bench.alive()


def test_a_folder_that_cannot_be_emptied_is_no_obstacle(bench, monkeypatch):
    bench.set_faults(a="sys.exit(1)")
    assert tool.main(bench.one_rate("a")) == 1
    bench.set_faults()

    def busy(path, *args, **kwargs):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    monkeypatch.setattr(os, "rmdir", busy)
    assert tool.main(bench.one_rate("a")) == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_told_as_such(bench, monkeypatch, capsys, error):
    def acquire(self, timeout):
        raise error

    monkeypatch.setattr(tool.filelock.FileLock, "acquire", acquire)
    assert tool.main(bench.one_rate("a")) == 0
    assert f"cannot be locked ({error})" in capsys.readouterr().err


def test_streams_of_few_letters_or_closed_ones(bench, monkeypatch):
    bench.set_faults(x="sys.stdout.buffer.write(('loss ' + chr(0x2192) + ' nan').encode()); sys.exit(1)")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert tool.main(bench.one_rate("a", "x", "--seeds", "2")) == 0
    assert b"loss ? nan" in out.buffer.getvalue() and b"0.9015 ? 0.0005" in out.buffer.getvalue()
    process = bench.popen(bench.one_rate("x"))
    process.stdout.close()
    process.stderr.close()
    assert process.wait(30) == 1 and len(bench.starts()) == 5
    command = shlex.join([sys.executable, "-m", "hf_nsf.compare", *bench.one_rate("x")])
    assert subprocess.run(["bash", "-c", f"{command} >&- 2>&-"]).returncode == 1 and len(bench.starts()) == 6


def test_a_file_holds_an_argument_that_is_not_utf8(tmp_path):
    runs_module.write(tmp_path / "comparison.md", os.fsdecode(b"caf\xe9.csv"))
    assert (tmp_path / "comparison.md").read_bytes() == b"caf\xe9.csv"


CUDA, OMP = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("environment", "probed", "devices_per_run", "jobs", "shares"),
    [
        ({CUDA: "0,1,2,3"}, "", 1, 2, [{CUDA: name} for name in "0123"]),
        ({CUDA: "GPU-a, GPU-b"}, "", 1, 4, [{CUDA: "GPU-a"}, {CUDA: "GPU-b"}]),
        ({CUDA: "4,5,6,7,8"}, "", 2, None, [{CUDA: "4,5"}, {CUDA: "6,7"}]),
        ({CUDA: "-1"}, "cuda 2", 1, None, [{}]),
        # torch sees accelerators that no variable names.
        ({}, "cuda 2", 1, None, [{CUDA: "0"}, {CUDA: "1"}]),
        ({}, "mps 1", 1, None, [{}]),
        ({}, "False 0", 1, None, [{}]),
        ({}, "", 1, None, [{}]),
        # The 8 cores of a CPU are shared out, unless the user did it.
        ({}, "", 1, 3, [{OMP: "2"}]),
        ({}, "", 1, 30, [{OMP: "1"}]),
        ({OMP: "5"}, "", 1, 3, [{}]),
    ],
)
def test_shares_of_the_devices(monkeypatch, environment, probed, devices_per_run, jobs, shares):
    for name in (CUDA, OMP):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(runs_module, "PROBE", f"print({probed!r})")
    assert runs_module.find_shares(devices_per_run, jobs) == shares


def test_each_run_gets_its_share_of_the_devices(bench, monkeypatch, capsys):
    monkeypatch.setenv(CUDA, "0,1,2,3")
    assert tool.main(bench.one_rate("a", "--dry_run")) == 0 and ", 4 at a time" in capsys.readouterr().out
    bench.set_faults(a="save(log); (work / f'sees{seed}').write_text(os.environ['CUDA_VISIBLE_DEVICES'])")
    assert tool.main(bench.one_rate("a", "--seeds", "4", "--devices_per_run", "2", "--jobs", "4")) == 0
    assert sorted(path.read_text() for path in bench.folder.glob("sees*")) == ["0,1", "0,1", "2,3", "2,3"]
    with pytest.raises(SystemExit, match="another command, --template or --devices_per_run"):  # of other batches
        tool.main(bench.one_rate("a", "--seeds", "4"))


def test_the_probe_of_devices_is_right_here(monkeypatch):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(runs_module._find_devices()[1]) == torch.cuda.device_count()


def test_template_is_written_to_the_folder_of_each_run(bench):
    template = bench.folder / "cfg.json"
    template.write_text('{"--optim": "{optim}", "args": "{optim_args}", "--learning_rate": {learning_rate}, '
        '"--seed": {seed}, "--output_dir": "{output_dir}"}')  # fmt: skip
    template.chmod(0o750)
    options = ["--optims", "a", "b:x=1", "--seeds", "2", "--template", str(template)]
    arguments = bench.arguments(*options, script=(str(template),))
    assert tool.main(arguments) == 0 and len(bench.starts()) == 2 * (5 + 2)
    assert ("a", 5e-5, 1001) in bench.starts()
    assert (bench.out / "runs" / "a-lr5e-05-seed1001" / "cfg.json").stat().st_mode == template.stat().st_mode
    template.write_text(template.read_text() + " ")
    with pytest.raises(SystemExit, match="another command, --template or"):
        tool.main(arguments)


def test_a_terminal_shows_the_runs_at_work(bench):
    progress = {
        "a": ('{"step": 40, "max_steps": 200, "loss": 0.51234, "learning_rate": 9e-05}',
            "step 40 of 200, loss 0.5123, learning rate 9e-05"),
        "b": ('{"step": 40, "max_steps": 200, "loss": "?"}', "step 40 of 200, loss nan"),
        "c": ("{", "no step logged yet"),
    }  # fmt: skip
    write = "(out.parent / 'progress.json').write_text({!r}); time.sleep(2.5); sys.exit(1)"
    bench.set_faults(**{optim: write.format(content) for optim, (content, _) in progress.items()})
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = bench.popen(bench.one_rate(*progress, "--jobs", "3"), stderr=theirs)
    os.close(theirs)
    process.communicate()
    text = os.read(ours, 100_000).decode()
    assert all(f"{seen}: {optim}-lr0.0001-seed1" in text for optim, (_, seen) in progress.items())
    assert re.search(r"0/3 \[00:0[1-9]<", text)  # the bar goes on between two runs
    os.close(ours)


def start(bench, arguments, number=1):
    comparison = bench.popen(arguments)
    wait_for(lambda: len(bench.alive()) >= number or comparison.poll() is not None)
    return comparison, bench.alive()


def stop(comparison, *numbers):
    """Send these signals; returns what the comparison said until its end."""
    for number in numbers:
        comparison.send_signal(number)
    return comparison.communicate(timeout=30)[1]


# What a run does first, its launcher, and the number of its processes.
ENDINGS = {
    "a run": ("", [], 1),
    "a run that set its title": (ERASES_ITS_ENVIRONMENT, [], 1),
    "a run with a child in a session of its own": ("start_child(env={})", [], 2),
    "a run with an orphan in a session of its own": ("if os.fork() == 0: start_child(); os._exit(0)", [], 2),
    "a run under a shell": ("", ["sh", "-c", '"$0" "$@" & wait', sys.executable, "-S"], 1),
}


@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_nothing_of_a_run_goes_on(bench, kind, killed):
    code, launcher, number = ENDINGS[kind]
    bench.set_faults(a=f"{code}\n{SLEEPS}")
    arguments = bench.one_rate("a", *(["--launcher", shlex.join(launcher)] if launcher else []))
    comparison, left = start(bench, arguments, number)
    stop(comparison, signal.SIGKILL if killed else signal.SIGTERM)
    if killed:
        assert all(map(alive, left))  # they go on alone, until the next call ends them and starts their runs again
        bench.set_faults()
        assert tool.main(arguments) == 0
    assert not any(map(alive, left))


SIGNALS = [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_comparison_in_order(bench, number):
    bench.set_faults(a=SLEEPS, b=SLEEPS)
    comparison, left = start(bench, bench.one_rate("a", "b", "--jobs", "2"), 2)
    errors = stop(comparison, number, number)  # GNU timeout sends two at once
    assert comparison.returncode == 130 and "Stopped. Finished runs are kept" in errors and "Traceback" not in errors
    assert not any(map(alive, left))


def test_a_second_signal_a_second_later_kills(bench):
    bench.set_faults(a=f"signal.signal(signal.SIGTERM, signal.SIG_IGN); (work / 'ready').touch(); {SLEEPS}")
    comparison, left = start(bench, bench.one_rate("a"))
    wait_for((bench.folder / "ready").exists)
    begin = time.monotonic()
    comparison.terminate()
    time.sleep(1.3)
    assert alive(left[0])
    stop(comparison, signal.SIGUSR1)
    assert time.monotonic() - begin < 8 and not alive(left[0])


def test_ignored_signals_stay_ignored(bench):
    """As under nohup."""
    bench.set_faults(a="time.sleep(1.5); sys.exit(1)")
    comparison = bench.popen(bench.one_rate("a"), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(bench.alive)
    assert "Every run failed" in stop(comparison, signal.SIGHUP) and comparison.returncode == 1


SRUN = """
import os, signal, subprocess, sys
environment = {name: value for name, value in os.environ.items() if name != "HF_NSF_RUN"}
command = subprocess.Popen(sys.argv[2:], start_new_session=True, env=environment)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(command.pid, number))
sys.exit(command.wait())
"""


def test_runs_of_a_cluster_end_with_their_launcher(bench, monkeypatch, capsys):
    """A stand-in for srun: its command runs elsewhere, in no child of this machine that could be found."""
    program = bench.folder / "srun"
    program.write_text(f"#!{sys.executable} -S\n{SRUN}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(bench.folder), prepend=os.pathsep)
    bench.set_faults(a=SLEEPS)
    launcher = f"srun --ntasks=1 {sys.executable} -S"
    arguments = bench.one_rate("a", "--seeds", "2", "--jobs", "2", "--launcher", launcher)
    comparison, left = start(bench, arguments, 2)
    stop(comparison, signal.SIGTERM)
    assert comparison.returncode == 130 and not any(map(alive, left))
    bench.set_faults(a="save([{'eval_accuracy': float('OMP_NUM_THREADS' not in os.environ), 'step': 1}])")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert tool.main(arguments) == 0
    with pytest.raises(SystemExit):
        tool.main(["--devices_per_run", "2", *arguments])
    assert "let srun --ntasks=1" in capsys.readouterr().err
    assert bench.summary()["optimizers"][0]["mean"] == 1.0  # the threads of this machine are not those of the nodes


def test_processes_of_finished_runs_and_of_other_comparisons_are_left_alone(bench):
    """Such as one that still uploads what a finished run has logged."""
    bench.set_faults(a="start_child(); save(log)")
    assert tool.main(bench.one_rate("a")) == 0
    (child,) = bench.alive()
    other = Bench(bench.out)  # one folder below
    other.set_faults(a=SLEEPS)
    comparison, runs = start(other, other.one_rate("a"))
    shutil.copytree(other.out, bench.folder / "copied")
    for folder in (bench.out, bench.folder / "copied"):
        assert tool.main(bench.one_rate("b", "--output_dir", str(folder))) in (0, 1)
    with pytest.raises(SystemExit, match="Another comparison is at work in"):
        tool.main(other.one_rate("a"))
    assert alive(child) and all(map(alive, runs)) and comparison.poll() is None
    stop(comparison, signal.SIGTERM)
    assert not other.alive()


def test_a_process_that_cannot_be_ended_is_told(tmp_path, monkeypatch):
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    record = {"token": "t", "pid": child.pid, "started": time.time()}
    monkeypatch.setattr(psutil.Process, "terminate", lambda self: None)
    monkeypatch.setattr(psutil.Process, "kill", lambda self: None)
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(runs_module.time, "monotonic", lambda: next(clock))
    said = []
    handler = runs_module.Runs(tmp_path, [{}], lambda: False, said.append)
    handler.mine["x"] = record
    assert not handler.end() and said == [f"Process {child.pid} cannot be ended."] and "x" in handler.mine
    child.kill()
    child.wait()
