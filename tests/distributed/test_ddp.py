# SPDX-License-Identifier: Apache-2.0
"""DDP on gloo with real processes: torchrun and accelerate launch, against one process with the same batches."""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_run import same

WORKER = Path(__file__).with_name("tiny_run.py")
SHORT_EPOCH = {"size": 88, "accelerator_config": {"even_batches": False}}
# Without its filter the Trainer's sum of losses, which it resets by subtraction, stays NaN after the first one.
FILTER = {"logging_nan_inf_filter": True}
# What rank 1 has otherwise, and what the sentence must say of rank 0 and of rank 1.
DIFFERENT = [
    ("lcam", {"optim_args": "low_loss_momentum=0.7,high_loss_momentum=0.9"},
     ("'low_loss_momentum': 0.8,", "'low_loss_momentum': 0.7,")),
    ("lcam", {"optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.95"},
     ("'high_loss_momentum': 0.9}", "'high_loss_momentum': 0.95}")),
    ("lcam", {"learning_rate": 0.04}, ("'group 0 lr': '0.05'", "'group 0 lr': '0.04'")),
    ("nsf", {"optim_args": "p_min=0.25,p_max=0.5,cycles=2"}, ("'p_min': -0.25,", "'p_min': 0.25,")),
    ("nsf", {"optim_args": "p_min=-0.25,p_max=0.5,cycles=2,step_scale=raw"}, ("optim=nsf", "'step_scale': 'raw'")),
    ("nsf", {"learning_rate": 2e-2}, ("'group 0 lr': '0.01'", "'group 0 lr': '0.02'")),
]  # fmt: skip
NAN_AT = [2, 6, 9, 10]  # the seventh update is the first of an epoch
JOBS = [
    {"name": "lcam", "optimizer": "lcam", "save_strategy": "steps", "save_steps": 9, "counts": True},
    {"name": "nsf", "optimizer": "nsf", "counts": True},
    {"name": "sgd", "optimizer": "sgd", "save_strategy": "steps", "save_steps": 9, "counts": True},
    {"name": "adamw", "optimizer": "adamw", "counts": True},
    {"name": "control", "optimizer": "lcam", "local_losses": True},
    *({"name": f"different {index}", "optimizer": optimizer, "different_on_rank_1": changes}
      for index, (optimizer, changes, _) in enumerate(DIFFERENT)),
    {"name": "nan", "optimizer": "lcam", "nan_at": NAN_AT, **FILTER},
    {"name": "empty, mean", "optimizer": "lcam", "empty_last": True, **FILTER},
    {"name": "empty, counting", "optimizer": "lcam", "empty_last": True, "counts_items": True},
    {"name": "empty, nsf", "optimizer": "nsf", "empty_last": True, **FILTER},
    {"name": "uneven", "optimizer": "lcam", "size": 89},
    {"name": "adamw on rank 1", "optimizer": "lcam", "on_rank_1": "adamw"},
    {"name": "nsf on rank 1", "optimizer": "sgd", "on_rank_1": "nsf"},
    {"name": "adamw resumes on rank 1", "optimizer": "lcam", "on_rank_1": "adamw", "folder": "lcam", "resume": True},
    {"name": "adamw and sgd", "optimizer": "adamw", "on_rank_1": "sgd", "max_steps": 3},
    # 88 rows make 11 batches of 8 (or 22 of 4): without even_batches the last ranks get one batch less an epoch.
    {"name": "short epoch, lcam", "optimizer": "lcam", **SHORT_EPOCH},
    {"name": "short epoch, nsf", "optimizer": "nsf", **SHORT_EPOCH},
    {"name": "short epoch, lcam, steps", "optimizer": "lcam", "max_steps": 10, **SHORT_EPOCH},
    {"name": "short epoch, ema, steps", "optimizer": "lcam", "max_steps": 10, **SHORT_EPOCH,
     "optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.9,loss_average=ema"},
    {"name": "short epoch, ema, windows", "optimizer": "lcam", "max_steps": 10, **SHORT_EPOCH,
     "optim_args": "loss_average=ema", "gradient_accumulation_steps": 4},
    {"name": "short epoch, nsf, steps", "optimizer": "nsf", "max_steps": 10, **SHORT_EPOCH},
    # 95 rows are as many batches for all ranks, the last of them short, for 2 processes and for 4.
    {"name": "short batch", "optimizer": "lcam", "size": 95, "accelerator_config": {"even_batches": False}},
    {"name": "windows", "optimizer": "lcam", "counts_items": True, "gradient_accumulation_steps": 4},
]  # fmt: skip
ALONE = ("lcam", "nsf", "windows")  # those that a single process makes too, for comparison
LAUNCHES = [
    pytest.param("torchrun", 2),
    pytest.param("torchrun", 4, marks=pytest.mark.slow),
    pytest.param("accelerate", 2, marks=pytest.mark.slow),
    pytest.param("accelerate", 4, marks=pytest.mark.slow),
]


def launch(launcher, processes, jobs, folder, timeout=280):
    """Run the jobs under a launcher; its finished process."""
    Path(folder, "jobs.json").write_text(json.dumps(jobs))
    python = [sys.executable, "-m"]
    command = {
        "none": [sys.executable],
        "torchrun": [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
        "accelerate": [*python, "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}",
                       "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
    }[launcher]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [*command, str(WORKER), str(Path(folder, "jobs.json")), str(folder)],
        env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@functools.cache
def results(launcher, processes):
    """What each process held at the end of each job: {job: [rank 0, rank 1, ...]}."""
    jobs = [job for job in JOBS if processes > 1 or job["name"] in ALONE]
    with tempfile.TemporaryDirectory() as folder:
        done = launch(launcher, processes, jobs, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        load = functools.partial(torch.load, weights_only=True)
        return {j["name"]: [load(f"{folder}/{j['name']}-{rank}.pt") for rank in range(processes)] for j in jobs}


def used(result, key):
    return [entry[key] for entry in result["logs"]]


def check_agreement(ranks):
    """All ranks hold the same bits, and had the same loss state before and after every update."""
    for other in ranks[1:]:
        for key in ("weights", "state", "groups", "updates", "logs"):
            assert same(ranks[0][key], other[key]), key


def check_decisions(ranks):
    """METHOD's rule on the mean of the ranks' own losses, six updates an epoch: what is not finite takes no part."""
    momentum, chosen = 0.9, set()
    for index, (before, after) in enumerate(ranks[0]["updates"]):
        loss = sum(rank["own_losses"][index] for rank in ranks) / len(ranks)
        total, count = (0.0, 0) if index % 6 == 0 else (total, count)  # noqa: F821
        assert all((group["momentum"], group["loss_count"]) == (momentum, count) for group in before), index
        if math.isfinite(loss):
            total, count = total + loss, count + 1
            momentum = 0.8 if loss < total / count else 0.9
            chosen.add(momentum)
            assert ranks[0]["logs"][index]["loss"] == pytest.approx(loss, rel=1e-6)
            assert all(group["loss_mean"] == pytest.approx(total / count, rel=1e-6) for group in after), index
        else:
            assert before == after, index
        assert all((group["momentum"], group["loss_count"]) == (momentum, count) for group in after), index
    assert chosen == {0.8, 0.9}


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
@pytest.mark.parametrize("name", ["lcam", "nsf"])
def test_all_ranks_hold_the_same_bits(name, launcher, processes):
    first, *others = results(launcher, processes)[name]
    assert first["processes"] == processes and first["steps"] == 18
    for other in others:
        assert all(same(first[key], other[key]) for key in ("weights", "state", "groups"))


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_the_phases_are_those_of_one_process(launcher, processes):
    together, alone = results(launcher, processes), results("none", 1)
    for job, key in (("lcam", "lcam_loss_phase"), ("nsf", "nsf_p")):
        assert used(together[job][0], key) == used(alone[job][0], key)
        assert len(set(used(alone[job][0], key))) > 1
        for name, value in alone[job][0]["weights"].items():
            torch.testing.assert_close(together[job][0]["weights"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_without_the_reduction_ranks_diverge(launcher, processes):
    first, second, *_ = results(launcher, processes)["control"]
    assert not same(first["weights"], second["weights"])


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_lcam_reduces_one_scalar_a_step_and_nsf_nothing(launcher, processes):
    made = results(launcher, processes)
    for rank in range(processes):
        # The first entry is what was called before the first step.
        lcam, nsf, sgd, adamw = (made[name][rank]["collectives"][1:] for name in ("lcam", "nsf", "sgd", "adamw"))
        assert len(lcam) == 18 and all(sgd) and all(adamw)  # DDP's own and the log's are seen
        assert [sorted(step) for step in lcam] == [sorted([*step, "allreduce_ 1"]) for step in sgd]
        assert nsf == adamw


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
@pytest.mark.parametrize(
    ("index", "said"), [(i, said) for i, (*_, said) in enumerate(DIFFERENT)], ids=[said[1] for *_, said in DIFFERENT]
)
def test_different_options_stop_every_rank_with_a_sentence(index, said, launcher, processes):
    errors = {result["error"] for result in results(launcher, processes)[f"different {index}"]}
    assert len(errors) == 1 and None not in errors
    first, second = errors.pop().split(", process 1 with ")
    assert first.startswith("The processes have different options: process 0 trains with ") and said[0] in first
    assert said[1] in second and second.endswith("; give all the same optim, optim_args and learning rate.")


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_a_nan_on_one_rank_is_a_nan_for_all(launcher, processes):
    """Only the loss is NaN, and no gradient, so that the training itself goes on."""
    ranks = results(launcher, processes)["nan"]
    for rank, result in enumerate(ranks):
        nans = [index for index, loss in enumerate(result["own_losses"]) if math.isnan(loss)]
        assert nans == (NAN_AT if rank == 1 else []) and len(result["own_losses"]) == result["steps"] == 18
        for index, (before, after) in enumerate(result["updates"]):
            assert (before == after) == (index in NAN_AT), index
        assert all(value.isfinite().all() for value in result["weights"].values())
    check_agreement(ranks)
    check_decisions(ranks)
    losses = ranks[0]["own_losses"]
    assert sum(losses[12:]) < sum(losses[:6])


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
@pytest.mark.parametrize("job", ["empty, mean", "empty, counting", "empty, nsf"])
def test_an_empty_last_batch_on_one_rank_is_decided_alike_on_all(job, launcher, processes):
    """The mean over no rows is NaN and takes no part; a sum over none, divided by all ranks' items, is 0 and does."""
    ranks = results(launcher, processes)[job]
    last = (5, 11, 17)
    for rank, result in enumerate(ranks):
        assert result["error"] is None and len(result["own_losses"]) == 18
        for index, loss in enumerate(result["own_losses"]):
            empty = rank == 1 and index in last
            assert math.isfinite(loss) == (not empty or job == "empty, counting") and (loss == 0) == (
                empty and job == "empty, counting"
            )
        assert all(value.isfinite().all() for value in result["weights"].values())
    check_agreement(ranks)
    if job == "empty, nsf":
        assert [group["p_cycle_step"] for group in ranks[0]["groups"]] == len(ranks[0]["groups"]) * [18]
        return
    check_decisions(ranks)
    for index in last:
        before, after = ranks[0]["updates"][index]
        assert (before == after) == (job == "empty, mean")


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_a_last_batch_that_does_not_reach_every_rank(launcher, processes):
    # 89 rows: the sixth global batch has 9, fewer than the ranks' batches together.
    first, *others = results(launcher, processes)["uneven"]
    assert first["steps"] == 18
    for other in others:
        assert all(same(first[key], other[key]) for key in ("weights", "state", "groups"))


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
@pytest.mark.parametrize(
    ("job", "names"),
    [
        ("adamw on rank 1", ["process 0 trains with optim=lcam", "process 1 with optim=adamw_torch"]),
        ("nsf on rank 1", ["process 0 trains with optim=sgd", "process 1 with optim=nsf"]),
        ("adamw resumes on rank 1", ["holds the optimizer state of lcam and this run trains with adamw_torch"]),
    ],
)
def test_one_of_ours_beside_another_optimizer_stops_every_rank_with_a_sentence(job, names, launcher, processes):
    errors = {result["error"] for result in results(launcher, processes)[job]}
    assert len(errors) == 1 and all(name in errors.copy().pop() for name in names)


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_other_optimizers_are_not_compared(launcher, processes):
    assert all(result["steps"] == 3 for result in results(launcher, processes)["adamw and sgd"])


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_ranks_that_would_wait_for_each_other_are_stopped_with_a_sentence(launcher, processes):
    # The Trainer itself, seen with AdamW and SGD, waits at its end for the ranks that had fewer updates.
    made = results(launcher, processes)
    for job in ("short epoch, lcam", "short epoch, nsf"):
        errors = {result["error"] for result in made[job]}
        assert len(errors) == 1 and "different numbers of updates, 18, " in errors.pop()
    for job in ("short epoch, lcam, steps", "short epoch, ema, windows"):
        errors = {result["error"] for result in made[job]}
        assert len(errors) == 1 and "epochs of different lengths in batches, 6, " in errors.pop()


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
@pytest.mark.parametrize(
    ("job", "steps"), [("short epoch, ema, steps", 10), ("short epoch, nsf, steps", 10), ("short batch", 18)]
)
def test_uneven_batches_that_the_trainer_can_do_are_done(job, steps, launcher, processes):
    first, *others = results(launcher, processes)[job]
    assert first["error"] is None and first["steps"] == steps
    for other in others:
        assert all(same(first[key], other[key]) for key in ("weights", "state", "groups"))


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_short_accumulation_windows_take_part_on_every_rank(launcher, processes):
    # Six batches an epoch in windows of 4 and 2, of a model that divides by the items of its window on all ranks.
    ranks, alone = results(launcher, processes)["windows"], results("none", 1)["windows"][0]
    for rank in ranks:
        assert all(same(ranks[0][key], rank[key]) for key in ("weights", "state", "groups"))
        assert rank["groups"][0]["loss_windows_average"] == 1 and rank["groups"][0]["loss_window"] == 4
    assert used(ranks[0], "lcam_loss_phase") == used(alone, "lcam_loss_phase") and len(alone["logs"]) == 6
    losses = used(ranks[0], "loss")
    means = [entry.get("lcam_loss_mean") for entry in ranks[0]["logs"]]
    assert means[2] == pytest.approx(sum(losses[:2]) / 2, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
def test_a_rank_that_dies_ends_the_others_and_leaves_the_checkpoint(optimizer, tmp_path):
    job = {"name": "dying", "optimizer": optimizer, "save_strategy": "steps", "save_steps": 4}
    died = launch("torchrun", 2, [{**job, "dies_at": 6}], tmp_path)
    assert died.returncode != 0
    whole = launch("torchrun", 2, [{**job, "name": "whole"}, {**job, "resume": True}], tmp_path)
    if "don't know how to restore data location" in whole.stderr:  # transformers 5.2.0
        pytest.skip("this Trainer loads no optimizer's state, AdamW's neither, in several processes on a CPU")
    assert whole.returncode == 0, whole.stderr[-3000:]
    resumed, uninterrupted = (torch.load(tmp_path / f"{n}-0.pt", weights_only=True) for n in ("dying", "whole"))
    assert all(same(resumed[key], uninterrupted[key]) for key in ("weights", "state", "groups", "logs"))
