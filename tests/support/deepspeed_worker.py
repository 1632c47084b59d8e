# SPDX-License-Identifier: Apache-2.0
"""One process of test_deepspeed.py: a stock Trainer under DeepSpeed on its CPU accelerator.

Arguments: optimizer, ZeRO stage, output folder, "offload" or "". Each process writes what it logged and used to
`<folder>/<rank>.json`, of a whole training and of one that resumes from its checkpoint.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_run import SETTINGS
from trainer_runs import Averages, Rows, arguments
from transformers import Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_nsf.trainer.callback import unwrap_optimizer

SAVED_AT = 20  # in mid-epoch: an epoch has 12 updates


def train(optimizer: str, stage: int, folder: Path, offload: str, resume: str | None) -> dict:
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    if stage == 3:
        # Without it the Trainer writes an empty file and removes it again: here in both processes, which take
        # themselves for single ones, so that the slower one may find none.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    changes = {"max_grad_norm": 0.0, "ddp_backend": None, "use_cpu": False, "save_strategy": "steps"}
    args = arguments(
        folder, optimizer, **{**SETTINGS, **changes}, deepspeed=config, save_steps=SAVED_AT,
    )  # fmt: skip
    set_seed(3)
    trainer = Trainer(model=Averages(), args=args, train_dataset=Rows(96))
    trainer.train(resume_from_checkpoint=resume)
    partitions = [q.detach().double() for group in trainer.optimizer.param_groups for q in group["params"]]
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "norms": [float(p.detach().double().norm()) for p in trainer.model.parameters()],
        "partitions": [float(q.norm()) for q in partitions],
        "zero3": is_deepspeed_zero3_enabled(),
        "engine": type(trainer.model_wrapped).__name__,
        "inner": type(trainer.optimizer.optimizer).__name__,
        "ours": type(unwrap_optimizer(trainer.optimizer)).__name__,
    }


def main(optimizer: str, stage: int, folder: Path, offload: str) -> None:
    report = {"whole": train(optimizer, stage, folder, offload, None)}
    report["resumed"] = train(optimizer, stage, folder, offload, str(folder / f"checkpoint-{SAVED_AT}"))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
