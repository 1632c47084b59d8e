# SPDX-License-Identifier: Apache-2.0
"""A stock Trainer under FSDP2 on gloo with real processes: training as in one process, and exact resumes."""

import functools
import json

import pytest
import torch
from forks import SUPPORT, load_job, run_checked
from problems import TORCH
from trainer_runs import same

pytestmark = pytest.mark.skipif(
    TORCH < (2, 9),
    reason="before torch 2.9, FSDP2 on gloo sums gradients rather than averaging them",
)

OURS = ["lcam", "nsf"]
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
SETTINGS = {
    "plain": {"save_steps": 14, "num_train_epochs": 2},  # 10 updates an epoch, so saved at 14 and 20
    # Parameters of bfloat16 have moments of float32, and Kahan sums.
    "bfloat16": {"save_steps": 14, "num_train_epochs": 2, "dtype": "bfloat16"},
    # 7 updates an epoch, the last of 2 micro-batches; saved at 9, 18, 21.
    "accumulating": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "save_steps": 9,
                     "num_train_epochs": 3},
}  # fmt: skip
# What is saved and resumed together: in the default run, in long ones with two processes, and with four.
FEW = (("lcam", SHARDED, "plain"), ("nsf", FULL, "plain"))
ALL = tuple((name, form, "plain") for name in OURS for form in (SHARDED, FULL))
UNUSUAL = tuple((name, form, setting) for name, form, _ in ALL for setting in ("bfloat16", "accumulating"))


def launched(plan, folder):
    """Make the launches of a plan: [{job: [rank 0, ...]}, ...]."""
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    run_checked(SUPPORT / "fsdp_run.py", file, folder)
    return [
        {job["name"]: load_job(job["name"], folder / str(number)) for job in step["jobs"]}
        for number, step in enumerate(plan)
    ]


def saving(optimizer, form, setting):
    name = f"{optimizer} {form} {setting}"
    return {"name": name, "optimizer": optimizer, "state_dict": form, "save_strategy": "steps", **SETTINGS[setting]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@functools.cache
def made(processes, cases, place):
    """Trainings of one process; uninterrupted sharded ones; their second parts, of four processes also by two."""
    folder = place / f"{processes}-{len(cases)}"
    folder.mkdir()  # fails where this has failed before, rather than after all the trainings again
    alone = [{"name": name, "optimizer": name, "num_train_epochs": 2} for name in OURS]
    jobs, again = [saving(*case) for case in cases], []
    for job in jobs:
        checkpoints = folder / "1" / job["name"]
        again.append({**job, "resume": str(checkpoints / f"checkpoint-{18 if job['save_steps'] == 9 else 14}")})
    plan = [(1, alone), (processes, jobs), (processes, again)]
    if processes == 4:
        plan.append((2, [job for job in again if job["state_dict"] == SHARDED]))
    return launched([{"processes": number, "jobs": each} for number, each in plan], folder)


def assert_alike(optimizer, together, expected):
    """The values used are the same, the weights alike.

    float32 sums of gradients in another order: a rounding (6e-8) or so a step, and nothing amplifies it, as the
    decisions are the same. One other momentum, or one p off by 0.05, moves some tensor by 7e-4 or more.
    """
    for key in {"lcam": ("lcam_momentum", "lcam_loss_phase"), "nsf": ("nsf_p",)}[optimizer]:
        used = [entry[key] for entry in together[0]["logs"]]
        assert used == [entry[key] for entry in expected["logs"]] and len(used) == 20 and len(set(used)) > 1
    for name, value in expected["weights"].items():
        for rank in together:
            assert torch.linalg.vector_norm(rank["weights"][name] - value) <= 1e-5 * torch.linalg.vector_norm(value)


@pytest.mark.parametrize(("processes", "cases"), [(2, FEW), pytest.param(4, ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OURS)
def test_training_equals_that_of_one_process(optimizer, processes, cases, place):
    alone, whole, *_ = made(processes, cases, place)
    (alone,) = alone[optimizer]
    for together in (ranks for name, ranks in whole.items() if name.startswith(optimizer)):
        assert alone["sharded"] == 0 and all(rank["sharded"] == len(alone["weights"]) for rank in together)
        assert_alike(optimizer, together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OURS)
def test_a_sharded_checkpoint_is_resumed_by_fewer_processes(optimizer, place):
    _, whole, _, fewer = made(4, ALL, place)
    name = saving(optimizer, SHARDED, "plain")["name"]
    assert len(fewer[name]) == 2 and all(rank["sharded"] for rank in fewer[name])
    assert_alike(optimizer, fewer[name], whole[name][0])


RESUMES = [
    *((2, FEW, case) for case in FEW),
    *(pytest.param(2, UNUSUAL, case, marks=pytest.mark.slow) for case in UNUSUAL),
    *(pytest.param(4, ALL, case, marks=pytest.mark.slow) for case in ALL),
]


@pytest.mark.parametrize(("processes", "cases", "case"), RESUMES)
def test_a_resumed_training_equals_the_uninterrupted_one(case, processes, cases, place):
    whole, again = (launch[saving(*case)["name"]] for launch in made(processes, cases, place)[1:3])
    for expected, ours in zip(whole, again, strict=True):
        for key in ("weights", "state", "groups", "logs"):
            assert same(ours[key], expected[key]), key
        assert expected["said"] == ours["said"] == []
