# SPDX-License-Identifier: Apache-2.0
"""One process of test_deepspeed.py: a stock Trainer under DeepSpeed on its CPU accelerator.

Arguments: optimizer, ZeRO stage, output folder. Each process writes what it logged and used to `<folder>/<rank>.json`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_run import Averaging, Rows, arguments
from transformers import Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

import hf_nsf  # noqa: F401


def main(optimizer: str, stage: int, folder: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    args = arguments(folder, optimizer, deepspeed=config, max_grad_norm=0.0, ddp_backend=None, use_cpu=False)
    set_seed(3)
    trainer = Trainer(model=Averaging(), args=args, train_dataset=Rows())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    norms = [float(p.detach().double().norm()) for p in trainer.model.parameters()]
    report = {
        "logs": logs,
        "norms": norms,
        "zero3": is_deepspeed_zero3_enabled(),
        "engine": type(trainer.model_wrapped).__name__,
        "inner": type(trainer.optimizer.optimizer).__name__,
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
