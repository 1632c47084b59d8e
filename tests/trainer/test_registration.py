# SPDX-License-Identifier: Apache-2.0
"""The names in transformers: added once, everywhere, and taken back completely."""

import copy
import functools
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
from trainer_runs import check_rule, make_trainer
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers import trainer as host_trainer
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


# In a process of its own, for it leaves transformers' modules reloaded.
SCRIPT = """
import importlib, pickle, sys
import torch, transformers
from transformers import Trainer, trainer as host, trainer_optimizer, training_args

def found():
    enums = [module.OptimizerNames for module in (training_args, host, trainer_optimizer)]
    return [[set(vars(e)), list(e), list(e._member_names_), list(e._value2member_map_),
             list(getattr(e, "_hashable_values_", []))] for e in enums] + [
        dict(host._OPTIMIZER_HANDLERS), list(host.DEFAULT_CALLBACKS), vars(Trainer).copy()]

before = found()
assert torch.load(sys.argv[1], weights_only=False).optim.value == "nsf"  # imports hf_nsf
import hf_nsf
assert found() != before
hf_nsf.unregister()
assert found() == before
hf_nsf.register(), hf_nsf.register(), hf_nsf.unregister()
assert found() == before
hf_nsf.register()

importlib.reload(training_args)
reloaded = found()
arguments = lambda: training_args.TrainingArguments(sys.argv[2], optim="nsf", use_cpu=True, report_to="none")
try:
    arguments()
except ValueError:
    pass
else:
    raise AssertionError("the reload has not lost the name")
hf_nsf.register()
args = arguments()
assert args.optim is training_args.OptimizerNames.NSF and pickle.loads(pickle.dumps(args.optim)) is args.optim
assert "lcam" in [e.value for e in training_args.OptimizerNames]
model = torch.nn.Linear(2, 2)
trainer = Trainer(model=model, args=args, train_dataset=[0])
assert type(trainer.create_optimizer()) is hf_nsf.NSF
assert Trainer(model=model, args=transformers.TrainingArguments(
    sys.argv[2], optim="lcam", use_cpu=True, report_to="none")).create_optimizer().param_groups[0]["momentum"] == 0.95
hf_nsf.unregister()
assert not [e for module in (training_args, host, trainer_optimizer) for e in module.OptimizerNames if e.value == "nsf"]
assert found()[3:] == before[3:]
"""


def test_unregister_restores_all_and_register_works_after_a_reload(tmp_path):
    torch.save(TrainingArguments(str(tmp_path), optim="nsf", report_to="none"), tmp_path / "training_args.bin")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "training_args.bin"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_register_is_idempotent_and_survives_a_reload_of_hf_nsf(tmp_path):
    training_step, train = Trainer.training_step, Trainer.train
    hf_nsf.register()
    importlib.reload(hf_nsf)
    assert Trainer.training_step is training_step and Trainer.train is train and not hasattr(train, "__wrapped__")
    assert [c.__name__ for c in host_trainer.DEFAULT_CALLBACKS].count("PhaseCallback") == 1
    assert [member.value for member in OptimizerNames].count("nsf") == 1


def test_a_wrapper_of_another_around_ours_is_kept_and_no_loss_is_heard_twice(tmp_path, monkeypatch):
    ours = Trainer.training_step

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", theirs)
    hf_nsf.register()
    assert Trainer.training_step is theirs
    trainer = make_trainer(tmp_path)
    trainer.train()
    check_rule(trainer)
    hf_nsf.unregister()
    try:
        assert Trainer.training_step is theirs
    finally:
        hf_nsf.register()
