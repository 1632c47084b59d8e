# SPDX-License-Identifier: Apache-2.0
r"""Time NSF and LCAM beside torch's own optimizers, in one run on the machine at hand.

    python examples/benchmark.py --output_dir out                                   all parts but `scaling`
    python examples/benchmark.py --output_dir out --parts steps                     4 minutes
    python examples/benchmark.py --output_dir out --parts steps --shapes vit wrn small matrix llama \
        --candidates "AdamW*" "SGD*" "LCAM*" "NSF p*" "NSF raw*"                     about 15 minutes
    python examples/benchmark.py --output_dir out --parts compile collectives       1 minute
    python examples/benchmark.py --output_dir out --parts training                  4 minutes
    python examples/benchmark.py --output_dir out --parts scaling                   about 10 minutes, up to about 16 GB

(on 2 cores). All is printed and written to benchmark.json, `steps` is drawn in benchmark.png, `scaling` in scaling.png.

`steps`: the time of an optimizer step on the tensors of a model, and its memory. The candidates are torch's AdamW and
SGD, LCAM and NSF, each by each of its paths (without one named: the path of no option), and others' where installed.
They take turns, in subsets whose states fit in some memory, each with fused AdamW and fused SGD; a ratio is that of
medians within a subset. `/foreach` is over AdamW's foreach path, by way of the fused one. `first` is the first step,
which makes the state; NSF's loops are compiled before. `bytes` are those for which the method goes over memory for each
parameter: reads of theta, g and the state, writes of theta and the state, and where NSF's direction must wait for its
length, 8 more. `floor` is the time that they take at the fastest speed seen, before or after the steps, in a copy, a
sum and a product in place, all large. It leaves out the directions that the last cache can hold, and counts what a copy
may read for ownership as moved, so that no step on tensors beyond the cache is faster; small tensors that stay in cache
from one step to the next can be. `syncs` are the host's (torch.cuda.set_sync_debug_mode), of a step and of what
LossPhase or PCycle do after it. On CUDA every time ends with a synchronisation.

`compile`: the seconds in which NSF's loops are made, for each step_scale in a new process, and the recompilations while
p cycles. `collectives`: of a step on two processes. `training`: samples a second in a stock Trainer, in many short
trainings in turns. `scaling`: the cost of a parameter over the size of a model and over the number of its tensors, for
a model of 10M parameters, whose 5,000 tensors are of 2,000 each, and one of 250M, more like a model that has so many.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_runs
import matplotlib
import torch
from torch import nn

import hf_nsf
from hf_nsf import LCAM, NSF, LossPhase, PCycle

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)

Shapes = list[tuple[int, ...]]
PARTS = ["steps", "compile", "collectives", "training", "scaling"]


def minilm() -> Shapes:
    """The 22.7M parameters of MiniLM-L6."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(
            BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        )
    return [tuple(p.shape) for p in model.parameters()]


def vit() -> Shapes:
    """ViT-B/16."""
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        return [tuple(p.shape) for p in ViTModel(ViTConfig()).parameters()]


def wrn() -> Shapes:
    """WRN-28-10 for 100 classes: batch normalisations are two vectors each."""
    shapes: Shapes = [(16, 3, 3, 3)]
    width = 16
    for out in (160, 320, 640):
        for block in range(4):
            shapes += [(width,), (width,), (out, width, 3, 3), (out,), (out,), (out, out, 3, 3)]
            if block == 0:
                shapes.append((out, width, 1, 1))
            width = out
    return [*shapes, (640,), (640,), (100, 640), (100,)]


def llama_slice() -> Shapes:
    """One layer of an 8B Llama."""
    return [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336), (4096,)] + [
        (4096,)
    ]


SHAPES: dict[str, Callable[[], Shapes]] = {
    "minilm": minilm,
    "vit": vit,
    "wrn": wrn,
    "small": lambda: [(1000,)] * 1000,
    "matrix": lambda: [(4096, 4096)],
    "llama": llama_slice,
    "tiny": lambda: [(64, 64), (64,), (300, 200)],
}

BASELINES = ("AdamW fused", "SGD fused")
TOTALS = (10**7, 25 * 10**7)  # parameters that `scaling` deals to more and more tensors
EXPONENTS = (0.5, 0.25, 0.1, 0.0, -0.25)
MEMORY = 8 << 30  # for states and what a step allocates, beyond parameters and gradients


class Candidate(NamedTuple):
    """How to make an optimizer, and the bytes for which its step goes over memory for each float32 parameter."""

    make: Callable[[Any], torch.optim.Optimizer]
    bytes: int
    waiting: int = 0  # of these, the directions' that are written and read again: a cache can hold them in between

    @property
    def state(self) -> int:
        """Bytes of state: what is left of reads and writes when those of theta and the read of g are taken off."""
        return (self.bytes - self.waiting - 12) // 2


def candidates(device: str = "cpu") -> dict[str, Candidate]:
    """Return the candidates of a device by name; what is not installed is left out."""
    found: dict[str, Candidate] = {}

    def add(name: str, kind: Any, moved: tuple[int, ...], **options: Any) -> None:
        found[name] = Candidate(lambda params: kind(params, lr=1e-4, **options), *moved)

    sgd, adam, grafted = (20,), (28,), (36, 8)
    loop, foreach, fused = {"foreach": False}, {"foreach": True}, {"fused": True}
    for path, option in (("fused", fused), ("foreach", foreach), ("loop", loop)):
        add(f"AdamW {path}", torch.optim.AdamW, adam, **option)
        add(f"SGD {path}", torch.optim.SGD, sgd, momentum=0.9, **option)
    for path, option in (("", {}), (" fused", fused), (" foreach", foreach), (" loop", loop)):
        add(f"LCAM{path}", LCAM, sgd, **option)
    paths: dict[str, dict[str, bool]] = {"": {}, " foreach": foreach, " loop": loop}
    if device == "cpu":
        paths[" blocked"] = {"fused": False}
        if benchmark_runs.make_loops():
            paths[" fused"] = fused
    for path, option in paths.items():
        for p in EXPONENTS:
            add(f"NSF{path} p={p}", NSF, adam if p == 0.5 else grafted, p=p, **option)
            add(f"NSF{path} raw p={p}", NSF, adam, p=p, step_scale="raw", **option)
    for name, package, kind in (("PAdam", "pytorch_optimizer", "PAdam"), ("optimi Adam", "optimi", "Adam")):
        try:
            add(name, getattr(importlib.import_module(package), kind), adam)
        except ImportError:
            pass
    return found


def subsets(
    names: Iterable[str], known: dict[str, Candidate], parameters: int, baselines: Sequence[str], memory: int = MEMORY
) -> list[list[str]]:
    """Deal the names, in order, to subsets that start with the baselines and fit in memory (or have one name more)."""
    # While it steps, a multi-tensor path holds up to two tensors of each parameter's size.
    room = memory - parameters * (8 + sum(known[name].state for name in baselines))
    dealt: list[list[str]] = [[]]
    left = room
    for name in (name for name in names if name not in baselines):
        size = parameters * known[name].state
        if size > left and dealt[-1]:
            dealt.append([])
            left = room
        dealt[-1].append(name)
        left -= size
    return [[*baselines, *some] for some in dealt]


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory_speeds(device: str, elements: int) -> dict[str, float]:
    """Bytes a second of large passes over memory, the best of several each; the fastest of them makes the floors.

    A CPU's copy may read each line of its target before it writes it (for ownership). These bytes are counted whether
    it does or not, so that the speed is rather too high and the floor rather too low.
    """
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    passes: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: target.copy_(source), 12 if device == "cpu" else 8),
        "sum": (lambda: source.sum(), 4),
        "product in place": (lambda: target.mul_(1.0), 8),
    }
    found = {}
    for name, (run, moved) in passes.items():
        seconds = []
        for _ in range(6):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds.append(time.perf_counter() - start)
        found[f"{name} ({moved} bytes an element)"] = moved * elements / min(seconds)
    return found


def cache_bytes(device: str) -> float:
    """Size of the last cache, infinite where it is not known (the floor is then the lower)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(file.read_text().strip().removesuffix("K")) for file in files), default=math.inf)


def least_bytes(candidate: Candidate, shapes: Shapes, cache: float) -> float:
    """Bytes that a step cannot do without: of each tensor's waiting directions only those beyond the cache."""
    held = sum(min(math.prod(shape), cache / 4) for shape in shapes)
    return candidate.bytes * sum(map(math.prod, shapes)) - candidate.waiting * held


def step_seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Time one step."""
    wait(device)
    start = time.perf_counter()
    optimizer.step()
    wait(device)
    return time.perf_counter() - start


def extra_memory(optimizer: torch.optim.Optimizer, device: str) -> int:
    """Peak of what a step holds beyond what was there before it, in bytes, its kept scratch included."""
    kept = sum(getattr(getattr(optimizer, name, None), "nbytes", 0) for name in ("_scratch", "_compiled"))
    if device == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        wait(device)
        return torch.cuda.max_memory_allocated() - before + kept
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    held = peak = 0
    for event in sorted(profile.events(), key=lambda e: e.time_range.start):
        if event.name == "[memory]":
            held += event.cpu_memory_usage if hasattr(event, "cpu_memory_usage") else event.self_cpu_memory_usage
            peak = max(peak, held)
    for event in profile.profiler.kineto_results.events() if peak == 0 else []:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + kept


def host_syncs(optimizer: torch.optim.Optimizer, device: str) -> int | None:
    """Count the synchronisations that torch sees in a step and what its control does after it; None on a CPU."""
    if device != "cuda":
        return None
    controls: list[Callable[[], None]] = []
    if isinstance(optimizer, NSF):
        p = optimizer.param_groups[0]["p"]
        controls = [PCycle(optimizer, p_min=p, p_max=p, cycle_steps=100).step]
    if isinstance(optimizer, LCAM):
        phase, loss = LossPhase(optimizer), torch.ones((), device=device)
        controls = [lambda: phase.step(loss)]
    wait(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for call in (optimizer.step, *controls):
                call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state."""
    tensors = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    return sum(x.nbytes for x in tensors)


def measure_subset(
    optimizers: dict[str, torch.optim.Optimizer], device: str, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Time the steps of optimizers in turns; what else is measured of each stands in the second dictionary."""
    first = {name: step_seconds(optimizer, device) for name, optimizer in optimizers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for index in range(repeats + 3):
        for name, optimizer in optimizers.items():
            taken = step_seconds(optimizer, device)
            if index >= 3:
                seconds[name].append(taken)
    facts = {
        name: {
            "first_step_ms": 1e3 * first[name],
            "state_bytes": state_bytes(optimizer),
            "extra_mib": extra_memory(optimizer, device) / 2**20,
            "host_syncs": host_syncs(optimizer, device),
        }
        for name, optimizer in optimizers.items()
    }
    gc.collect()  # the profiler's events lie between the states in memory, whose room could not be used again
    return seconds, facts


def measure(
    shapes: Shapes,
    names: Iterable[str],
    device: str,
    repeats: int,
    baselines: Sequence[str] = BASELINES,
    memory: int = MEMORY,
) -> list[dict[str, Any]]:
    """Measure the baselines and the named candidates on one list of shapes; they share parameters and gradients."""
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for q in params:
        q.grad = 1e-3 * torch.randn_like(q)
    total = sum(math.prod(shape) for shape in shapes)
    known = candidates(device)
    seconds: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for subset in subsets(names, known, total, baselines, memory):
        # Nothing else refers to the optimizers, so that their states go when the subset is done.
        taken, facts = measure_subset({name: known[name].make(params) for name in subset}, device, repeats)
        for name in subset:
            seconds.setdefault(name, []).extend(taken[name])
            ratios = {f"per {b}": statistics.median(taken[name]) / statistics.median(taken[b]) for b in baselines}
            rows.setdefault(name, {"candidate": name, **facts[name], **ratios})
    for name, row in rows.items():
        low, middle, high = statistics.quantiles(seconds[name], n=4, method="inclusive")
        row.update(
            ms=1e3 * middle,
            ms_quartiles=[1e3 * low, 1e3 * high],
            bytes_per_parameter=known[name].bytes,
            least_bytes=least_bytes(known[name], shapes, cache_bytes(device)),
            state_bytes_per_parameter=row.pop("state_bytes") / total,
        )
        if "AdamW foreach" in rows and "AdamW fused" in baselines:
            row["per AdamW foreach"] = row["per AdamW fused"] / rows["AdamW foreach"]["per AdamW fused"]
    return list(rows.values())


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as text."""
    lines = [title, f"{'candidate':24}{'ms':>9}{'quartiles':>18}{'bytes':>7}{'floor ms':>10}{'/AdamW fused':>14}"]
    lines[1] += f"{'/foreach':>10}{'/SGD fused':>12}{'first ms':>10}{'state B':>9}{'extra MiB':>11}{'syncs':>7}"
    for row in rows:
        low, high = row["ms_quartiles"]
        ratios = [row.get(f"per {other}") for other in ("AdamW fused", "AdamW foreach", "SGD fused")]
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        syncs = "-" if row["host_syncs"] is None else row["host_syncs"]
        lines.append(
            f"{row['candidate']:24}{row['ms']:9.2f}{f'{low:.2f}-{high:.2f}':>18}{row['bytes_per_parameter']:7}"
            f"{row['floor_ms']:10.2f}{shown[0]:>14}{shown[1]:>10}{shown[2]:>12}{row['first_step_ms']:10.1f}"
            f"{row['state_bytes_per_parameter']:9.1f}{row['extra_mib']:11.1f}{syncs:>7}"
        )
    return "\n".join(lines)


def scaling(device: str, repeats: int, most: int) -> dict[str, list[dict[str, Any]]]:
    """Time a parameter over the size of one model (100 tensors) and over the number of tensors (of two sizes)."""
    names = ["LCAM", "NSF p=0.5", "NSF p=0.1", "NSF raw p=0.1"]
    sizes = [n for n in (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 5 * 10**8) if n <= most]
    cases = {"parameters in 100 tensors": [(n, [(n // 100,)] * 100) for n in sizes]}
    for total in sorted({min(most, n) for n in TOTALS}):
        cases[f"tensors of {total:,} parameters"] = [(k, [(total // k,)] * k) for k in (10, 100, 1000, 5000)]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, some in cases.items():
        found[kind] = []
        for x, shapes in some:
            total = sum(math.prod(shape) for shape in shapes)
            for row in measure(shapes, names, device, repeats, ["AdamW fused"]):
                found[kind].append({"x": x, "candidate": row["candidate"], "ns_per_parameter": 1e6 * row["ms"] / total})
                print(f"{kind:32}{x:>11}  {row['candidate']:14}{found[kind][-1]['ns_per_parameter']:8.3f} ns/parameter")
    return found


def flatness(rows: list[dict[str, Any]], beyond: int = 0) -> dict[str, float]:
    """Largest over smallest cost of a parameter for each candidate, where x is at least `beyond`."""
    found = {}
    for name in dict.fromkeys(row["candidate"] for row in rows):
        costs = [row["ns_per_parameter"] for row in rows if row["candidate"] == name and row["x"] >= beyond]
        found[name] = max(costs) / min(costs)
    return found


def draw(path: Path, results: dict[str, list[dict[str, Any]]], scaled: bool) -> None:
    """Save the picture of the results."""
    height = 6 if scaled else max(6, 0.2 * max(map(len, results.values())))
    size = (6 * len(results), height)
    figure, axes = plt.subplots(1, len(results), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, rows) in zip(axes[0], results.items(), strict=True):
        if scaled:
            for name in dict.fromkeys(row["candidate"] for row in rows):
                points = [(row["x"], row["ns_per_parameter"]) for row in rows if row["candidate"] == name]
                axis.loglog(*zip(*points, strict=True), marker="o", label=name)
            axis.set(xlabel=title, ylabel="ns per parameter")
            axis.legend()
        else:
            axis.barh([row["candidate"] for row in rows], [row["ms"] for row in rows])
            axis.plot([row["floor_ms"] for row in rows], range(len(rows)), "k|", label="floor")
            axis.set(title=title, xlabel="ms a step (median)")
            axis.invert_yaxis()
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine(device: str) -> dict[str, Any]:
    """Say what the times were taken on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), name
        )
    facts = {"cpu": name, "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype())}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    facts |= {"python": platform.python_version(), "hf_nsf": hf_nsf.__version__, "torch": torch.__version__}
    for package in ("numpy", "numba", "transformers", "accelerate", "pytorch-optimizer", "torch-optimi"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return {**facts, "cache_mib": cache_bytes(device) / 2**20}


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, measure, print and write benchmark.json and benchmark.png."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler says of each use that it starts and stops
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of benchmark.json and benchmark.png.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm"], help="Models to measure.")
    parser.add_argument("--candidates", nargs="+", default=["*"], help='Names or patterns such as "NSF raw*".')
    parser.add_argument("--repeats", type=int, default=20, help="Timed steps of each candidate, at least 2.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="What to measure.")
    parser.add_argument("--most_parameters", type=int, default=5 * 10**8, help="Bound of the part `scaling`.")
    parser.add_argument("--rounds", type=int, default=12, help="Trainings of each optimizer in the part `training`.")
    parser.add_argument("--updates", type=int, default=5, help="Updates of each of them; the first is not timed.")
    parser.add_argument("--quick", action="store_true", help="Tiny shapes and few steps: does it run at all?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.repeats, options.most_parameters, options.rounds = ["tiny"], 2, 10**6, 2
    for name, least, why in (
        ("repeats", 2, "for quartiles"),
        ("rounds", 2, "for quartiles"),
        ("updates", 2, "since the first is not timed"),
        ("most_parameters", 10**6, "the smallest size"),
    ):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: at least {least} are needed, {why}.")
    known = list(candidates(options.device))
    for pattern in options.candidates:
        if not any(fnmatchcase(name, pattern) for name in known):
            parser.error(f"--candidates {pattern!r}: none matches; there are {', '.join(known)}.")
    chosen = [name for name in known if any(fnmatchcase(name, pattern) for pattern in options.candidates)]
    torch.manual_seed(0)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {**machine(options.device), "repeats": options.repeats}
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    found: dict[str, Any] = {"machine": facts}
    if "steps" in options.parts:
        found["results"] = {}
        elements = 10**6 if options.quick else 5 * 10**7
        for name in options.shapes:
            shapes = SHAPES[name]()
            title = f"{name}: {sum(map(math.prod, shapes)) / 1e6:.1f}M parameters in {len(shapes)} tensors"
            before = memory_speeds(options.device, elements)
            rows = measure(shapes, chosen, options.device, options.repeats)
            after = memory_speeds(options.device, elements)
            speeds = {key: max(before[key], after[key]) for key in before}
            for row in rows:
                row["floor_ms"] = 1e3 * row["least_bytes"] / max(speeds.values())
            found["results"][title] = rows
            found.setdefault("memory_gb_per_s", {})[title] = {key: x / 1e9 for key, x in speeds.items()}
            print(table(title, rows))
            print("memory, GB/s: " + ", ".join(f"{key} {x / 1e9:.1f}" for key, x in speeds.items()))
        draw(options.output_dir / "benchmark.png", found["results"], scaled=False)
    if "compile" in options.parts:
        found["compile_s"] = benchmark_runs.compile_seconds()
        found["recompilations"] = benchmark_runs.recompilations()
        for scale, row in found["compile_s"].items():
            shown = ", ".join(f"{key} {'-' if x is None else f'{x:.1f}'}" for key, x in row.items())
            print(f"seconds to make NSF's loops in a new process (numba's import included), {scale}: {shown}")
        print(f"recompilations while p cycles: {found['recompilations']}")
    if "collectives" in options.parts:
        found["collectives"] = benchmark_runs.collectives()
        for row in found["collectives"]:
            print(f"collectives of a step, {row['tensors']:8}{row['candidate']:18}{row['collectives']:3}")
    if "training" in options.parts:
        sizes = {"model_size": (64, 1), "batch": 4, "length": 16} if options.quick else {}
        found["training"] = benchmark_runs.training(options.rounds, options.updates, options.device, **sizes)
        for row in found["training"]:
            low, high = row["ratio_quartiles"]
            print(
                f"whole training, {row['optim']:18}{row['samples_per_s']:9.2f} samples/s, {row['ratio']:.3f} +- "
                f"{row['ratio_error']:.3f} of adamw_torch_fused (quartiles {low:.3f}-{high:.3f}; "
                f"{options.rounds} trainings of {row['timed_updates']} timed updates)"
            )
    if "scaling" in options.parts:
        found["scaling"] = scaling(options.device, options.repeats, options.most_parameters)
        out_of_cache = min(10**7, max(row["x"] for row in next(iter(found["scaling"].values()))))
        found["flatness"] = {}
        for kind, rows in found["scaling"].items():
            beyond = out_of_cache if kind.startswith("parameters") else 0
            flat = found["flatness"][kind] = flatness(rows, beyond)
            print(
                f"flatness, largest / smallest cost over {kind}{f' (from {beyond:,} on)' if beyond else ''}: "
                + ", ".join(f"{name} {x:.2f}" for name, x in flat.items())
            )
        draw(options.output_dir / "scaling.png", found["scaling"], scaled=True)
    (options.output_dir / "benchmark.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
