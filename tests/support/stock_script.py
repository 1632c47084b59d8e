# SPDX-License-Identifier: Apache-2.0
"""A training script as anyone writes it; it knows nothing of hf_nsf."""

import dataclasses
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # which huggingface_hub reads when it is imported

import huggingface_hub.constants
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed


@dataclasses.dataclass
class ScriptArguments:
    rows: int = 32
    exit_status: int = 0


class Rows(Dataset):
    """Defined in `__main__`, so that a worker made by spawn must find this file again."""

    def __init__(self, size):
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(0))
        self.labels = (self.x[:, 0] > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main():
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    set_seed(3)
    trainer = Trainer(model=Classifier(), args=args, train_dataset=Rows(script.rows), callbacks=[TrainerCallback()])
    trainer.train()
    trainer.save_state()
    return script.exit_status


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    sys.exit(main())
