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
    rounds: int, updates: int, device: str, model_size: tuple[int, int] = (384, 6), batch: int = 32, length: int = 64
) -> list[dict[str, Any]]:
    """Short trainings in a stock Trainer, in turns: samples a second of each optimizer.

    A round is a training with each optimizer, in an order that rotates, and gives one ratio to adamw_torch_fused: the
    two were measured within seconds of each other, so that slower changes of the machine's load fall out. One round
    before warms up and is not counted.

    Args:
        rounds: how often each optimizer trains anew.
        updates: of one training; the first is not counted.
        device: "cpu" or "cuda".
        model_size: hidden size and layers.
        batch: samples of an update.
        length: tokens of a sample.

    Returns:
        For each optimizer its median samples a second, and of its ratios median, quartiles and standard error: 0.93
        times the distance of the quartiles over the root of the rounds, as for a median of normal values.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (batch * updates, length), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    speeds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for index in range(rounds + 1):
        first = index % len(OPTIMIZERS)
        for name in OPTIMIZERS[first:] + OPTIMIZERS[:first]:
            seconds = _train(name, data, updates, batch, device, bert(*model_size))
            if index > 0:
                speeds[name].append(batch * (updates - 1) / seconds)
    rows = []
    for name, some in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(some, speeds[OPTIMIZERS[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            {
                "optim": name,
                "samples_per_s": statistics.median(some),
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "ratio_error": 0.93 * (high - low) / rounds**0.5,
                "ratios": ratios,
                "timed_updates": updates - 1,
            }
        )
    return rows


def _train(name: str, data: list[Any], updates: int, batch: int, device: str, model: nn.Module) -> float:
    """Seconds from the end of the first update of a training to the end of its last."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            optim=name,
            # The default cycle, but with one period: all timed updates have other p's than its end, 1/2.
            optim_args=f"cycle_steps={updates}" if name == "nsf" else None,
            max_steps=updates,
            per_device_train_batch_size=batch,
            learning_rate=1e-4,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.ends[-1] - clock.ends[0]


def make_loops() -> bool:
    """Compile NSF's loops in this process, once; False where that cannot be."""
    loops = nsf.compiled_loops()
    return loops is not None and all(loops.is_ready(scale) for scale in nsf.STEP_SCALES)


def compile_seconds() -> dict[str, dict[str, float | None]]:
    """Seconds in which NSF's loops of each step_scale are made in a new process; None where they cannot be."""
    code = (
        "import sys, time, hf_nsf.optim.nsf as nsf\n"
        "start = time.perf_counter()\n"
        "loops = nsf.compiled_loops()\n"
        "made = loops is not None and loops.is_ready(sys.argv[1])\n"
        "print(time.perf_counter() - start if made else 'none')"
    )
    found: dict[str, dict[str, float | None]] = {}
    for scale in nsf.STEP_SCALES:
        found[scale] = {}
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(Path(hf_nsf.__file__).parents[1])}
            for name in ("without numba's cache", "with it"):
                done = subprocess.run(
                    [sys.executable, "-c", code, scale], env=environment, capture_output=True, text=True, check=True
                )
                answer = done.stdout.split()[-1]
                found[scale][name] = None if answer == "none" else float(answer)
    return found


def recompilations() -> int | None:
    """What numba compiles while p runs through a cycle, after NSF's loops were made; None without numba."""
    if not make_loops():
        return None
    loops = nsf.compiled_loops()
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
