# SPDX-License-Identifier: Apache-2.0
"""Tiny Trainer runs that record their events, and LCAM's rule applied to these by a loop of the tests' own."""

import atexit
import gc
import os

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_nsf
from hf_nsf.trainer.callback import unwrap_optimizer

gc.collect()
gc.freeze()  # the Trainer collects garbage at every start, over all that has been imported
atexit.register(gc.unfreeze)

LOW, HIGH = 0.8, 0.9
OPTIMIZERS = {
    "lcam": {"optim": "lcam", "optim_args": f"low_loss_momentum={LOW},high_loss_momentum={HIGH}", "learning_rate": 0.1},
    "nsf": {"optim": "nsf", "optim_args": "p_min=-0.25,p_max=0.5,cycles=2", "learning_rate": 1e-2},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
}
LOGGED = ("loss", "step", "learning_rate", "nsf_p", "lcam_momentum", "lcam_loss_phase", "lcam_loss_mean")


def make_rows(size=44, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    labels = ((x[:, 0] + torch.randn(size, generator=generator)) > 0).long()
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


class Rows(Dataset):
    """Rows with a noisy label: 11 batches of 4."""

    def __init__(self, size=44):
        self.rows = make_rows(size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset):
    """A stream without a length, of `passes` passes over its rows."""

    def __init__(self, size=44, passes=1):
        self.rows, self.passes = make_rows(size), passes

    def __iter__(self):
        for _ in range(self.passes):
            yield from self.rows


class WrongLength(Stream):
    """A stream that reports a wrong number of rows."""

    def __init__(self, length, size=44):
        super().__init__(size)
        self.length = length

    def __len__(self):
        return self.length


class Averages(nn.Module):
    """A network whose loss the Trainer averages over an accumulation window."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))

    def forward(self, x, labels=None):
        logits = self.layers(x.to(self.layers[0].weight.dtype))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Sums(Averages):
    """Takes the number of items and ignores it, as many models do: the loss is summed over a window."""

    def forward(self, x, labels=None, **kwargs):
        return super().forward(x, labels)


class Counts(Averages):
    """Divides by the number of items of the window, as causal language models do."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        outputs = super().forward(x, labels)
        if num_items_in_batch is not None:
            outputs["loss"] = (
                nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
            )
        return outputs


class SometimesNaN(Averages):
    """Has a loss of NaN in every fourth micro-batch; its gradient is finite."""

    count = 0

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        self.count += 1
        if self.count % 4 == 2:
            outputs["loss"] = outputs["loss"] + torch.nan
        return outputs


class Watch(TrainerCallback):
    """Records epochs, momenta and updates in `trainer.events`."""

    def __init__(self):
        self.trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.events = []
        if state.global_step:
            self.trainer.events.append(("resumed", state.global_step))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.events.append(("epoch", None))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.trainer.events.append(("momentum", optimizer.optimizer.param_groups[0].get("momentum")))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.events.append(("update", args.gradient_accumulation_steps))

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.events.append(("zero_grad", None))


class Watched(Trainer):
    """A Trainer whose `events` are the losses of micro-batches, the starts of epochs, momenta and updates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        watch = Watch()
        watch.trainer = self
        self.add_callback(watch)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.events.append(("loss", loss))
        return loss


def arguments(folder, optimizer="lcam", kind=TrainingArguments, **changes):
    values = {
        "output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
        **OPTIMIZERS.get(optimizer, {}),
    }  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        values["ddp_backend"] = "gloo"
    return kind(**{**values, **changes})


def make_trainer(folder, optimizer="lcam", model=Averages, data=None, cls=Watched, dropout=0.0, extra=None, **changes):
    set_seed(3)
    data = Rows() if data is None else data
    args = arguments(folder, optimizer, **changes)
    return cls(model=model(dropout), args=args, train_dataset=data, **(extra or {}))


def windows(events):
    """The number of micro-batches of each update."""
    found, count = [], 0
    for kind, _ in events:
        count += kind == "loss"
        if kind == "update":
            found.append(count)
        if kind in ("update", "zero_grad"):
            count = 0
    return found


def used(events):
    """The momentum of each update."""
    return [value for kind, value in events if kind == "momentum"]


def by_the_rule(events, inside_epoch=False, momentum=HIGH, mean=(0.0, 0), most=0, decay=None):
    """The momentum of each update by METHOD's rule, and the final (momentum, mean, most) to go on from.

    An update decides if it has as many micro-batches as gradient_accumulation_steps, or, where none had so many yet, as
    the most that one had. `mean` is the sum and number of an epoch's losses; `decay` is that of a moving average.
    """
    found, window, (total, count) = [], [], mean
    for kind, value in events:
        if kind == "epoch" and not inside_epoch and decay is None:
            total, count = 0.0, 0
        inside_epoch = inside_epoch and kind != "epoch"
        if kind == "loss":
            window.append(value.float())
        if kind == "momentum":
            found.append(momentum)
        if kind == "update":
            most = max(most, len(window))
            loss = sum(window).item()
            if len(window) == min(most, value) and loss == loss:  # a NaN decides nothing
                count += 1
                if decay is None:
                    total += loss
                    mean = total / count
                else:
                    mean = total = loss if count == 1 else decay * total + (1 - decay) * loss
                momentum = LOW if loss < mean else HIGH
        if kind in ("update", "zero_grad"):
            window = []
    return found, (momentum, (total, count), most)


def check_rule(trainer, decay=None):
    """Every update of a run had the momentum that the rule gives, both occurred, and the last mean is the rule's."""
    expected, (_, (total, count), _) = by_the_rule(trainer.events, decay=decay)
    assert used(trainer.events) == expected
    assert set(expected) == {LOW, HIGH}
    group = trainer.optimizer.optimizer.param_groups[0]
    mean = total / count if decay is None else total
    assert (group["loss_mean"], group["loss_count"]) == (pytest.approx(mean, rel=1e-12), count)


def train_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check(trainer, optimizer, updates):
    """Every logged value is the one used in that step, by NSF's schedule or LCAM's rule."""
    assert type(trainer.optimizer.optimizer) is getattr(hf_nsf, optimizer.upper())
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(logs) == updates
    if optimizer == "nsf":
        schedule = hf_nsf.p_schedule(range(updates), p_min=-0.25, p_max=0.5, cycles=2, total_steps=updates)
        assert [entry["nsf_p"] for entry in logs] == schedule
    else:
        check_rule(trainer)
        assert [entry["lcam_momentum"] for entry in logs] == used(trainer.events)


def check_learning(trainer, part=8):
    losses = [entry["loss"] for entry in train_logs(trainer)]
    assert sum(losses[-part:]) < sum(losses[:part])


def held(trainer):
    """All that must be equal after a resume: weights, moments, groups, logged values."""
    optimizer = unwrap_optimizer(trainer.optimizer)  # whose parameters are others than its state's under ZeRO 3
    return {
        "weights": {name: value.detach().clone() for name, value in trainer.model.state_dict().items()},
        "state": dict(enumerate(optimizer.state.values())),
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "logs": [{key: entry[key] for key in LOGGED if key in entry} for entry in train_logs(trainer)],
    }


def same(a, b):
    """Whether all is equal bit for bit, through dicts and lists; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(-1).isnan(), b.view(-1).isnan()) and (
            torch.equal(a.nan_to_num(), b.nan_to_num())
        )  # fmt: skip
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
