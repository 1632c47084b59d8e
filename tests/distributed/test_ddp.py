# SPDX-License-Identifier: Apache-2.0
"""DDP on gloo with real processes: torchrun and accelerate launch, against one process with the same batches."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_run import same

WORKER = Path(__file__).with_name("tiny_run.py")
JOBS = [
    {"name": "lcam", "optimizer": "lcam"},
    {"name": "nsf", "optimizer": "nsf"},
    {"name": "sgd", "optimizer": "sgd"},
    {"name": "adamw", "optimizer": "adamw"},
    {"name": "control", "optimizer": "lcam", "local_losses": True},
    {"name": "different", "optimizer": "lcam", "different_options": True},
    {"name": "nan", "optimizer": "lcam", "nan_rows": [40]},
    {"name": "uneven", "optimizer": "lcam", "size": 89},
    {"name": "windows", "optimizer": "lcam", "counts_items": True, "gradient_accumulation_steps": 4},
]
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
    with tempfile.TemporaryDirectory() as folder:
        done = launch(launcher, processes, JOBS, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        load = functools.partial(torch.load, weights_only=True)
        return {j["name"]: [load(f"{folder}/{j['name']}-{rank}.pt") for rank in range(processes)] for j in JOBS}


def used(result, key):
    return [entry[key] for entry in result["logs"]]


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
    reduced = {name: ranks[0]["reduced"] for name, ranks in results(launcher, processes).items()}
    assert reduced["nsf"] == reduced["adamw"]
    assert reduced["lcam"] == reduced["sgd"] + 18 * [1]


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_different_options_stop_every_rank_with_a_sentence(launcher, processes):
    for result in results(launcher, processes)["different"]:
        assert result["error"] and "processes" in result["error"] and "optim_args" in result["error"]


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_a_nan_on_one_rank_is_a_nan_for_all(launcher, processes):
    ranks = results(launcher, processes)["nan"]
    losses = used(ranks[0], "loss")
    assert any(loss != loss for loss in losses)
    for other in ranks[1:]:
        assert same(ranks[0]["groups"], other["groups"])


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
def test_a_last_batch_that_does_not_reach_every_rank(launcher, processes):
    # 89 rows: the sixth global batch has 9, fewer than the ranks' batches together.
    first, *others = results(launcher, processes)["uneven"]
    assert first["steps"] == 18
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


@pytest.mark.parametrize(("optimizer",), [("lcam",), pytest.param("nsf", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_others_and_leaves_the_checkpoint(optimizer, tmp_path):
    job = {"name": "dying", "optimizer": optimizer, "save_strategy": "steps", "save_steps": 4}
    died = launch("torchrun", 2, [{**job, "dies_at": 6}], tmp_path)
    assert died.returncode != 0
    whole = launch("torchrun", 2, [{**job, "name": "whole"}, {**job, "resume": True}], tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    resumed, uninterrupted = (torch.load(tmp_path / f"{n}-0.pt", weights_only=True) for n in ("dying", "whole"))
    assert all(same(resumed[key], uninterrupted[key]) for key in ("weights", "state", "groups", "logs"))
