# SPDX-License-Identifier: Apache-2.0
"""One tiny training with a stock Trainer, described by a dict, so that any launcher's process can make it.

Run as a script with a JSON file of jobs and a folder, it makes all of them, and each process writes what it holds at
the end of a job to `<folder>/<job>-<rank>.pt`.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

import hf_nsf

OPTIMIZERS = {
    "lcam": {"optim": "lcam", "optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.9", "learning_rate": 0.05},
    "nsf": {"optim": "nsf", "optim_args": "p_min=-0.25,p_max=0.5,cycles=2", "learning_rate": 1e-2},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2},
}
LOGGED = ("loss", "step", "learning_rate", "nsf_p", "lcam_momentum", "lcam_loss_phase", "lcam_loss_mean")


class Rows(Dataset):
    """Random rows with a learnable, noisy label."""

    def __init__(self, size=96):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 6, generator=generator)
        self.labels = ((self.x[:, 0] + 0.5 * torch.randn(size, generator=generator)) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.labels[index]}


class Averaging(nn.Module):
    """A small network with dropout if asked for; its loss is the mean over the batch."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Counting(Averaging):
    """Divides by the number of items of the whole accumulation window, as causal language models do."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.layers(x)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


def arguments(folder, optimizer, **changes):
    values = {
        "output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 8, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
        "logging_nan_inf_filter": False, **OPTIMIZERS.get(optimizer, {}),
    }  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        values["ddp_backend"] = "gloo"
    values.update(changes)
    return TrainingArguments(**values)


def make_trainer(
    folder, optimizer, dropout=0.0, dataset=None, callbacks=None, counts_items=False, cls=Trainer, collator=None,
    **changes,
):  # fmt: skip
    set_seed(3)
    return cls(
        model=(Counting if counts_items else Averaging)(dropout),
        args=arguments(folder, optimizer, **changes),
        train_dataset=Rows() if dataset is None else dataset,
        data_collator=collator,
        callbacks=callbacks,
    )


def held(trainer):
    """Everything that must be the same: weights, moments, groups, logged values."""
    optimizer = trainer.optimizer.optimizer.state_dict()
    logs = [{k: e[k] for k in LOGGED if k in e} for e in trainer.state.log_history if "loss" in e]
    return {
        "weights": {name: value.detach().clone() for name, value in trainer.model.state_dict().items()},
        "state": optimizer["state"],
        "groups": optimizer["param_groups"],
        "logs": logs,
    }


def same(a, b):
    """Bit for bit the same, through dicts and lists; two NaNs are the same."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(-1).isnan(), b.view(-1).isnan()) and (
            torch.equal(a.nan_to_num(), b.nan_to_num())
        )  # fmt: skip
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


class _Dies(TrainerCallback):
    """Ends one process, as a crash does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and int(os.environ["RANK"]) == 1:
            os._exit(9)


class _Watches(TrainerCallback):
    """Notes of each update what the groups know of losses before and after it, and the collectives called in it."""

    def __init__(self):
        self.updates, self.collectives = [], [[]]

    @staticmethod
    def _known(optimizer):
        names = ("momentum", "loss_phase", "loss_mean", "loss_sum", "loss_count")
        return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.updates.append([self._known(optimizer)])
        self.collectives.append([])

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.updates[-1].append(self._known(optimizer))


class _Collectives(TorchDispatchMode):
    """Sees every collective of torch.distributed, by whatever function it is called, and DDP's own."""

    def __init__(self, watches):
        super().__init__()
        self.watches = watches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            given = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
            elements = sum(each.numel() for each in given if isinstance(each, torch.Tensor))
            self.watches.collectives[-1].append(f"{func.overloadpacket.__name__} {elements}")
        return func(*args, **(kwargs or {}))


class _OwnLosses(Trainer):
    """Keeps the losses of its own process; on rank 1 those of some updates are NaN, though no gradient is."""

    nan_at = ()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.args.process_index == 1 and self.state.global_step in self.nan_at:
            loss = loss * float("nan")
        self.own_losses = [*getattr(self, "own_losses", []), loss.item()]
        return loss


class _EmptyLast:
    """Collates, and leaves rank 1 without any row in the last batch of an epoch."""

    def __init__(self, rank, batches):
        self.rank, self.batches, self.made = rank, batches, 0

    def __call__(self, rows):
        self.made += 1
        empty = self.rank == 1 and self.made % self.batches == 0
        return {name: value[: 0 if empty else None] for name, value in default_data_collator(rows).items()}


def run_job(job, folder):
    """Make one training; return what this process holds, and what it saw on the way."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = dict(job)
    name, optimizer = job.pop("name"), job.pop("optimizer")
    other, output = job.pop("on_rank_1", optimizer), Path(folder, job.pop("folder", name))
    optimizer = other if rank == 1 else optimizer
    different = job.pop("different_on_rank_1", {})
    if rank == 1:
        job.update(different)
    nan_at, empty_last, dies = job.pop("nan_at", ()), job.pop("empty_last", False), job.pop("dies_at", None)
    resume, local, counts = job.pop("resume", None), job.pop("local_losses", False), job.pop("counts", False)
    job.setdefault("per_device_train_batch_size", 16 // processes)
    dataset = Rows(job.pop("size", 96))
    if nan_at or empty_last:
        job["cls"] = _OwnLosses
    if empty_last:
        job["collator"] = _EmptyLast(rank, len(dataset) // 16)

    watches, reduced_mean = _Watches(), hf_nsf.LossPhase._mean_over_processes
    if local:  # the negative control: decide from this process' own loss
        hf_nsf.LossPhase._mean_over_processes = staticmethod(float)
    try:
        callbacks = [watches] if dies is None else [watches, _Dies(dies)]
        trainer = make_trainer(output, optimizer, dataset=dataset, callbacks=callbacks, **job)
        trainer.nan_at = nan_at
        error = None
        try:
            with _Collectives(watches) if counts else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=resume)
        except ValueError as caught:
            error = str(caught)
    finally:
        hf_nsf.LossPhase._mean_over_processes = staticmethod(reduced_mean)
    result = {"error": error, "collectives": watches.collectives, "processes": processes}
    if error is None:
        own = getattr(trainer, "own_losses", None)
        result.update(held(trainer), steps=trainer.state.global_step, updates=watches.updates, own_losses=own)
    return result


if __name__ == "__main__":
    jobs, target = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    for each in jobs:
        torch.save(run_job(each, target), Path(target, f"{each['name']}-{os.environ.get('RANK', 0)}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
