# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama trained by a stock Trainer, whole in one process or sharded by FSDP2 over several on a CPU.

Called as `fsdp_run.py PLAN FOLDER`, where PLAN is a JSON file with a list of launches, `{"processes": 2, "jobs":
[...]}`. What each rank holds at the end of a job of launch N stands in `FOLDER/N/<job>-<rank>.pt`.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from forks import fork, save_jobs
from tiny_run import SETTINGS
from torch.utils.data import Dataset
from trainer_runs import arguments
from trainer_runs import held as held_whole
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

# 37 and 9 rows are not shared out evenly, and the norms' 12 are.
SHAPE = {"vocab_size": 37, "hidden_size": 12, "intermediate_size": 9, "num_attention_heads": 2, "num_hidden_layers": 2}


class Texts(Dataset):
    """Random walks through the vocabulary, so that the next token can be learned, but not fully."""

    def __init__(self, size=80, length=6):
        steps = torch.randint(0, 3, (size, length), generator=torch.Generator().manual_seed(0))
        self.tokens = (torch.arange(size)[:, None] + steps.cumsum(1)) % SHAPE["vocab_size"]

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_trainer(folder, optimizer, state_dict="SHARDED_STATE_DICT", dtype="float32", callbacks=None, **changes):
    """The training of one process, or its share of a sharded one."""
    set_seed(3)
    config = LlamaConfig(**SHAPE, max_position_embeddings=16, use_cache=False, tie_word_embeddings=False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        changes.update(fsdp=True, fsdp_config={"version": 2, "state_dict_type": state_dict})
    args = arguments(folder, optimizer, **{**SETTINGS, **changes})
    if args.fsdp:
        # On a CPU accelerate passes over FSDP without a word, unless it believes in a device for each process.
        AcceleratorState._reset_state()
        PartialState().distributed_type = DistributedType.MULTI_XPU
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    return Trainer(model=model, args=args, train_dataset=Texts(), callbacks=callbacks)


def whole(value):
    """All of a sharded tensor (on all ranks at once); anything else as it is, through dicts."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def held(trainer):
    """All that must be equal after a resume, with whole weights and moments, and the number of sharded parameters."""
    params = [q for group in trainer.optimizer.optimizer.param_groups for q in group["params"]]
    return {**whole(held_whole(trainer)), "sharded": sum(hasattr(q, "full_tensor") for q in params)}


def run_job(job, folder):
    """Make one training; return what this rank holds."""
    name, optimizer, resume = job.pop("name"), job.pop("optimizer"), job.pop("resume", None)
    job.setdefault("per_device_train_batch_size", 8 // int(os.environ.get("WORLD_SIZE", 1)))
    said = []
    trainer = make_trainer(Path(folder, name), optimizer, **job)
    with mock.patch("hf_nsf.trainer.callback.logger.warning_once", said.append):
        trainer.train(resume_from_checkpoint=resume)
    return {"said": said, **held(trainer)}


if __name__ == "__main__":
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for number, launch in enumerate(plan):
        (folder / str(number)).mkdir()
        fork(launch["processes"], save_jobs, launch["jobs"], run_job, folder / str(number))
