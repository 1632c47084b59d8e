# SPDX-License-Identifier: Apache-2.0
"""Time NSF and LCAM beside torch's own optimizers, side by side in one run.

    python examples/benchmark.py --output_dir out                              all parts, about 10 minutes on 2 cores
    python examples/benchmark.py --output_dir out --parts steps --dtypes bfloat16 --shapes minilm llama --device cuda

`steps`: an optimizer step on the tensors of a model: milliseconds, MiB at its peak beyond what was there before it, and
bytes of state a parameter. The candidates take turns, so that a change of the machine's load reaches all of them; times
are medians, ratios those of medians of one run. `first, s` is the first step of each, with what it compiles, or loads
from numba's and Triton's caches; with NUMBA_CACHE_DIR and TRITON_CACHE_DIR set to empty folders, all is compiled.
`training`: samples a second of stock Trainer runs, which take turns; the ratio is the median over rounds.
"""

import itertools
import math
import platform
import re
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from figures import make_parser, markdown, positive, write
from torch.utils.benchmark import timer  # waits for the GPU
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

from hf_nsf import LCAM, NSF


def minilm(hidden: int = 384) -> BertForSequenceClassification:
    """A new BERT with the architecture and, by default, the size of all-MiniLM-L6: 22.7M parameters in 103 tensors."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 4 * hidden}
    return BertForSequenceClassification(BertConfig(**sizes))


PARTS, DTYPES = ("steps", "training"), ("float32", "bfloat16", "float16")
SHAPES: dict[str, Callable[[], list[Any]]] = {
    "minilm": lambda: [q.shape for q in minilm().bert.parameters()],
    # One layer of an 8B Llama, 218M parameters.
    "llama": lambda: [(4096, 4096), (1024, 4096)] * 2 + [(14336, 4096)] * 3 + [(4096,)] * 2,
    "small": lambda: [(1000,)] * 1000,
    "tiny": lambda: [(64, 64), (64,), (300, 200)],
}
CANDIDATES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
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
TRAININGS = ("adamw_torch_fused", "nsf", "nsf grafting=none", "nsf foreach=true", "sgd", "lcam")  # optim and optim_args


def steps(name: str, dtype: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Time and memory of each candidate's step, all on the same parameters."""
    options = {"device": device, "dtype": getattr(torch, dtype)}
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, **options)) for shape in SHAPES[name]()]
    for q in params:
        q.grad = 1e-3 * torch.randn_like(q)
    # torch's fused SGD is not for low precision on a CPU.
    left_out = ("SGD fused", "LCAM fused") if device == "cpu" and dtype != "float32" else ()
    optimizers = {key: make(params) for key, make in CANDIDATES.items() if key not in left_out}
    seconds: dict[str, list[float]] = {key: [] for key in optimizers}
    for _ in range(1 + repeats):
        for key, optimizer in optimizers.items():
            begin = timer()
            optimizer.step()
            seconds[key].append(timer() - begin)
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    rows = []
    for key, optimizer in optimizers.items():
        row = {"optimizer": key, "ms": 1e3 * median[key]}
        row |= {f"/ {base}": median[key] / median[base] for base in ("AdamW fused", "AdamW foreach")}
        row["MiB beyond the state"] = peak_bytes(optimizer, device) / 2**20
        state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
        row["bytes of state a parameter"] = state / sum(q.numel() for q in params)
        rows.append({**row, "first, s": seconds[key][0]})
    return rows


def peak_bytes(optimizer: torch.optim.Optimizer, device: str) -> int:
    """What a step allocates through torch at its peak."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def training(device: str, rounds: int, updates: int = 12, batch: int = 32, hidden: int = 384) -> list[dict[str, Any]]:
    """Samples a second in a stock Trainer, a BERT of MiniLM's size on random tokens of length 64."""
    tokens = torch.randint(5, 1000, (batch * updates, 64), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    common = {"max_steps": updates, "per_device_train_batch_size": batch, "use_cpu": device == "cpu"}
    common |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    speeds: dict[str, list[float]] = {name: [] for name in TRAININGS}
    for index in range(rounds + 1):
        first = index % len(TRAININGS)
        for name in TRAININGS[first:] + TRAININGS[:first]:
            optim, _, options = name.partition(" ")
            with tempfile.TemporaryDirectory() as folder:
                args = TrainingArguments(folder, optim=optim, optim_args=options, **common)
                trainer = Trainer(minilm(hidden), args, train_dataset=data)
                trainer.remove_callback(PrinterCallback)
                metrics = trainer.train().metrics
            if index > 0:  # the first round warms up
                speeds[name].append(metrics["train_samples_per_second"])
    rows = []
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, speeds[TRAININGS[0]], strict=True)]
        error = statistics.stdev(ratios) / math.sqrt(rounds) if rounds > 1 else math.nan
        row = {"optim": name, "samples/s": statistics.median(values), "ratio": statistics.median(ratios)}
        rows.append({**row, "standard error": error})
    return rows


def machine(device: str) -> str:
    """What the figures hold for."""
    file = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    where = f"{cpu[1] if cpu else platform.machine()}, {torch.get_num_threads()} threads"
    versions = {package.name: package.version for package in distributions()}
    packages = [f"{name} {versions[name]}" for name in ("torch", "transformers", "numba", "triton") if name in versions]
    return ", ".join([torch.cuda.get_device_name() if device == "cuda" else where, *packages])


def main(args: list[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["minilm"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=positive, default=20, help="steps of each candidate (default: 20)")
    parser.add_argument("--rounds", type=positive, default=5, help="trainings of each optimizer (default: 5)")
    options = parser.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no such device")
    results = {}
    if "steps" in options.parts:
        for dtype, name in itertools.product(options.dtypes, options.shapes):
            results[f"Steps: {name}, {dtype}"] = steps(name, dtype, options.device, options.repeats)
    if "training" in options.parts:
        results["Training"] = training(options.device, options.rounds)
    where = machine(options.device)
    text = f"Measured on {where}.\n"
    for title, rows in results.items():
        text += f"\n{title}\n\n" + markdown([*rows[0]], *([*row.values()] for row in rows))
    write(options.output_dir, __file__, args, {"machine": where, "results": results}, text)


if __name__ == "__main__":
    main()
