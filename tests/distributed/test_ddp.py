# SPDX-License-Identifier: Apache-2.0
"""DDP on gloo with real processes: torchrun and accelerate launch, against one process with the same batches."""

import functools
import tempfile
from collections import Counter

import pytest
import torch
from forks import launch
from tiny_run import run_job
from trainer_runs import HIGH, LOW, by_the_rule, same, used, windows

EMA = {"optim_args": f"low_loss_momentum={LOW},high_loss_momentum={HIGH},loss_average=ema"}
NAN_AT = [2, 6, 9, 10]  # the seventh update is the first of an epoch
JOBS = [
    {"name": "lcam", "optimizer": "lcam", "counts": True},
    {"name": "nsf", "optimizer": "nsf", "counts": True},
    {"name": "adamw", "optimizer": "adamw", "counts": True},
    {"name": "without hf_nsf", "optimizer": "adamw", "counts": True, "unregistered": True},
    # Without its filter the Trainer's sum of losses, which it resets by subtraction, stays NaN after the first one.
    {"name": "nan", "optimizer": "lcam", "nan_at": NAN_AT, "logging_nan_inf_filter": True},
    {"name": "empty, mean", "optimizer": "lcam", "empty_last": True, "logging_nan_inf_filter": True},
    {"name": "empty, counting", "optimizer": "lcam", "empty_last": True, "counts_items": True},
    # Eleven batches an epoch: five windows of 2, and one of 1.
    {"name": "windows", "optimizer": "lcam", "counts_items": True, "size": 88, "batch": 8,
     "gradient_accumulation_steps": 2},
    # 89 rows: the sixth global batch has 9, fewer than the ranks' batches together.
    {"name": "uneven", "optimizer": "lcam", "size": 89},
    # 95 rows are as many batches for all ranks, the last of them short, for 2 processes and for 4.
    {"name": "short batch", "optimizer": "lcam", "size": 95, "accelerator_config": {"even_batches": False}},
    # A pass of 84 rows has eleven batches, the last filled up: five windows of 2, and one batch is carried over.
    *({"name": f"stream, {kind}", "optimizer": "lcam", "stream": True, "size": 84, "max_steps": 14, "batch": 8,
       "gradient_accumulation_steps": 2, "accelerator_config": {"dispatch_batches": kind == "dispatched"}, **changes}
      for kind, changes in (("dispatched", {}), ("sharded", EMA))),
    # Each rank reads for itself, and one has more rows: their epochs start at different updates.
    {"name": "stream, own lengths", "optimizer": "lcam", "stream": True, "size": 44, "on_rank_1": {"size": 60},
     "max_steps": 14, "batch": 8, "accelerator_config": {"dispatch_batches": False}},
]  # fmt: skip
LAUNCHES = [
    ("torchrun", 2),
    pytest.param(("torchrun", 4), marks=pytest.mark.slow),
    pytest.param(("accelerate", 2), marks=pytest.mark.slow),
]


@functools.cache
def results(launcher, processes):
    """The end of each job in each process: {job: [rank 0, rank 1, ...]}."""
    with tempfile.TemporaryDirectory() as folder:
        done, made = launch("tiny_run.py", JOBS, folder, launcher, processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return made


@functools.cache
def alone(name):
    """The end of a job made by this process."""
    with tempfile.TemporaryDirectory() as folder:
        return run_job(next(job for job in JOBS if job["name"] == name), folder)


@pytest.fixture(params=LAUNCHES, ids=lambda case: "-".join(map(str, case)))
def made(request):
    return results(*request.param)


def losses(result):
    return [value for kind, value in result["events"] if kind == "loss"]


def by_update(events):
    """Of each update: whether an epoch started before it, its momentum, its losses, and the accumulation."""
    starts, momentum, found = False, None, []
    for kind, value in events:
        starts = starts or kind == "epoch"
        momentum = value if kind == "momentum" else momentum
        if kind == "loss":
            found.append(value)
        if kind == "update":
            yield starts, momentum, found, value
            starts, found = False, []


def of_all_ranks(ranks):
    """The events with the mean of the ranks' losses; an epoch starts on all when it does on one."""
    events = []
    for each in zip(*(by_update(rank["events"]) for rank in ranks), strict=True):
        starts, (momentum, *others), window, (accumulation, *_) = zip(*each, strict=True)
        assert set(others) == {momentum}
        means = [torch.stack(values).mean() for values in zip(*window, strict=True)]
        kind = "update" if sum(means).isfinite() else "zero_grad"  # a loss that is not finite takes no part
        events += [("epoch", None)] * any(starts) + [("momentum", momentum)] + [("loss", mean) for mean in means]
        events.append((kind, accumulation))
    return events


RULE = {"lcam": {1: 18}, "windows": {2: 15, 1: 3}, "uneven": {1: 18}, "short batch": {1: 18}, "nan": {1: 18},
        "empty, mean": {1: 18}, "empty, counting": {1: 18}, "stream, dispatched": {2: 12, 3: 2},
        "stream, sharded": {2: 12, 3: 2}, "stream, own lengths": {1: 14}}  # fmt: skip


@pytest.mark.parametrize("job", RULE)
def test_momenta_follow_from_the_mean_of_all_losses(job, made):
    ranks = made[job]
    expected, _ = by_the_rule(of_all_ranks(ranks), decay=0.98 if job == "stream, sharded" else None)
    assert used(ranks[0]["events"]) == expected and set(expected) == {LOW, HIGH}
    assert Counter(windows(ranks[0]["events"])) == RULE[job]


def test_all_ranks_take_part_and_hold_the_same_bits(made):
    for name, (first, *others) in made.items():
        assert first["processes"] == 1 + len(others) > 1, name
        for other in others:
            assert all(same(first[key], other[key]) for key in ("weights", "state", "groups", "logs", "steps")), name


@pytest.mark.parametrize("job", ["lcam", "nsf", "windows"])
def test_training_equals_that_of_one_process(job, made):
    together, one = made[job][0], alone(job)
    key = "nsf_p" if job == "nsf" else "lcam_momentum"
    values = [entry[key] for entry in one["logs"]]
    assert [entry[key] for entry in together["logs"]] == values and len(set(values)) > 1
    for name, value in one["weights"].items():
        torch.testing.assert_close(together["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_lcam_reduces_two_numbers_a_step_and_nsf_nothing(made):
    """Other optimizers' runs are as without hf_nsf."""
    names = ("lcam", "nsf", "adamw", "without hf_nsf")
    for lcam, nsf, adamw, plain in zip(*(made[name] for name in names), strict=True):
        start, *steps = adamw["collectives"]
        assert adamw["collectives"] == plain["collectives"] == nsf["collectives"]
        assert len(steps) == 18 and all(steps)  # DDP's own and the log's are seen
        assert lcam["collectives"][0] == start
        assert list(map(Counter, lcam["collectives"][1:])) == [Counter([*step, "allreduce_ 2"]) for step in steps]


def test_a_nan_on_one_rank_is_a_nan_for_all(made):
    """Only the loss is NaN, and no gradient, so that the training itself goes on."""
    ranks = made["nan"]
    for rank, result in enumerate(ranks):
        nans = [index for index, loss in enumerate(losses(result)) if loss.isnan()]
        assert nans == (NAN_AT if rank == 1 else []) and result["steps"] == 18
        assert all(value.isfinite().all() for value in result["weights"].values())
    assert sum(losses(ranks[0])[12:]) < sum(losses(ranks[0])[:6])


@pytest.mark.parametrize("job", ["empty, mean", "empty, counting"])
def test_an_empty_last_batch_on_one_rank_is_decided_alike_on_all(job, made):
    """The mean over no rows is NaN and takes no part; a sum over none, divided by all ranks' items, is 0 and does."""
    counting = job == "empty, counting"
    for rank, result in enumerate(made[job]):
        for index, loss in enumerate(losses(result)):
            empty = rank == 1 and index in (5, 11, 17)
            assert loss.isnan() == (empty and not counting) and (loss == 0) == (empty and counting)
        assert all(value.isfinite().all() for value in result["weights"].values()) and result["steps"] == 18
