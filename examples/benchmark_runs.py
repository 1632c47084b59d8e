# SPDX-License-Identifier: Apache-2.0
"""What examples/benchmark.py measures in whole runs and in processes of their own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_nsf
import hf_nsf.optim.nsf as nsf

OPTIMIZERS = ("adamw_torch_fused", "nsf", "lcam")


class _Clock(TrainerCallback):
    """Notes when each update ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def bert(hidden: int, layers: int, vocabulary: int = 30522) -> BertForSequenceClassification:
    """Return a classifier with MiniLM's proportions and random weights."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=4 * hidden,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def training(
    rounds: int, steps: int, device: str, model_size: tuple[int, int] = (384, 6), batch: int = 32, length: int = 64
) -> list[dict[str, Any]]:
    """Whole trainings in a stock Trainer, in turns: samples a second of each optimizer.

    Args:
        rounds: how often each optimizer trains anew.
        steps: updates of one training; the first two of each are not counted.
        device: "cpu" or "cuda".
        model_size: hidden size and layers.
        batch: samples of an update.
        length: tokens of a sample.

    Returns:
        For each optimizer its median, quartiles and ratio to adamw_torch_fused.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (batch * steps, length), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in OPTIMIZERS:
                clock = _Clock()
                args = TrainingArguments(
                    output_dir=folder,
                    optim=name,
                    max_steps=steps,
                    per_device_train_batch_size=batch,
                    learning_rate=1e-4,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=device == "cpu",
                )
                trainer = Trainer(model=bert(*model_size), args=args, train_dataset=data, callbacks=[clock])
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                seconds[name] += [b - a for a, b in zip(clock.ends[1:], clock.ends[2:], strict=False)]
    base = statistics.median(seconds[OPTIMIZERS[0]])
    rows = []
    for name, some in seconds.items():
        low, middle, high = statistics.quantiles(some, n=4)
        rows.append(
            {
                "optim": name,
                "samples_per_s": batch / middle,
                "quartiles": [batch / high, batch / low],
                "ratio": base / middle,
                "updates": len(some),
            }
        )
    return rows


def compile_seconds() -> dict[str, float | None]:
    """Seconds in which NSF's loops are made in a new process, with an empty cache and with a filled one."""
    code = (
        "import time, hf_nsf.optim.nsf as nsf\n"
        "start = time.perf_counter()\n"
        "loops = nsf.compiled_loops()\n"
        "made = loops is not None and all(loops.is_ready(scale) for scale in nsf.STEP_SCALES)\n"
        "print(time.perf_counter() - start if made else 'none')"
    )
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(Path(hf_nsf.__file__).parents[1])}
        for name in ("empty cache", "filled cache"):
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            answer = done.stdout.split()[-1]
            found[name] = None if answer == "none" else float(answer)
    return found


def recompilations() -> int | None:
    """What numba compiles while p runs through a cycle, after NSF's loops were made; None without numba."""
    loops = nsf.compiled_loops()
    if loops is None or not all(loops.is_ready(scale) for scale in nsf.STEP_SCALES):
        return None
    from numba.core import event

    made = loops.kernels.kernel.cache_info().misses
    with event.install_recorder("numba:compile") as recorder:
        for scale in nsf.STEP_SCALES:
            q = nn.Parameter(torch.ones(10))
            q.grad = torch.ones(10)
            optimizer = hf_nsf.NSF([q], step_scale=scale, fused=True)
            cycle = hf_nsf.PCycle(optimizer, p_min=-0.25, p_max=0.5, cycle_steps=20)
            for _ in range(20):
                optimizer.step()
                cycle.step()
    return len(recorder.buffer) + loops.kernels.kernel.cache_info().misses - made


def _count_collectives(rank: int, folder: str) -> None:
    """One of two processes: counts the collectives that torch sees in a step, whole tensors and sharded ones."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    lines = []
    for sharded in (False, True):
        for name in ("AdamW", "NSF p=0.1", "NSF raw p=0.1", "LCAM with its loss"):
            params = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
            if sharded:
                params = [nn.Parameter(distribute_tensor(q.data, mesh, [Shard(0)])) for q in params]
            for q in params:
                q.grad = torch.ones_like(q)
            phase = None
            if name == "AdamW":
                optimizer: Any = torch.optim.AdamW(params)
            elif name.startswith("NSF"):
                optimizer = hf_nsf.NSF(params, p=0.1, step_scale="raw" if "raw" in name else "adam")
            else:
                optimizer = hf_nsf.LCAM(params, lr=0.1)
                phase = hf_nsf.LossPhase(optimizer)
                phase.start_epoch()
            for counted in (False, True):
                with torch.profiler.profile() as profile:
                    optimizer.step()
                    if phase is not None:
                        phase.step(torch.tensor(1.0))
                if counted:
                    events = [e for e in profile.events() if e.name.startswith("c10d::")]
                    lines.append(f"{'sharded' if sharded else 'whole'}\t{name}\t{len(events)}")
    if rank == 0:
        Path(folder, "counts").write_text("\n".join(lines))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def collectives() -> list[dict[str, Any]]:
    """Collectives of one step of three tensors on two processes (gloo), the reduction of LCAM's loss included."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_count_collectives, (folder,), nprocs=2)
        lines = Path(folder, "counts").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return [{"tensors": kind, "candidate": name, "collectives": int(count)} for kind, name, count in rows]
