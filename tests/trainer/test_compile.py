# SPDX-License-Identifier: Apache-2.0
"""A stock Trainer with torch_compile=True: the default backend, which needs a C++ compiler, and a quick one."""

import shutil

import pytest
import torch
from fsdp_run import SHAPE, Texts
from trainer_runs import Counts, Rows, check, check_learning, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs g++")]


def llama(dropout):
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


@pytest.mark.parametrize("optimizer", ["lcam", "nsf"])
@pytest.mark.parametrize(
    ("backend", "model", "data", "windows", "updates"),
    [
        pytest.param("inductor", Counts, Rows(40), 1, 30, marks=INDUCTOR),
        pytest.param("inductor", llama, Texts(40), 4, 9, marks=INDUCTOR),
        ("aot_eager", Counts, Rows(40), 4, 9),  # windows of 4, 4 and 2 batches
    ],
)
def test_compiled_trainings_do_not_recompile(backend, model, data, windows, updates, optimizer, tmp_path):
    torch.compiler.reset()
    trainer = make_trainer(
        tmp_path, optimizer, model=model, data=data, dropout=0.1, gradient_accumulation_steps=windows,
        torch_compile=True, torch_compile_backend=backend,
    )  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    check(trainer, optimizer, updates)
    check_learning(trainer, updates // 3)
