# SPDX-License-Identifier: Apache-2.0
"""A stock Trainer with torch_compile=True: the default backend, which needs a C++ compiler, and a quick one."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import hf_nsf

INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs g++")]
OPTIMIZERS = {
    "lcam": {"optim": "lcam", "optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.9", "learning_rate": 0.05},
    "nsf": {"optim": "nsf", "optim_args": "p_min=-0.25,p_max=0.5,cycles=2", "learning_rate": 1e-2},
}


class Rows(Dataset):
    """Rows of tokens that count upwards, with noise; the label is the row or its first token's half."""

    def __init__(self, causal):
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, 24, (44, 1), generator=generator)
        self.rows = (start + torch.arange(8) + torch.randint(0, 2, (44, 8), generator=generator)) % 32
        self.labels = self.rows if causal else (self.rows[:, 0] > 12).long()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


class Tiny(nn.Module):
    """Divides by the number of items that it is told."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(32, 8), nn.Dropout(0.1), nn.Linear(8, 2)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.head(self.drop(self.embed(input_ids).mean(1)))
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("model", "windows", "backend"),
    [
        pytest.param(Tiny, 1, "inductor", marks=INDUCTOR),
        pytest.param(llama, 4, "inductor", marks=INDUCTOR),
        (Tiny, 4, "aot_eager"),
    ],
)
def test_torch_compile(model, windows, backend, optimizer, tmp_path):
    updates = 11 if windows == 1 else 3  # windows of 4, 4 and 3 batches
    set_seed(3)
    torch.compiler.reset()
    args = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, logging_steps=1, seed=5,
        gradient_accumulation_steps=windows, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        torch_compile=True, torch_compile_backend=backend, max_grad_norm=0.0, **OPTIMIZERS[optimizer],
    )  # fmt: skip
    trainer = Trainer(model=model(), args=args, train_dataset=Rows(model is llama))
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    assert len(logs) == 3 * updates and sum(losses[-updates:]) < sum(losses[:updates])
    if optimizer == "nsf":
        expected = hf_nsf.p_schedule(range(3 * updates), p_min=-0.25, p_max=0.5, cycles=2, total_steps=3 * updates)
        assert [entry["nsf_p"] for entry in logs] == expected
        return
    momentum, seen = 0.9, []
    for index, entry in enumerate(logs):
        assert entry["lcam_momentum"] == momentum, index
        seen = seen if index % updates else []
        if windows == 1 or index % 3 < 2:  # the last window of an epoch is shorter
            seen.append(entry["loss"])
            momentum = 0.8 if entry["loss"] < sum(seen) / len(seen) else 0.9
