# SPDX-License-Identifier: Apache-2.0
"""The names in transformers: added once, everywhere, and taken back completely."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers import trainer as host_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_nsf


@pytest.mark.parametrize("name", ["lcam", "nsf"])
def test_the_name_is_a_real_member(name):
    member = OptimizerNames(name)
    assert member is getattr(OptimizerNames, name.upper()) is OptimizerNames[name.upper()]
    assert member in list(OptimizerNames) and copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("name", ["lcam", "nsf"])
def test_arguments_from_code_command_line_json_and_yaml(name, tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    values = {"output_dir": str(tmp_path), "optim": name, "report_to": "none"}
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    parsed = [
        TrainingArguments(**values),
        *parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name]),
        *parser.parse_json_file(str(tmp_path / "a.json")),
        *parser.parse_yaml_file(str(tmp_path / "a.yaml")),
    ]
    assert [args.optim for args in parsed] == [OptimizerNames(name)] * 4
    assert json.loads(parsed[0].to_json_string())["optim"] == name
    assert name in parser.format_usage().split("--optim {")[1].split("}")[0].split(",")
    if Version(transformers.__version__) >= Version("5.3"):  # 5.2.0 fails to print its own help
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        assert name in capsys.readouterr().out


def test_training_args_bin_loads_in_a_process_without_the_import(tmp_path):
    torch.save(TrainingArguments(str(tmp_path), optim="nsf", report_to="none"), tmp_path / "training_args.bin")
    code = f"import torch; print(torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False).optim.value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "nsf", done.stderr


def test_register_is_idempotent_and_survives_reload():
    train = Trainer.train
    hf_nsf.register()
    importlib.reload(hf_nsf)
    assert Trainer.train is train
    assert [c.__name__ for c in host_trainer.DEFAULT_CALLBACKS].count("SpectralCallback") == 1
    assert [m.value for m in OptimizerNames].count("nsf") == 1


def test_unregister_restores_transformers_exactly():
    def snapshot():
        return (
            dict(vars(OptimizerNames)).keys(),
            list(OptimizerNames),
            list(OptimizerNames._member_names_),
            list(OptimizerNames._value2member_map_),
            list(getattr(OptimizerNames, "_hashable_values_", [])),
            dict(_OPTIMIZER_HANDLERS),
            list(host_trainer.DEFAULT_CALLBACKS),
            Trainer.train,
        )

    code = (
        "import copy, transformers; from transformers import Trainer; from transformers import trainer as t\n"
        "from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as H\n"
        "from transformers.training_args import OptimizerNames as O\n"
        "def snap(): return (set(vars(O)), list(O), list(O._member_names_), list(O._value2member_map_),"
        " list(getattr(O, '_hashable_values_', [])), dict(H), list(t.DEFAULT_CALLBACKS), Trainer.train)\n"
        "before = snap(); import hf_nsf; during = snap(); assert during != before\n"
        "hf_nsf.unregister(); assert snap() == before; hf_nsf.register(); hf_nsf.unregister(); assert snap() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    during = snapshot()
    hf_nsf.unregister()
    try:
        with pytest.raises(ValueError, match="nsf"):
            OptimizerNames("nsf")
    finally:
        hf_nsf.register()
    assert snapshot()[2:5] == during[2:5]
