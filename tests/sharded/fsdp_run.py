# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama trained by a stock Trainer, whole in one process or sharded by FSDP2 over several on a CPU.

Called as `fsdp_run.py PLAN FOLDER NUMBER`, where PLAN is a JSON file with a list of launches, `{"processes": 2, "jobs":
[...]}`, and NUMBER that of the first. What each process holds at the end of a job stands in
`FOLDER/NUMBER/<job>-<rank>.pt`. A process that torchrun started makes its part of one launch; one started alone forks
the processes of each, which saves them the import of the libraries.
"""

import json
import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

for _folder in (Path(__file__).parent, Path(__file__).parents[1] / "distributed"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from tiny_run import LOGGED, arguments  # noqa: E402

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


def make_trainer(
    folder, optimizer, dropout=0.0, state_dict="SHARDED_STATE_DICT", dtype="float32", callbacks=None, **changes
):
    """The training of one process, or its share of a sharded one."""
    set_seed(3)
    config = LlamaConfig(
        **SHAPE, max_position_embeddings=16, attention_dropout=dropout, use_cache=False, tie_word_embeddings=False
    )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        changes.update(fsdp=True, fsdp_config={"version": 2, "state_dict_type": state_dict})
    args = arguments(folder, optimizer, **changes)
    if args.fsdp:
        # On a CPU accelerate passes over FSDP without a word, unless it believes in a device for each process.
        AcceleratorState._reset_state()
        PartialState().distributed_type = DistributedType.MULTI_XPU
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    return Trainer(model=model, args=args, train_dataset=Texts(), callbacks=callbacks)


def whole(value):
    """All of a sharded tensor (on all processes at once); anything else as it is, through dicts."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def held(trainer):
    """Everything that must be the same: whole weights and moments, groups, logged values."""
    optimizer = trainer.optimizer.optimizer
    state = optimizer.state_dict()
    logs = [{k: e[k] for k in LOGGED if k in e} for e in trainer.state.log_history if "loss" in e]
    return {
        "weights": {name: whole(value.detach()).clone() for name, value in trainer.model.state_dict().items()},
        "state": whole(state["state"]),
        "groups": state["param_groups"],
        "logs": logs,
        "sharded": sum(hasattr(q, "full_tensor") for group in optimizer.param_groups for q in group["params"]),
    }


class Groups(TrainerCallback):
    """The groups' options at every save, and at the begin of a training, which is after the load of a resumed one."""

    def __init__(self):
        self.seen = {}

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.state_dict()["param_groups"]
        self.seen[state.global_step] = [{k: v for k, v in group.items() if k != "params"} for group in groups]

    on_save = on_train_begin


class Said(logging.Handler):
    """What hf_nsf warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger("hf_nsf").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


def run_job(job, folder):
    """Make one training; return what this process holds."""
    job = dict(job)
    name, optimizer, resume = job.pop("name"), job.pop("optimizer"), job.pop("resume", None)
    job.setdefault("per_device_train_batch_size", 8 // int(os.environ.get("WORLD_SIZE", 1)))
    groups, said = Groups(), Said()
    trainer = make_trainer(Path(folder, job.pop("folder", name)), optimizer, callbacks=[groups], **job)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        logging.getLogger("hf_nsf").removeHandler(said)
    return {"error": None, "seen": groups.seen, "said": said.lines, **held(trainer)}


def break_the_last(folder):
    """Leave of the newest checkpoint what an interrupted save leaves."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if (last / "optimizer.bin").exists():
        os.truncate(last / "optimizer.bin", 1000)
    else:
        os.remove(last / "optimizer_0" / ".metadata")


def run_jobs(jobs, target):
    """What each process does."""
    for each in jobs:
        torch.save(run_job(each, target), Path(target, f"{each['name']}-{os.environ.get('RANK', 0)}.pt"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def fork(processes, jobs, target):
    """Make the jobs in new processes; whether all went well."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = set()
    for rank in map(str, range(processes)):
        child = os.fork()
        if child == 0:
            try:
                if processes > 1:
                    os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
                run_jobs(jobs, target)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        ranks.add(child)
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return False
    return True


if __name__ == "__main__":
    plan, folder, number = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    for index, launch in enumerate(plan, start=number):
        target = folder / str(index)
        if os.environ.get("RANK", "0") == "0":
            for each in launch.get("broken", []):
                break_the_last(each)
        if "RANK" in os.environ:
            run_jobs(launch["jobs"], target)
        elif not fork(launch["processes"], launch["jobs"], target):
            sys.exit(f"launch {index} failed")
