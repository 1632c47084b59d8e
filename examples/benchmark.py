# SPDX-License-Identifier: Apache-2.0
r"""Time NSF and LCAM beside torch's own optimizers, side by side in one run.

    python examples/benchmark.py --output_dir out                              all parts, about 10 minutes on 2 cores
    python examples/benchmark.py --output_dir out --parts steps --dtypes float32 bfloat16 --shapes minilm llama
    python examples/benchmark.py --output_dir out --parts training --device cuda

Prints Markdown tables and writes them, with all figures, to benchmark.json and benchmark.md.

`steps`: milliseconds of an optimizer step on the tensors of a model. The candidates take turns, so that a change of the
machine's load reaches all of them; figures are medians, ratios are those of medians of one run. On a GPU, CUDA events
take the time; on a CPU, a clock. `first` is the first step, with what it compiles or loads.
`memory`: MiB that a step holds at its peak beyond what was there before it, and bytes of state a parameter.
`first_step`: seconds of the first step in a new process, with empty caches of compiled kernels and with filled ones.
`training`: samples a second of stock Trainer runs, which take turns; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_nsf import LCAM, NSF

Shapes = list[tuple[int, ...]]
PARTS = ("steps", "memory", "first_step", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def minilm() -> Shapes:
    """all-MiniLM-L6: 22.7M parameters in 101 tensors."""
    hidden, inner = 384, 1536
    shapes: Shapes = [(30522, hidden), (512, hidden), (2, hidden), (hidden,), (hidden,), (hidden, hidden), (hidden,)]
    layer: Shapes = [*[(hidden, hidden), (hidden,)] * 4, (hidden,), (hidden,), (inner, hidden), (inner,)]
    return shapes + 6 * [*layer, (hidden, inner), (hidden,), (hidden,), (hidden,)]


def llama_layer() -> Shapes:
    """One layer of an 8B Llama: 218M parameters."""
    attention: Shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    return [*attention, (14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,)]


SHAPES: dict[str, Callable[[], Shapes]] = {
    "minilm": minilm,
    "llama": llama_layer,
    "small": lambda: [(1000,)] * 1000,
    "tiny": lambda: [(64, 64), (64,), (300, 200)],
}
Maker = Callable[[Any], torch.optim.Optimizer]
CANDIDATES: dict[str, Maker] = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, momentum=0.9, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, momentum=0.9),
    "LCAM": lambda params: LCAM(params),
    "LCAM fused": lambda params: LCAM(params, fused=True),
    "NSF p=1/2": lambda params: NSF(params, p=0.5),
    "NSF p=0.1": lambda params: NSF(params, p=0.1),
    "NSF p=-1/4": lambda params: NSF(params, p=-0.25),
    "NSF none p=0.1": lambda params: NSF(params, p=0.1, grafting="none"),
    "NSF eager p=0.1": lambda params: NSF(params, p=0.1, foreach=True),
    "NSF eager none p=0.1": lambda params: NSF(params, p=0.1, foreach=True, grafting="none"),
    "NSF reference p=0.1": lambda params: NSF(params, p=0.1, foreach=False, fused=False),
}
BASELINES = ("AdamW fused", "AdamW foreach", "SGD fused")


def make_params(shapes: Shapes, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Parameters of a model, with gradients."""
    params = [nn.Parameter((0.02 * torch.randn(shape, device=device)).to(dtype)) for shape in shapes]
    for q in params:
        q.grad = (1e-3 * torch.randn(q.shape, device=device)).to(dtype)
    return params


def step_seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Time one step."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begin


def works(name: str, dtype: torch.dtype, device: str) -> bool:
    """Whether a candidate is right for a dtype: torch's fused SGD on a CPU is not for low precision."""
    return not (name in ("SGD fused", "LCAM fused") and device == "cpu" and dtype in (torch.bfloat16, torch.float16))


def steps(name: str, dtype: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each candidate's step, taken in turns on the same parameters, and its ratios."""
    params = make_params(SHAPES[name](), DTYPES[dtype], device)
    optimizers = {key: make(params) for key, make in CANDIDATES.items() if works(key, DTYPES[dtype], device)}
    first = {key: step_seconds(optimizer, device) for key, optimizer in optimizers.items()}
    seconds: dict[str, list[float]] = {key: [] for key in optimizers}
    for _ in range(repeats):
        for key, optimizer in optimizers.items():
            seconds[key].append(step_seconds(optimizer, device))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    rows = []
    for key, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {"optimizer": key, "ms": 1e3 * median[key], "quartiles": f"{1e3 * low:.1f} to {1e3 * high:.1f}"}
        row.update({f"/ {b}": median[key] / median[b] for b in BASELINES if b in median})
        rows.append({**row, "first, s": first[key]})
    return rows


def memory(name: str, dtype: str, device: str) -> list[dict[str, Any]]:
    """MiB at the peak of a step, and bytes of state a parameter."""
    params, rows = make_params(SHAPES[name](), DTYPES[dtype], device), []
    total = sum(q.numel() for q in params)
    for key, make in CANDIDATES.items():
        if works(key, DTYPES[dtype], device):
            optimizer = make(params)
            optimizer.step()
            state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
            rows.append({"optimizer": key, "MiB": peak_bytes(optimizer, device) / 2**20, "state": state / total})
    return rows


def peak_bytes(optimizer: torch.optim.Optimizer, device: str) -> int:
    """What a step allocates through torch at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


_FIRST = """
import json, sys, time, torch
from hf_nsf import NSF
device, dtype, options = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
q = torch.nn.Parameter(torch.ones(1000, device=device, dtype=dtype))
q.grad = torch.ones_like(q)
begin = time.perf_counter()
NSF([q], p=0.1, **options).step()
if device == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def first_step(dtypes: list[str], device: str) -> list[dict[str, Any]]:
    """Seconds of NSF's first step in a new process, without and with the compiled kernels in their cache."""
    rows = []
    for dtype in dtypes:
        for options in ("{}", '{"grafting": "none"}', '{"foreach": true}'):
            with tempfile.TemporaryDirectory() as cache:
                env = {**os.environ, "NUMBA_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
                command = [sys.executable, "-c", _FIRST, device, dtype, options]
                runs = [subprocess.run(command, env=env, check=True, capture_output=True, text=True) for _ in "ab"]
            cold, warm = (float(run.stdout.split()[-1]) for run in runs)
            rows.append({"dtype": dtype, "options": options, "cold, s": cold, "cached, s": warm})
    return rows


TRAININGS = (("adamw_torch_fused", None), ("nsf", None), ("nsf", "grafting=none"), ("sgd", None), ("lcam", None))


def training(device: str, rounds: int, updates: int = 12, batch: int = 32, hidden: int = 384) -> list[dict[str, Any]]:
    """Samples a second in a stock Trainer, a BERT of MiniLM's size on random tokens of length 64."""
    from transformers import BertConfig, BertForSequenceClassification

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (batch * updates, 64), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    sizes = {"hidden_size": hidden, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 4 * hidden}
    speeds: dict[Any, list[float]] = {key: [] for key in TRAININGS}
    for index in range(rounds + 1):
        first = index % len(TRAININGS)
        for key in TRAININGS[first:] + TRAININGS[:first]:
            model = BertForSequenceClassification(BertConfig(**sizes))
            seconds = train(model, data, key, device, updates, batch)
            if index > 0:  # the first round warms up
                speeds[key].append(batch * (updates - 1) / seconds)
    rows = []
    for (name, args), values in speeds.items():
        ratios = [value / base for value, base in zip(values, speeds[TRAININGS[0]], strict=True)]
        error = statistics.stdev(ratios) / math.sqrt(rounds) if rounds > 1 else math.nan
        label = f"{name} {args or ''}".strip()
        rows.append({"optim": label, "samples/s": statistics.median(values), "ratio": statistics.median(ratios)})
        rows[-1]["standard error"] = error
    return rows


def train(model: Any, data: Any, optim: tuple[str, str | None], device: str, updates: int, batch: int) -> float:
    """Seconds from the end of the first update of a run to the end of its last."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            optim=optim[0],
            optim_args=optim[1],
            max_steps=updates,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device != "cpu",
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return ends[-1] - ends[0]


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Lay out rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return f"\n{title}\n\n" + "\n".join(lines) + "\n"


def machine(device: str) -> str:
    """What the figures hold for."""
    processor = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.machine())
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor}, {torch.get_num_threads()} threads"
    versions = []
    for package in ("torch", "transformers", "numba", "triton"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"{where}; {', '.join(versions)}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["minilm"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20, help="Steps of each candidate.")
    parser.add_argument("--rounds", type=int, default=5, help="Trainings of each optimizer.")
    options = parser.parse_args(arguments)
    device, results = options.device, {}
    for dtype in options.dtypes:
        for name in options.shapes:
            if "steps" in options.parts:
                results[f"Steps: {name}, {dtype}"] = steps(name, dtype, device, options.repeats)
            if "memory" in options.parts:
                results[f"Memory: {name}, {dtype}"] = memory(name, dtype, device)
    if "first_step" in options.parts:
        results["First step"] = first_step(options.dtypes, device)
    if "training" in options.parts:
        results["Training"] = training(device, options.rounds)
    text = f"Measured on {machine(device)}.\n" + "".join(table(title, rows) for title, rows in results.items())
    print(text)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "benchmark.md").write_text(text, encoding="utf-8")
    saved = {"machine": machine(device), "results": results}
    (options.output_dir / "benchmark.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
