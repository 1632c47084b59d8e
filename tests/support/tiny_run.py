# SPDX-License-Identifier: Apache-2.0
"""Trainings described by dicts, so that a process of any launcher can make them from a JSON file of jobs."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from forks import save_jobs
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_runs import Counts, Rows, Stream, Watched, held, same  # noqa: F401
from trainer_runs import make_trainer as make_any
from transformers import Trainer, TrainerCallback, default_data_collator

import hf_nsf

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SETTINGS = {
    "per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "logging_nan_inf_filter": False,
    "max_grad_norm": 1.0,
}  # fmt: skip


def make_trainer(folder, optimizer, dropout=0.0, callbacks=None, cls=Trainer, collator=None, **changes):
    """A Trainer with 96 rows in batches of 8: 12 updates an epoch, with a linear schedule."""
    settings = {**SETTINGS, "data": Rows(96), **changes}
    extra = {"callbacks": callbacks, "data_collator": collator}
    return make_any(folder, optimizer, cls=cls, dropout=dropout, extra=extra, **settings)


class _Collectives(TorchDispatchMode, TrainerCallback):
    """Records the collectives of torch.distributed and DDP before the first step and in each step."""

    def __init__(self):
        super().__init__()
        self.found = [[]]

    def on_step_begin(self, args, state, control, **kwargs):
        self.found.append([])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            given = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
            elements = sum(each.numel() for each in given if isinstance(each, torch.Tensor))
            self.found[-1].append(f"{func.overloadpacket.__name__} {elements}")
        return func(*args, **(kwargs or {}))


class _WithNaN(Watched):
    """On rank 1 the losses of some updates are NaN, though no gradient is."""

    nan_at = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + float("nan") if RANK == 1 and self.state.global_step in self.nan_at else loss


class _EmptyLast:
    """Collates, and leaves rank 1 without any row in the last batch of an epoch."""

    def __init__(self, batches):
        self.batches, self.made = batches, 0

    def __call__(self, rows):
        self.made += 1
        empty = RANK == 1 and self.made % self.batches == 0
        return {name: value[: 0 if empty else None] for name, value in default_data_collator(rows).items()}


def run_job(job, folder):
    """Make one training; return its end and its events in this process."""
    others = job.get("on_rank_1", {}) if RANK == 1 else {}
    job = {key: value for key, value in {**job, **others}.items() if key != "on_rank_1"}
    name, optimizer, resume = job.pop("name"), job.pop("optimizer"), job.pop("resume", None)
    nan_at = job.pop("nan_at", ())
    job["data"] = (Stream if job.pop("stream", False) else Rows)(job.pop("size", 96))
    if job.pop("empty_last", False):
        job["collator"] = _EmptyLast(len(job["data"]) // 16)
    if job.pop("counts_items", False):
        job["model"] = Counts
    job["per_device_train_batch_size"] = job.pop("batch", 16) // PROCESSES
    counts, collectives = job.pop("counts", False), _Collectives()
    if job.pop("unregistered", False):
        hf_nsf.unregister()
    trainer = make_trainer(Path(folder, name), optimizer, callbacks=[collectives], cls=_WithNaN, **job)
    trainer.nan_at = nan_at
    with collectives if counts else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    hf_nsf.register()
    result = {"collectives": collectives.found, "events": trainer.events, "processes": PROCESSES}
    engine, inner = type(trainer.model_wrapped).__name__, type(trainer.optimizer.optimizer).__name__
    result |= {"steps": trainer.state.global_step, "engine": engine, "inner": inner}
    partitions = [q.detach() for group in trainer.optimizer.param_groups for q in group["params"]]  # of DeepSpeed
    return {**result, **held(trainer), "partitions": partitions}


if __name__ == "__main__":
    save_jobs(json.loads(Path(sys.argv[1]).read_text()), run_job, sys.argv[2])
