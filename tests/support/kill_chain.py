# SPDX-License-Identifier: Apache-2.0
"""Trains, is killed, resumes, and compares with a training that nobody interrupted.

One process imports the libraries and then forks every training (one child per rank), so that a kill costs half a
second and not ten. A child writes a byte at each step; the parent waits for a random step and a random moment within
it and sends SIGKILL to all ranks or to the last, whose loss ends the others; saves are hit half-way, too. Called as

    kill_chain.py FOLDER OPTIMIZER KILLS PROCESSES [STATE_DICT_TYPE]

it prints the number of kills that hit a running training, and exits with an error at the first difference. With a type
of state dict the training is one that FSDP2 shards over the processes.
"""

import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import fsdp_run
import tiny_run
import torch
from forks import start
from transformers import TrainerCallback

STEPS, BATCH, SHARDED_BATCH = 36, 16, 14  # six epochs of six updates, with 96 rows or 80 texts
SPAN = {False: 0.02, True: 0.1}  # seconds, about what a step and its save take: whole, sharded
SETTINGS = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "num_train_epochs": 6}


class _Reports(TrainerCallback):
    """Writes a byte for each step begun on rank 0."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 0:
            os.write(self.pipe, b".")


def _train(optimizer, folder, resume, processes, pipe, state_dict):
    """Make the training of one rank."""
    settings = {**SETTINGS, "per_device_train_batch_size": BATCH // processes}
    kind = fsdp_run if state_dict else tiny_run
    if state_dict:
        settings.update(state_dict=state_dict, per_device_train_batch_size=SHARDED_BATCH // processes)
    else:
        settings["dropout"] = 0.2
    trainer = kind.make_trainer(folder, optimizer, callbacks=[_Reports(pipe)], **settings)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(kind.held(trainer), Path(folder, f"final-{trainer.args.process_index}.pt"))


def newest_checkpoint(folder, processes):
    """The newest one that can be resumed, or None.

    The Trainer writes trainer_state.json last of all, but other ranks' random states at the same time.
    """
    ranks = [""] if processes == 1 else [f"_{rank}" for rank in range(processes)]
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        if all(zipfile.is_zipfile(path / f"rng_state{rank}.pth") for rank in ranks):
            return str(path)
    return None


def run(optimizer, folder, processes, state_dict, kill_after=None, delay=0.0, killed=()):
    """Fork a training, from the newest checkpoint if there is one; whether it ended before it could be killed."""
    resume = newest_checkpoint(folder, processes)
    reading, writing = os.pipe()
    children = start(processes, _train, optimizer, folder, resume, processes, writing, state_dict)
    os.close(writing)
    seen = 0
    while kill_after is not None and seen < kill_after and os.read(reading, 1):
        seen += 1
    if kill_after is not None and seen == kill_after:
        time.sleep(delay)
        for rank in killed:
            os.kill(children[rank], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(reading)
    if kill_after is None or -signal.SIGKILL not in codes:
        assert codes == [0] * processes, f"a training that nobody killed ended with {codes}"
        return True
    return False


def main(folder, optimizer, kills, processes, state_dict=None):
    whole = Path(folder, "whole")
    run(optimizer, whole, processes, state_dict)
    expected = [torch.load(whole / f"final-{rank}.pt", weights_only=True) for rank in range(processes)]
    assert [entry["step"] for entry in expected[0]["logs"]] == list(range(1, STEPS + 1))
    draw = random.Random(f"{optimizer} {processes}" + (f" {state_dict}" if state_dict else ""))
    hit, chain, resumed = 0, 0, 0
    while hit < kills:
        chain += 1
        broken = Path(folder, f"chain-{chain}")
        for _ in range(4):  # several kills in one training, as long as it is under way
            if hit == kills:
                break
            after, delay = draw.randint(1, 14), draw.uniform(0, SPAN[bool(state_dict)])
            killed = range(hit % processes, processes)  # all, or the last alone
            if not run(optimizer, broken, processes, state_dict, after, delay, killed):
                hit += 1
                resumed += newest_checkpoint(broken, processes) is not None
        run(optimizer, broken, processes, state_dict)
        for rank in range(processes):
            ours = torch.load(broken / f"final-{rank}.pt", weights_only=True)
            for key in ("weights", "state", "groups", "logs"):
                assert tiny_run.same(ours[key], expected[rank][key]), f"chain {chain}, rank {rank}: {key} differ"
    print(f"{hit} kills in {chain} trainings, {resumed} with a checkpoint to resume from")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
