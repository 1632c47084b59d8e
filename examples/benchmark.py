# SPDX-License-Identifier: Apache-2.0
"""Time the step of NSF and LCAM beside torch's own optimizers, in one run on the machine at hand.

    python examples/benchmark.py --output_dir out
    python examples/benchmark.py --output_dir out --parts steps --shapes minilm vit wrn small matrix llama --repeats 50
    python examples/benchmark.py --output_dir out --parts scaling

The parts are `steps` (the table of times), `compile` (seconds, and recompilations while p cycles), `collectives` (of a
step on two processes), `training` (samples a second in a stock Trainer) and `scaling` (cost of a parameter over sizes).
Candidates alternate, so that a change in the machine's load meets all of them; medians and quartiles are of the
repetitions after the warm-up. `floor` is the time in which the bytes that a method must move take at the speed of a
large copy measured in the same run (a method that reads its tensors from cache can be below it). On CUDA every time
ends with a synchronisation, and host syncs are counted with torch.cuda.set_sync_debug_mode.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_runs
import matplotlib
import torch
from torch import nn

from hf_nsf import LCAM, NSF

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

# Bytes moved per float32 parameter at the least: reads of theta, g and the state, writes of theta and the state.
_SGD, _ADAM, _GRAFTED = 20, 28, 36


def candidates() -> dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int]]:
    """Return name -> (maker, bytes a parameter); what is not installed is left out."""
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    found: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int]] = {}
    for path in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        name = "loop" if path == {"foreach": False} else next(iter(path))
        found[f"AdamW {name}"] = (lambda q, k=path: adamw(q, lr=1e-4, **k), _ADAM)
        found[f"SGD {name}"] = (lambda q, k=path: sgd(q, lr=1e-4, momentum=0.9, **k), _SGD)
        if name != "loop":
            found[f"LCAM {name}"] = (lambda q, k=path: LCAM(q, lr=1e-4, **k), _SGD)
    found["LCAM"] = (lambda q: LCAM(q, lr=1e-4), _SGD)
    for p in (0.5, 0.25, 0.0, -0.25, 0.1):
        least = _ADAM if p == 0.5 else _GRAFTED
        found[f"NSF p={p}"] = (lambda q, p=p: NSF(q, lr=1e-4, p=p), least)
    for p in (0.5, 0.25, 0.1):
        found[f"NSF raw p={p}"] = (lambda q, p=p: NSF(q, lr=1e-4, p=p, step_scale="raw"), _ADAM)
    for name, foreach in (("loop", False), ("foreach", True)):
        found[f"NSF {name} p=0.1"] = (lambda q, f=foreach: NSF(q, lr=1e-4, p=0.1, foreach=f), _GRAFTED)
    try:
        from pytorch_optimizer import PAdam

        found["PAdam"] = (lambda q: PAdam(q, lr=1e-4), _ADAM)
    except ImportError:
        pass
    try:
        from optimi import Adam

        found["optimi Adam"] = (lambda q: Adam(q, lr=1e-4), _ADAM)
    except ImportError:
        pass
    return found


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_speed(device: str, elements: int) -> float:
    """Bytes a second of a large copy, reads and writes counted; the best of several."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 8 * elements / min(seconds)


def step_seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Time one step."""
    wait(device)
    start = time.perf_counter()
    optimizer.step()
    wait(device)
    return time.perf_counter() - start


def extra_memory(optimizer: torch.optim.Optimizer, device: str) -> int:
    """Peak of what a step holds beyond what was there before it, in bytes, its kept scratch included."""
    kept = sum(x.nbytes for x in getattr(getattr(optimizer, "_scratch", None), "_held", {}).values())
    kept += getattr(getattr(optimizer, "_compiled", None), "nbytes", 0)
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
    """Count the synchronisations that torch sees in a step; None where there is nothing to count."""
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def state_bytes(optimizer: torch.optim.Optimizer, parameters: int) -> float:
    """Bytes of state for each parameter."""
    tensors = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    return sum(x.nbytes for x in tensors) / parameters


def measure(shapes: Shapes, names: list[str], device: str, repeats: int, speed: float) -> list[dict[str, Any]]:
    """Measure the named candidates on one list of shapes, in turns; they share parameters and gradients."""
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for q in params:
        q.grad = 1e-3 * torch.randn_like(q)
    total = sum(math.prod(shape) for shape in shapes)
    known = candidates()
    optimizers = {name: known[name][0](params) for name in names}
    first = {name: step_seconds(optimizer, device) for name, optimizer in optimizers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats + 3):
        for name, optimizer in optimizers.items():
            taken = step_seconds(optimizer, device)
            if index >= 3:
                seconds[name].append(taken)
    rows = []
    for name, optimizer in optimizers.items():
        low, middle, high = statistics.quantiles(seconds[name], n=4)
        rows.append(
            {
                "candidate": name,
                "ms": 1e3 * middle,
                "ms_quartiles": [1e3 * low, 1e3 * high],
                "floor_ms": 1e3 * known[name][1] * total / speed,
                "bytes_per_parameter": known[name][1],
                "first_step_ms": 1e3 * first[name],
                "state_bytes_per_parameter": state_bytes(optimizer, total),
                "extra_mib": extra_memory(optimizer, device) / 2**20,
                "host_syncs": host_syncs(optimizer, device),
            }
        )
    medians = {row["candidate"]: row["ms"] for row in rows}
    for row in rows:
        for other in ("AdamW fused", "AdamW foreach", "SGD fused"):
            row[f"per {other}"] = row["ms"] / medians[other] if other in medians else None
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as text."""
    lines = [title, f"{'candidate':18}{'ms':>9}{'quartiles':>18}{'floor':>8}{'/AdamW fused':>14}{'/foreach':>10}"]
    lines[1] += f"{'/SGD fused':>12}{'first ms':>10}{'state B':>9}{'extra MiB':>11}{'syncs':>7}"
    for row in rows:
        low, high = row["ms_quartiles"]
        ratios = [row[f"per {other}"] for other in ("AdamW fused", "AdamW foreach", "SGD fused")]
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        syncs = "-" if row["host_syncs"] is None else row["host_syncs"]
        lines.append(
            f"{row['candidate']:18}{row['ms']:9.2f}{f'{low:.2f}-{high:.2f}':>18}{row['floor_ms']:8.2f}{shown[0]:>14}"
            f"{shown[1]:>10}{shown[2]:>12}{row['first_step_ms']:10.1f}{row['state_bytes_per_parameter']:9.1f}"
            f"{row['extra_mib']:11.1f}{syncs:>7}"
        )
    return "\n".join(lines)


def scaling(device: str, repeats: int, most: int, speed: float) -> dict[str, list[dict[str, Any]]]:
    """Time a parameter over the size of one model (100 tensors) and over the number of tensors (10M parameters)."""
    names = ["AdamW fused", "NSF p=0.5", "NSF p=0.1"]
    sizes = [n for n in (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 5 * 10**8) if n <= most]
    cases = {"parameters": [(n, [(n // 100,)] * 100) for n in sizes]}
    cases["tensors"] = [(k, [(min(most, 10**7) // k,)] * k) for k in (10, 100, 1000, 5000)]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, some in cases.items():
        found[kind] = []
        for x, shapes in some:
            total = sum(math.prod(shape) for shape in shapes)
            for row in measure(shapes, names, device, repeats, speed):
                found[kind].append({"x": x, "candidate": row["candidate"], "ns_per_parameter": 1e6 * row["ms"] / total})
                print(f"{kind:11}{x:>11}  {row['candidate']:14}{found[kind][-1]['ns_per_parameter']:8.3f} ns/parameter")
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
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 6), layout="constrained", squeeze=False)
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
    facts = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": "float32"}
    return {
        **facts,
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, measure, print and write benchmark.json and benchmark.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of benchmark.json and benchmark.png.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm"], help="Models to measure.")
    parser.add_argument("--candidates", nargs="+", choices=candidates(), help="Default: all.")
    parser.add_argument("--repeats", type=int, default=20, help="Timed steps of each candidate, at least 2.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="What to measure.")
    parser.add_argument("--most_parameters", type=int, default=5 * 10**8, help="Bound of the part `scaling`.")
    parser.add_argument("--rounds", type=int, default=4, help="Trainings of each optimizer in the part `training`.")
    parser.add_argument("--quick", action="store_true", help="Tiny shapes and few steps: does it run at all?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.repeats, options.most_parameters, options.rounds = ["tiny"], 2, 10**6, 1
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: at least 2 are needed for quartiles.")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1 is needed.")
    torch.manual_seed(0)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    speed = copy_speed(options.device, 10**6 if options.quick else 5 * 10**7)
    facts = {**machine(options.device), "copy_gb_per_s": speed / 1e9, "repeats": options.repeats}
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    found: dict[str, Any] = {"machine": facts}
    if "steps" in options.parts:
        found["results"] = {}
        for name in options.shapes:
            shapes = SHAPES[name]()
            title = f"{name}: {sum(map(math.prod, shapes)) / 1e6:.1f}M parameters in {len(shapes)} tensors"
            chosen = options.candidates or list(candidates())
            found["results"][title] = measure(shapes, chosen, options.device, options.repeats, speed)
            print(table(title, found["results"][title]))
        draw(options.output_dir / "benchmark.png", found["results"], scaled=False)
    if "compile" in options.parts:
        found["compile_s"] = benchmark_runs.compile_seconds()
        found["recompilations"] = benchmark_runs.recompilations()
        shown = ", ".join(f"{key}: {'-' if x is None else f'{x:.1f}'}" for key, x in found["compile_s"].items())
        print(f"NSF's loops, seconds to make them: {shown}; recompilations while p cycles: {found['recompilations']}")
    if "collectives" in options.parts:
        found["collectives"] = benchmark_runs.collectives()
        for row in found["collectives"]:
            print(f"collectives of a step, {row['tensors']:8}{row['candidate']:18}{row['collectives']:3}")
    if "training" in options.parts:
        sizes = {"model_size": (64, 1), "batch": 4, "length": 16} if options.quick else {}
        found["training"] = benchmark_runs.training(options.rounds, 5 if options.quick else 6, options.device, **sizes)
        for row in found["training"]:
            low, high = row["quartiles"]
            print(
                f"whole training, {row['optim']:18}{row['samples_per_s']:9.2f} samples/s ({low:.2f}-{high:.2f}, "
                f"{row['updates']} updates), {row['ratio']:.3f} of adamw_torch_fused"
            )
    if "scaling" in options.parts:
        found["scaling"] = scaling(options.device, options.repeats, options.most_parameters, speed)
        out_of_cache = 0 if options.quick else 10**7
        found["flatness"] = {"parameters": flatness(found["scaling"]["parameters"], out_of_cache)}
        found["flatness"]["tensors"] = flatness(found["scaling"]["tensors"])
        for kind, some in found["flatness"].items():
            print(f"largest / smallest over {kind}: " + ", ".join(f"{name} {x:.2f}" for name, x in some.items()))
        draw(options.output_dir / "scaling.png", found["scaling"], scaled=True)
    (options.output_dir / "benchmark.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
