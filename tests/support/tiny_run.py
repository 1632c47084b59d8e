# SPDX-License-Identifier: Apache-2.0
"""One tiny training with a stock Trainer, described by a dict, so that any launcher's process can make it.

Run as a script with a JSON file of jobs and a folder, it makes all of them, and each process writes what it holds at
the end of a job to `<folder>/<job>-<rank>.pt`.
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

import hf_nsf
from hf_nsf.optim import loss_phase

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


class Stream(IterableDataset):
    """The same rows from a source that knows no length."""

    def __init__(self, size=96):
        self.rows = Rows(size)

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


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
    """Notes what `trainer_runs.by_the_rule` reads, and the collectives called before the first step and in each."""

    def __init__(self):
        self.events, self.collectives = [], [[]]

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append(("epoch", None))

    def on_step_begin(self, args, state, control, **kwargs):
        self.collectives.append([])

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.events.append(("momentum", optimizer.optimizer.param_groups[0].get("momentum")))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.events.append(("update", args.gradient_accumulation_steps))


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


class _Watched(Trainer):
    """Notes the losses of its own process; on rank 1 those of some updates are NaN, though no gradient is."""

    nan_at, events = (), []

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + float("nan") if self.args.process_index == 1 and self.state.global_step in self.nan_at else loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.events.append(("loss", loss.detach().clone()))
        return loss


class _EmptyLast:
    """Collates, and leaves rank 1 without any row in the last batch of an epoch."""

    def __init__(self, rank, batches):
        self.rank, self.batches, self.made = rank, batches, 0

    def __call__(self, rows):
        self.made += 1
        empty = self.rank == 1 and self.made % self.batches == 0
        return {name: value[: 0 if empty else None] for name, value in default_data_collator(rows).items()}


@contextlib.contextmanager
def _changed(job):
    """For one job: LCAM deciding from the losses of its own process, or transformers without hf_nsf."""
    reduced = loss_phase._mean_over_ranks
    try:
        if job.pop("local_losses", False):
            loss_phase._mean_over_ranks = lambda loss, starts: (loss, starts)
        if job.pop("unregistered", False):
            hf_nsf.unregister()
        yield
    finally:
        loss_phase._mean_over_ranks = reduced
        hf_nsf.register()


def run_job(job, folder):
    """Make one training; return what this process holds, and what it saw on the way."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = dict(job)
    name, optimizer, on_rank_1 = job.pop("name"), job.pop("optimizer"), job.pop("on_rank_1", {})
    if rank == 1:
        optimizer = on_rank_1.pop("optimizer", optimizer)
        job.update(on_rank_1)
    output, resume = Path(folder, job.pop("folder", name)), job.pop("resume", None)
    nan_at, dies, counts = job.pop("nan_at", ()), job.pop("dies_at", None), job.pop("counts", False)
    dataset = (Stream if job.pop("stream", False) else Rows)(job.pop("size", 96))
    if job.pop("empty_last", False):
        job["collator"] = _EmptyLast(rank, len(dataset) // 16)
    job["per_device_train_batch_size"] = job.pop("batch", 16) // processes

    watches, error = _Watches(), None
    with _changed(job):
        callbacks = [watches] if dies is None else [watches, _Dies(dies)]
        trainer = make_trainer(output, optimizer, dataset=dataset, callbacks=callbacks, cls=_Watched, **job)
        trainer.nan_at, trainer.events = nan_at, watches.events
        try:
            with _Collectives(watches) if counts else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=resume)
        except ValueError as caught:
            error = str(caught)
    result = {"error": error, "collectives": watches.collectives, "events": watches.events, "processes": processes}
    if error is None:
        result.update(held(trainer), steps=trainer.state.global_step)
    return result


if __name__ == "__main__":
    jobs, target = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    for each in jobs:
        torch.save(run_job(each, target), Path(target, f"{each['name']}-{os.environ.get('RANK', 0)}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()  # models in cycles hold DDP's process group, whose threads would abort the process at its end
        torch.distributed.destroy_process_group()
