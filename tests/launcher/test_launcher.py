# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_nsf` and what it hands on to child processes; scripts and tools here know nothing of hf_nsf."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from hf_nsf import __main__ as launcher
from hf_nsf import p_schedule

SUPPORT = Path(__file__).parents[1] / "support"
SITE = str(Path(launcher.__file__).with_name("_site"))
SCRIPT = str(SUPPORT / "stock_script.py")
NSF = ["--optim", "nsf", "--optim_args", "p_min=-0.25,cycles=2", "--learning_rate", "0.01"]
LCAM = ["--optim", "lcam", "--optim_args", "high_loss_momentum=0.8", "--learning_rate", "0.05"]
SETTINGS = [
    "--output_dir", "out", "--use_cpu", "--num_train_epochs", "1", "--per_device_train_batch_size", "4",
    "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True",
]  # fmt: skip


@pytest.fixture(autouse=True)
def signals():
    """The launcher resets what Python ignores, for the command in its place."""
    ignored = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    yield
    for number, handler in ignored.items():
        signal.signal(number, handler)


def run(*command, cwd, status=0, **environment):
    """Run a Python command in a folder of the test's own; its result, with output and errors apart."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=250, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == status, result.stdout + result.stderr
    return result


def check_log(folder, optimizer):
    """The run used our optimizer with the options given, in all its 8 updates."""
    logs = [e for e in json.loads(Path(folder, "trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert len(logs) == 8
    if optimizer == "nsf":
        expected = p_schedule(range(8), p_min=-0.25, p_max=0.5, cycles=2, total_steps=8)
        assert [entry["nsf_p"] for entry in logs] == pytest.approx(expected, abs=1e-12)
    else:
        assert {entry["lcam_momentum"] for entry in logs} == {0.8, 0.9}


PROBE = """
import json, os, pickle, sys
class Own: pass
names = {name: repr(value) for name, value in globals().items() if name not in ("__loader__", "__builtins__", "Own")}
own = type(pickle.loads(pickle.dumps(Own()))) is sys.modules["__main__"].Own
print(json.dumps([sys.argv, sys.path, names, own, sys.stdin.read(), os.environ.get("GIVEN")]))
print(sys.flags, sys.warnoptions, sys._xoptions, sys.stdout.write_through)
if "fail" in sys.argv:
    1 / 0
"""


def test_a_script_runs_as_python_runs_it(tmp_path):
    """With options of Python's own, a PYTHONPATH and a failure, all is the same to the last line of the traceback."""
    Path(tmp_path, "there").mkdir()
    Path(tmp_path, "there", "probe.py").write_text(PROBE)
    options, found = ["-O", "-u", "-W", "error::FutureWarning", "-X", "dev"], []
    for through in ([], ["-m", "hf_nsf"]):
        command = [*options, *through, "there/probe.py", "fail", "-m", "--help"]
        result = run(*command, cwd=tmp_path, status=1, PYTHONPATH=f"{tmp_path}{os.pathsep}", GIVEN="one")
        found.append((result.stdout, result.stderr[result.stderr.find("Traceback") :]))
    assert found[0] == found[1]
    assert '"one"' in found[0][0] and "ZeroDivisionError" in found[0][1]


def test_commands(monkeypatch, tmp_path):
    """What replaces the process, its PYTHONPATH and its PATH."""
    with zipfile.ZipFile(tmp_path / "tool.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    Path(tmp_path, "__main__.py").write_text(PROBE)
    folder, zipped = str(tmp_path), str(tmp_path / "tool.zip")
    firsts = {"train.sh": "#!/opt/python-3/bin/sh", "train": "#!/usr/bin/env python3", "accelerate": "#!/bin/sh"}
    for name, first in firsts.items():
        Path(tmp_path, name).write_text(first)
        Path(tmp_path, name).chmod(0o755)
    shell, train, python = f"{folder}/train.sh", f"{folder}/train", launcher._python()
    rank = "--local_rank=1"
    seen = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: seen.append((path, command, environment)))
    for arguments, expected in [
        (["-m", "tool", "-m", "x"], [*python, "-m", "tool", "-m", "x"]),
        ([folder], [*python, folder]),
        ([zipped], [*python, zipped]),
        (["sh", "x.sh"], [shutil.which("sh"), "x.sh"]),
        ([shell, "x"], [shell, "x"]),
        ([train, "x"], [*python, train, "x"]),
        # deepspeed --module, torch.distributed.launch --module
        ([rank, SCRIPT, "-h"], [*python, SCRIPT, rank, "-h"]),
        (["--local-rank=0", "-m", "tool", "x"], [*python, "-m", "tool", "--local-rank=0", "x"]),
        ([rank, shell], [shell, rank]),
    ]:
        both = os.pathsep.join([SITE, "a"])
        for given, path in [("", SITE), ("a", both), (both, both)]:
            monkeypatch.setenv("PYTHONPATH", given)
            launcher.main(arguments)
            program, command, environment = seen.pop()
            assert command == expected and program == expected[0] and environment["PYTHONPATH"] == path
            assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setattr(sys, "executable", f"{folder}/python")  # an environment that is not activated
    launcher.main(["accelerate", "launch"])
    program, command, environment = seen.pop()
    assert program == f"{folder}/accelerate" and environment["PATH"] == os.pathsep.join([folder, os.environ["PATH"]])


@pytest.mark.parametrize(
    ("arguments", "status", "out", "error"),
    [
        (["--help"], 0, launcher.HELP, ""),
        ([], 2, "", launcher.HELP),
        (["-m"], 2, "", launcher.HELP),
        (["nowhere.py", "--x"], 2, "", "python -m hf_nsf: there is no script and no command nowhere.py.\n"),
        (["--optim", "nsf"], 2, "", "python -m hf_nsf: there is no option --optim; the script comes first.\n"),
        (["broken.sh"], 2, "", "python -m hf_nsf: [Errno 2] No such file or directory: 'broken.sh'\n"),
        (["--local_rank=0"], 2, "", "python -m hf_nsf: there is no script after --local_rank=0.\n"),
    ],
)
def test_help_and_wrong_arguments_end_with_a_message(arguments, status, out, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.sh").write_text("#!/no/such/interpreter")
    Path("broken.sh").chmod(0o755)
    assert launcher.main(arguments) == status and capsys.readouterr() == (out, error)


def test_python_options_that_hide_the_launcher_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(ignore_environment=1, no_site=0))
    assert launcher.main([SCRIPT]) == 2 and "-E, -I and -S" in capsys.readouterr().err


def test_a_tool_that_puts_its_sitecustomize_first_and_execs_python(tmp_path):
    """As opentelemetry-instrument does: both its sitecustomize and ours run, in either order of the commands."""
    Path(tmp_path, "agent").mkdir()
    Path(tmp_path, "agent", "sitecustomize.py").write_text("print('agent')")
    Path(tmp_path, "instrument.py").write_text(
        "import os, sys\n"
        "os.environ['PYTHONPATH'] = os.pathsep.join(['agent', os.environ.get('PYTHONPATH', '')])\n"
        "os.execl(sys.executable, sys.executable, *sys.argv[1:])\n"
    )
    code = "import sys; print('hf_nsf' in sys.modules, __import__('sitecustomize').__file__)"
    Path(tmp_path, "probe.py").write_text(code)
    for command in (["-m", "hf_nsf", "instrument.py", "probe.py"], ["instrument.py", "-m", "hf_nsf", "probe.py"]):
        result = run(*command, cwd=tmp_path)
        assert result.stdout.splitlines()[-2:] == ["agent", f"True {tmp_path}/agent/sitecustomize.py"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_command_has_the_signals_of_a_shell(tmp_path):
    """Python ignores SIGPIPE and SIGXFSZ; a command that inherited that would never end in `command | head`."""
    ignored = {line for line in run("-m", "hf_nsf", "cat", "/proc/self/status", cwd=tmp_path).stdout.splitlines()}
    assert "SigIgn:\t0000000000000000" in ignored


def test_a_tool_that_trains_in_a_child_process_with_workers_by_spawn(tmp_path):
    """The script's settings before its imports count, its parser knows the name, and its status comes back."""
    command = ["-m", "hf_nsf", "-m", "stock_tool", "-u", SCRIPT, *SETTINGS, *NSF]
    options = ["--dataloader_num_workers", "1", "--exit_status", "7"]
    run(*command, *options, cwd=tmp_path, status=7, PYTHONPATH=str(SUPPORT))
    check_log(tmp_path / "out", "nsf")


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "accelerate"])
def test_two_processes(launch, tmp_path):
    """Both launchers' processes know the names, and one that fails is theirs to report."""
    commands = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731"],
        "accelerate": [
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29732"
        ],
    }  # fmt: skip
    for optimizer, options in (("nsf", NSF), ("lcam", LCAM)):
        settings = [*SETTINGS, "--ddp_backend", "gloo", "--rows", "64", *options]
        run(*commands[launch], "-m", "hf_nsf", SCRIPT, *settings, cwd=tmp_path, ACCELERATE_USE_CPU="true")
        check_log(tmp_path / "out", optimizer)


@pytest.mark.ecosystem
def test_the_trl_command(tmp_path):
    """`trl sft`: it starts `accelerate launch`, which starts the training; a tiny Llama counts in words."""
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *"one two three four five six seven eight".split()]
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    Path(tmp_path, "data").mkdir()
    texts = [" ".join(words[3 + start : 7 + start]) for start in range(4)] * 8
    Path(tmp_path, "data", "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for optimizer, options in (("nsf", NSF), ("lcam", LCAM)):
        command = ["trl", "sft", "--model_name_or_path", "model", "--dataset_name", "data", *SETTINGS, *options]
        run(
            "-m", "hf_nsf", *command, "--save_strategy", "epoch", cwd=tmp_path,
            HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        check_log(tmp_path / "out" / "checkpoint-8", optimizer)
