# SPDX-License-Identifier: Apache-2.0
"""Is it the direction or the length? Both methods' steps taken apart: one picture, under 10 minutes on 2 cores.

    python examples/direction_and_length.py --output_dir out      # topics of docstrings, a small network
    python examples/direction_and_length.py --output_dir out --train_file train.parquet --test_file test.parquet \
        --epochs 16 --nsf_rates 0.003 0.01 --lcam_rates 0.03 0.1 --bf16     # images, such as CIFAR-10

A step is a direction times a length. Of a tensor, a = m / (sqrt(v) + eps) is Adam's step and r = m / (v^p + eps) that
of NSF's paper (arXiv 2509.04713). So there are four methods: AdamW has direction and length of a, the paper's formula
those of r; one has a's direction with r's length, and one r's direction with a's length, as grafting="adam" has.

Momentum is undamped, so the momentum mu of LCAM (arXiv 2309.02130) changes both the memory of a step and its length, by
1 / c with c = (1 - mu) / 0.1. SGD 0.9 with its rate divided by c has the length alone, LCAM with its rate multiplied by
c the memory alone; SGD 0.9 with its rate doubled at random has such lengths, but they do not depend on the loss.

Rates are constant but for two schedules beside AdamW. Accuracies are means over the last epochs, on test data; rates
are chosen on validation data; differences are paired by seed. Rerun the command to resume: each training is a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from classification import DataTrainingArguments, one_sentence
from embedded_data import SPLITS
from figures import command, markdown, over_seeds, subplots, write
from image_classification import ModelArguments, build_model, prepare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from what_p_does import load_bags

from hf_nsf import LCAM, LossPhase, p_schedule

Data = dict[str, tuple[np.ndarray, np.ndarray]]
KEYS = ("family", "variant", "role", "rate", "seed")  # of a training
NAMES = {
    "nsf": {
        "base": "AdamW",
        "both": "the paper's formula",
        "length": "Adam's direction, NSF's length",
        "direction": "NSF's direction, Adam's length",
        "cyclic": "AdamW, cyclic rate",
        "cosine": "AdamW, cosine schedule",
    },
    "lcam": {
        "base": "SGD 0.9",
        "both": "LCAM",
        "length": "SGD 0.9, LCAM's step length",
        "direction": "LCAM, step length of SGD 0.9",
        "random": "SGD 0.9, rate doubled at random",
        "0.95": "SGD 0.95",
    },
}
# Of the six, in order: one colour for each in all panels; dashes show what lies below.
STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "linewidth": 2},
    {"color": "#D55E00", "linewidth": 4, "alpha": 0.6},
    {"color": "#0072B2", "linewidth": 2, "linestyle": (0, (4, 2))},
    {"color": "#009E73", "linewidth": 2},
    {"color": "#CC79A7", "linewidth": 1.5, "linestyle": ":"},
    {"color": "#888888", "linewidth": 1.5, "linestyle": "-."},
]
VARIED = ("both", "length", "direction")  # of each variant: an end of p's cycle, or a pair of momenta (low, high)
PAIRS = [(0.9, 0.95), (0.95, 0.9)]
CYCLES = 3.5  # of p and of the cyclic rate: both end at their lowest
LAST = {"nsf": 2, "lcam": 4}  # epochs of the final mean. p falls to its end in two of 16; SGD swings between epochs
BATCH, IMAGE_SIZE, TRAIN_IMAGES, TEST_IMAGES, WORDS = 64, 24, 5000, 2000, 2000


class DirectionAndLength(torch.optim.Optimizer):
    """Steps in the direction of one formula with the length of another ("adam" or "nsf"), tensor by tensor."""

    def __init__(self, params: Any, lr: float, exponents: list[float], direction: str, length: str) -> None:
        """`exponents` holds p of each step."""
        super().__init__(params, {"lr": lr})
        self.exponents, self.direction, self.length = exponents, direction, length

    @torch.no_grad()
    def step(self, closure: None = None, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        """Update every parameter."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                p = self.exponents[state["step"]]
                state["step"] += 1
                m = state["exp_avg"].lerp_(param.grad, 1 - beta1) / (1 - beta1 ** state["step"])
                v = state["exp_avg_sq"].lerp_(param.grad.square(), 1 - beta2) / (1 - beta2 ** state["step"])
                steps = {"adam": m / (v.sqrt() + eps), "nsf": m / (v**p + eps)}
                step = steps[self.direction]
                if self.length != self.direction:
                    step = step * (steps[self.length].norm() / step.norm().clamp(min=1e-30))  # 0 where all is 0
                param.sub_(step * group["lr"])


def load_data(train_file: str | None, test_file: str | None) -> Data:
    """Load inputs and labels of each split: images as bytes, or which of the commonest words a docstring has."""
    if train_file is None:
        bags = dict(zip(SPLITS, load_bags(), strict=True))
        common = np.sort(np.argsort(-np.asarray(bags["train"][0].sum(0))[0], kind="stable")[:WORDS])
        return {name: (x[:, common].toarray().astype(np.uint8), y) for name, (x, y) in bags.items()}
    sizes = {"max_train_samples": TRAIN_IMAGES, "max_eval_samples": TEST_IMAGES}
    arguments = DataTrainingArguments(train_file=train_file, test_file=test_file, **sizes)
    with one_sentence():
        images, _, _ = prepare(ModelArguments(image_size=IMAGE_SIZE), arguments)
    return {name: (split.images.numpy(), split.labels.numpy()) for name, split in images.items()}


def build(inputs: np.ndarray, classes: int) -> nn.Module:
    """Make a network for images, or for bags of words."""
    if inputs.ndim == 4:
        resnet = build_model(ModelArguments(architecture="wrn-10-1"), [str(label) for label in range(classes)])
        return nn.Sequential(resnet.body, resnet.head).to(memory_format=torch.channels_last)
    layers = [nn.Dropout(0.5), nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def train(
    family: str, variant: Any, role: str, rate: float, seed: int, epochs: int, bf16: bool, data: Data
) -> dict[str, Any]:
    """Train once; return the test's accuracy and loss after each epoch, the validation's in the last, and more."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same first weights, batches and dropout for all methods
    tensors = {name: tuple(torch.from_numpy(np.array(part)) for part in split) for name, split in data.items()}
    x, y = tensors["train"]
    model = build(data["train"][0], int(y.max()) + 1)
    updates = epochs * (len(y) // BATCH)

    def cosine(high: float, low: float, cycles: float) -> list[float]:
        return p_schedule(range(updates), p_max=high, p_min=low, cycles=cycles, total_steps=updates)

    factors: Any = [1.0] * updates
    if role in ("cosine", "cyclic"):  # p's cosine serves for a rate as well
        factors = cosine(1, 0, CYCLES if role == "cyclic" else 0.5)
    elif role == "random":
        factors = (1.0 + np.random.default_rng(seed).integers(2, size=updates)).tolist()
    phase = None
    if family == "nsf":
        direction, length = ("nsf" if role in ("both", part) else "adam" for part in ("direction", "length"))
        exponents = [0.5] * updates if variant is None else cosine(0.5, variant, CYCLES)
        optimizer: Any = DirectionAndLength(model.parameters(), rate, exponents, direction, length)
    else:
        sgd = (0.95, 0.95) if role == "0.95" else (0.9, 0.9)
        memory, length = (variant if role in ("both", part) else sgd for part in ("direction", "length"))
        optimizer = LCAM(model.parameters(), rate, *memory)  # with equal momenta it is SGD
        phase = LossPhase(optimizer)

    def logits(inputs: Tensor) -> Tensor:
        is_image = inputs.ndim == 4
        inputs = (inputs / 127.5 - 1).to(memory_format=torch.channels_last) if is_image else inputs.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(inputs).float()

    found: dict[str, Any] = {f"{name}_{key}": [] for name in SPLITS[1:] for key in ("accuracy", "loss")}
    group, low = optimizer.param_groups[0], 0
    for epoch in range(epochs):
        model.train()
        if phase:
            phase.start_epoch()
        for rows in torch.randperm(len(y))[: len(y) // BATCH * BATCH].view(-1, BATCH):
            loss = cross_entropy(logits(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            group["lr"] = rate * factors.pop(0)
            if phase:
                low += group["loss_phase"]
                is_high = 1 - group["loss_phase"]
                group["lr"] *= (1 - memory[is_high]) / (1 - length[is_high])  # the memory's length for the length's
            optimizer.step()
            if phase:
                phase.step(loss.detach())
        model.eval()
        for name in SPLITS[1:] if epoch >= epochs - max(LAST.values()) else ("test",):
            inputs, labels = tensors[name]
            with torch.inference_mode():
                outputs = torch.cat([logits(part) for part in inputs.split(500)])
            found[f"{name}_accuracy"].append((outputs.argmax(1) == labels).float().mean().item())
            found[f"{name}_loss"].append(cross_entropy(outputs, labels).item())
    return found | ({"low_share": low / updates} if phase else {})


def train_to_file(folder: Path, training: tuple[Any, ...], setting: dict[str, Any], data: Data) -> dict[str, Any]:
    """Train unless a file holds this training; a file is written whole."""
    file = folder / f"{'-'.join(map(str, training))}.json"
    asked = json.loads(json.dumps({**setting, **dict(zip(KEYS, training, strict=True))}))
    with suppress(OSError, ValueError, LookupError, TypeError):  # no file, or a damaged one
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["training"] == asked:
            return held["found"]
    found = train(*training, setting["epochs"], setting["bf16"], data)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"training": asked, "found": found}) + "\n", encoding="utf-8")
    os.replace(partial, file)
    return found


def plan(options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """All trainings, seed by seed, so that those of the first seeds are there first."""
    trainings = []
    for seed, family in itertools.product(range(options.seeds), NAMES):
        for role, rate in itertools.product(NAMES[family], getattr(options, f"{family}_rates")):
            variants = {"nsf": options.p_min, "lcam": PAIRS}[family] if role in VARIED else [None]
            trainings += [(family, variant, role, rate, seed) for variant in variants]
    return trainings


def summarise(options: argparse.Namespace, runs: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of each panel: one for each end of p's cycle, and one for each pair of momenta."""
    panels = {}
    for family, variant in [*(("nsf", p_min) for p_min in options.p_min), *(("lcam", pair) for pair in PAIRS)]:
        rates, last = getattr(options, f"{family}_rates"), LAST[family]
        methods: dict[str, Any] = {}
        finals, chosen = {}, {}  # test accuracy in % of all rates and seeds, and of the rate chosen on validation
        for role, name in NAMES[family].items():
            which = variant if role in VARIED else None
            own = [[runs[family, which, role, rate, seed] for seed in range(options.seeds)] for rate in rates]
            # Of shape (rates, seeds, epochs).
            values = {key: np.array([[run[key] for run in some] for some in own]) for key in own[0][0]}
            finals[role] = 100 * values["test_accuracy"][..., -last:].mean(-1)
            validation = 100 * values["validation_accuracy"][..., -last:].mean((1, 2))
            chosen[role] = finals[role][validation.argmax()]
            methods[role] = {
                "name": name,
                "chosen_rate": rates[validation.argmax()],
                "validation_accuracy": validation,
                "test_accuracy": over_seeds(finals[role].T),
                "test_loss": over_seeds(values["test_loss"][..., -last:].mean(-1).T),
                "curves": 100 * values["test_accuracy"].mean(1),
            }
            if family == "lcam":
                methods[role]["low_share"] = over_seeds(values["low_share"].T)
        drawn = np.mean([methods[role]["validation_accuracy"] for role in ("base", *VARIED)], 0).argmax()
        curves = {role: method["curves"][drawn] for role, method in methods.items()}
        pairs = [("length", "base"), ("direction", "base"), *(("both", role) for role in methods if role != "both")]
        differences = [
            {
                "of": methods[one]["name"],
                "to": methods[other]["name"],
                "same_rate": over_seeds((finals[one] - finals[other]).T),
                "chosen_rates": over_seeds(chosen[one] - chosen[other]),
                "curves_apart": float(np.abs(curves[one] - curves[other]).mean()),
            }
            for one, other in pairs
        ]
        title = f"NSF, p from 1/2 to {variant:g}" if family == "nsf" else "LCAM, low {}, high {}".format(*variant)
        panels[title] = {"rates": rates, "drawn_rate": rates[drawn], "methods": methods, "differences": differences}
    return panels


def tables(panels: dict[str, Any]) -> str:
    """Lay out the figures in Markdown."""
    text = ""
    for title, panel in panels.items():
        rates = [f"rate {rate:g}" for rate in panel["rates"]]
        rows: list[list[Any]] = [["test accuracy, % (loss)", *rates]]
        for method in panel["methods"].values():
            rows.append([method["name"]])
            for k, (mean, error) in enumerate(method["test_accuracy"].T):
                cell = f"{mean:.1f} ± {error:.1f} ({method['test_loss'][0, k]:.3f})"
                cell = f"**{cell}**" if panel["rates"][k] == method["chosen_rate"] else cell
                rows[-1].append(f"{cell}, {method['low_share'][0, k]:.2f} low" if "low_share" in method else cell)
        heads = ["difference, points", *rates, "at the chosen rates", f"curves apart, rate {panel['drawn_rate']:g}"]
        differences = []
        for pair in panel["differences"]:
            figures = [*pair["same_rate"].T, pair["chosen_rates"]]
            cells = ["{:+.1f} ± {:.1f}".format(*each) for each in figures]
            differences.append([f"{pair['of']} - {pair['to']}", *cells, f"{pair['curves_apart']:.1f}"])
        text += f"\n## {title}\n\n{markdown(*rows)}\n{markdown(heads, *differences)}"
    return text


def draw(panels: dict[str, Any]) -> Any:
    """Draw the picture: a row for each panel, accuracy against the epoch and against the rate."""
    figure, axes = subplots(len(panels), 2, 14, 4.2 * len(panels))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    for (title, panel), (curves, finals) in zip(panels.items(), axes, strict=True):
        drawn = panel["rates"].index(panel["drawn_rate"])
        for method, style in zip(panel["methods"].values(), STYLES, strict=True):
            curve = method["curves"][drawn]
            curves.plot(range(1, 1 + len(curve)), curve, label=method["name"], **style)
            finals.errorbar(panel["rates"], *method["test_accuracy"], capsize=3, marker="o", markersize=4, **style)
        curves.set(title=f"{next(letters)}. {title}, rate {panel['drawn_rate']:g}", xlabel="epoch")
        finals.set(title=f"{next(letters)}. The same, all rates", xlabel="learning rate", xscale="log")
        finals.set_xticks(panel["rates"], [f"{rate:g}" for rate in panel["rates"]])
        finals.minorticks_off()
        for axis in (curves, finals):
            axis.set_ylabel("test accuracy (%)")
        finals.legend(*curves.get_legend_handles_labels(), fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Train, write and print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="of direction_and_length.json, .md and .png, and of runs/")
    add("--train_file", help="images and labels, as in image_classification.py (default: docstrings)")
    add("--test_file", help="with --train_file, whose rest is for validation")
    add("--epochs", type=int, default=8, help="(default: 8)")
    add("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    add("--p_min", type=float, nargs="+", default=[0.25, 0.0, -0.25], help="ends of p's cycle from 1/2")
    add("--nsf_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="learning rates of AdamW and NSF")
    add("--lcam_rates", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="learning rates of SGD and LCAM")
    add("--bf16", action="store_true", help="compute in bfloat16 under autocast")
    add("--jobs", type=int, default=joblib.cpu_count(), help="trainings at a time (default: one a core)")
    options = parser.parse_args(args)
    for name in ("epochs", "seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    if (options.train_file is None) != (options.test_file is None):
        parser.error("--train_file and --test_file: give both or neither")
    folder = options.output_dir / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    setting = {name: getattr(options, name) for name in ("train_file", "test_file", "epochs", "bf16")}
    data = load_data(options.train_file, options.test_file)
    trainings = plan(options)
    jobs = (joblib.delayed(train_to_file)(folder, training, setting, data) for training in trainings)
    runs = {}
    for training, found in zip(trainings, joblib.Parallel(options.jobs, return_as="generator")(jobs), strict=True):
        runs[training] = found
        shown = " ".join(str(value) for value in training if value is not None)
        print(f"{len(runs)} of {len(trainings)}: {shown}: {found['test_accuracy'][-1]:.4f}", flush=True)
    panels = summarise(options, runs)
    sizes = {name: len(labels) for name, (_, labels) in data.items()}
    results = {"command": command(__file__, args), "seeds": options.seeds, "epochs": options.epochs, "rows": sizes}
    results |= {"last_epochs": LAST, "panels": panels}
    text = "{} rows to train, {} for validation, {} to test; ".format(*sizes.values())
    text += f"{options.seeds} seeds, mean ± standard error; final accuracy is the mean over the last epochs, "
    text += "{nsf} (NSF) or {lcam} (LCAM).\n**Bold**: the rate chosen on validation.\n".format(**LAST)
    name = options.output_dir / "direction_and_length"
    write(name, results["command"], results, text + tables(panels), draw(panels))
    return results


if __name__ == "__main__":
    main()
