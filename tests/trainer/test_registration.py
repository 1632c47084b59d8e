# SPDX-License-Identifier: Apache-2.0
"""The names in transformers: added once, everywhere, and removed completely. See tests/launcher/test_watch.py, too."""

import copy
import functools
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
import yaml
from trainer_runs import check_rule, make_trainer
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers import trainer as host_trainer
from transformers.training_args import OptimizerNames

import hf_nsf


@pytest.mark.parametrize("name", ["lcam", "nsf"])
def test_the_name_is_a_real_member_in_code_command_line_json_and_yaml(name, tmp_path):
    member = OptimizerNames(name)
    assert member is getattr(OptimizerNames, name.upper()) is OptimizerNames[name.upper()]
    assert member in list(OptimizerNames) and (sys.version_info < (3, 12) or name in OptimizerNames)
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
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
    assert [args.optim for args in [*parsed, copy.deepcopy(parsed[0])]] == [member] * 5
    assert json.loads(parsed[0].to_json_string())["optim"] == name
    assert name in parser.format_usage().split("--optim {")[1].split("}")[0].split(",")


# In a process of its own, which has not imported hf_nsf and reloads transformers' modules.
SCRIPT = """
import importlib, sys
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
registered = found()
assert registered != before
hf_nsf.unregister()
assert found() == before
hf_nsf.register()
again = found()
assert [set(each[0]) for each in again[:3]] == [set(each[0]) for each in registered[:3]]
hf_nsf.register()
importlib.reload(hf_nsf)
assert found() == again and [c.__name__ for c in host.DEFAULT_CALLBACKS].count("PhaseCallback") == 1
hf_nsf.unregister(), hf_nsf.unregister()
assert found() == before
hf_nsf.register()

importlib.reload(training_args)  # a second enum, which has the names at once
for module in (training_args, transformers):
    args = module.TrainingArguments(sys.argv[2], optim="nsf", use_cpu=True, report_to="none")
    trainer = Trainer(model=torch.nn.Linear(2, 2), args=args, train_dataset=[0])
    assert type(trainer.create_optimizer()) is hf_nsf.NSF
hf_nsf.unregister()
assert not [e for module in (training_args, host, trainer_optimizer) for e in module.OptimizerNames if e.value == "nsf"]
assert found()[3:] == before[3:]
"""


def test_unregister_restores_all_and_reloads_register_again(tmp_path):
    torch.save(TrainingArguments(str(tmp_path), optim="nsf", report_to="none"), tmp_path / "training_args.bin")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "training_args.bin"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_loaded_on_access():
    assert {*hf_nsf.__all__} <= {*dir(hf_nsf)}
    assert all(getattr(hf_nsf, name).__module__.startswith("hf_nsf.") for name in hf_nsf.__all__)
    assert hf_nsf.optim.NSF is hf_nsf.NSF


def test_old_transformers_are_refused(monkeypatch):
    monkeypatch.delattr(host_trainer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(ImportError, match="transformers 5.2.0 and newer"):
        hf_nsf.register()
    with pytest.warns(RuntimeWarning, match="transformers 5.2.0 and newer"):
        importlib.reload(hf_nsf)


@pytest.mark.parametrize("wraps", [functools.wraps, lambda function: lambda wrapper: wrapper], ids=["wraps", "hides"])
def test_a_wrapper_around_ours_is_kept_and_no_loss_counts_twice(wraps, tmp_path, monkeypatch):
    ours = Trainer.training_step

    @wraps(ours)
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", theirs)
    hf_nsf.register()
    kept = wraps is functools.wraps  # one that hides ours is wrapped once more
    assert (Trainer.training_step is theirs) == kept
    trainer = make_trainer(tmp_path)
    trainer.train()
    check_rule(trainer)
    hf_nsf.unregister()
    try:
        assert Trainer.training_step is theirs
    finally:
        hf_nsf.register()
