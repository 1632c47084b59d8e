# SPDX-License-Identifier: Apache-2.0
"""Runs of examples/accelerate_loop.py, in any launcher's process: by a JSON file of jobs and a folder."""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import accelerate_loop
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from forks import save_jobs


class Killed(BaseException):
    """Stands for a kill where the process has to live on."""


def run_job(args, killed_in_save=None, kill_rank=None, first_scale=None):
    """Run the loop once; return what this process holds at its end.

    Args:
        args: the command line.
        killed_in_save: end the run in this save, when all files of accelerate are written but nothing else.
        kill_rank: the rank that gets a SIGKILL there; None stands for an exception in every process.
        first_scale: train with a loss scaler of the CPU that starts with this scale.
    """
    AcceleratorState._reset_state()  # the last job may have used another precision
    GradientState._reset_state()
    held, saves = {}, []
    save_state = Accelerator.save_state

    def end_training(accelerator):
        held.update(
            weights={name: value.detach().clone() for name, value in accelerator._models[0].state_dict().items()},
            optimizer=accelerator._optimizers[0].state_dict(),
            scheduler=accelerator._schedulers[0].state_dict(),
            random=torch.get_rng_state(),
        )

    def save(accelerator, *args, **kwargs):
        saves.append(1)
        if len(saves) == killed_in_save and kill_rank == accelerator.process_index:
            os.kill(os.getpid(), signal.SIGKILL)
        save_state(accelerator, *args, **kwargs)
        if len(saves) == killed_in_save and kill_rank is None:
            raise Killed

    def build(*args, **kwargs):
        accelerator = Accelerator(*args, **kwargs)
        if first_scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=first_scale, growth_interval=1)
        return accelerator

    with (
        mock.patch.object(Accelerator, "end_training", end_training),
        mock.patch.object(Accelerator, "save_state", save),
        mock.patch.object(accelerate_loop, "Accelerator", build),
    ):
        try:
            held["report"] = accelerate_loop.main(args)
        except (Killed, SystemExit) as error:
            held["error"] = str(error)
    return held


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    save_jobs(jobs, lambda job, _: run_job(**{k: v for k, v in job.items() if k != "name"}), sys.argv[2])
