# SPDX-License-Identifier: Apache-2.0
"""Is it the direction or the length? Both methods' steps taken apart: one picture, under 10 minutes on 2 cores.

    python examples/direction_and_length.py --output_dir out      # topics of docstrings, a small network
    python examples/direction_and_length.py --output_dir out --train_file train.parquet --test_file test.parquet \
        --epochs 16 --nsf_rates 0.003 0.01 --lcam_rates 0.03 0.1     # images, such as CIFAR-10

Of a tensor, a = m / (sqrt(v) + eps) is Adam's step and r = m / (v^p + eps) that of NSF's paper (arXiv 2509.04713).
AdamW has direction and length of a, the paper's formula those of r, and grafting="adam" r's direction with a's length;
the fourth has a's direction with r's length. Momentum is undamped, so the momentum mu of LCAM (arXiv 2309.02130)
changes both the memory of a step and its length, by 1 / c with c = (1 - mu) / 0.1. SGD 0.9 with its rate divided by c
has the length alone, LCAM with its rate multiplied by c the memory alone; SGD 0.9 with its rate doubled at random has
such lengths, but they do not depend on the loss.

Rates are constant but for two schedules beside AdamW. Accuracies are means over the last epochs, on test data; rates
are chosen on validation data; differences are paired by seed. Rerun the command to resume: each training is a file.
"""

import json
import os
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from classification import DataTrainingArguments, one_sentence
from embedded_data import SPLITS, load_bags
from figures import make_parser, markdown, over_seeds, plus_minus, positive, subplots, write
from image_classification import ModelArguments, build_model, prepare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_nsf import LCAM, LossPhase, p_schedule

Data = dict[str, tuple[Tensor, Tensor]]
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
COLORS = ["#000000", "#D55E0099", "#0072B2", "#009E73", "#CC79A7", "#888888"]
DASHES, WIDTHS = ["-", "-", (0, (4, 2)), "-", ":", "-."], [2, 4, 2, 2, 1.5, 1.5]
VARIED = ("both", "length", "direction")  # of each variant: an end of p's cycle, or a pair of momenta (low, high)
PAIRS = [(0.9, 0.95), (0.95, 0.9)]
CYCLES = 3.5  # of p and of the cyclic rate: both end at their lowest
LAST = {"nsf": 2, "lcam": 4}  # epochs of the final mean. p falls to its end in two of 16; SGD swings between epochs
BATCH, IMAGE_SIZE, TRAIN_IMAGES, TEST_IMAGES, WORDS = 64, 24, 5000, 2000, 1000


class DirectionAndLength(torch.optim.Optimizer):
    """Steps in the direction of one formula with the length of another ("adam" or "nsf"), tensor by tensor.

    `exponents` holds p of each step.
    """

    def __init__(self, params: Any, lr: float, exponents: list[float], direction: str, length: str) -> None:
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
                exponents = {"adam": 0.5, "nsf": p}
                step = m / (v ** exponents[self.direction] + eps)
                if self.length != self.direction:
                    other = m / (v ** exponents[self.length] + eps)
                    step = step * (other.norm() / step.norm().clamp(min=1e-30))  # 0 where all is 0
                param.sub_(step * group["lr"])


def load_data(train_file: str | None, test_file: str | None) -> Data:
    """Load inputs and labels of each split: images as bytes, or which of the commonest words a docstring has."""
    if train_file is None:
        return {name: (torch.tensor(x), torch.tensor(y)) for name, (x, y) in load_bags(WORDS).items()}
    sizes = {"max_train_samples": TRAIN_IMAGES, "max_eval_samples": TEST_IMAGES}
    arguments = DataTrainingArguments(train_file=train_file, test_file=test_file, **sizes)
    with one_sentence():
        splits, _, _ = prepare(ModelArguments(image_size=IMAGE_SIZE), arguments)
    return {name: (split.images, split.labels) for name, split in splits.items()}


def build(inputs: Tensor, classes: int) -> nn.Module:
    """Make a network for images, or for bags of words."""
    if inputs.ndim == 4:
        resnet = build_model(ModelArguments(architecture="wrn-10-1"), {"num_labels": classes})
        return nn.Sequential(resnet.body, resnet.head).to(memory_format=torch.channels_last)
    layers = [nn.Dropout(0.5), nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def train(
    family: str, variant: Any, role: str, rate: float, seed: int, epochs: int, bf16: bool, data: Data
) -> dict[str, Any]:
    """Train once; return the test's accuracy and loss after each epoch, the validation's in the last, and more."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same first weights, batches and dropout for all methods
    x, y = data["train"]
    model = build(x, int(y.max()) + 1)
    updates = epochs * (len(y) // BATCH)
    cosine = partial(p_schedule, range(updates), total_steps=updates)  # of p, and of the rate as well

    factors: Any = [1.0] * updates
    if role in ("cosine", "cyclic"):
        factors = cosine(p_max=1, p_min=0, cycles=CYCLES if role == "cyclic" else 0.5)
    elif role == "random":
        factors = (1.0 + np.random.default_rng(seed).integers(2, size=updates)).tolist()
    phase = None
    if family == "nsf":
        direction, length = ("nsf" if role in ("both", part) else "adam" for part in ("direction", "length"))
        exponents = cosine(p_max=0.5, p_min=0.5 if variant is None else variant, cycles=CYCLES)
        optimizer: Any = DirectionAndLength(model.parameters(), rate, exponents, direction, length)
    else:
        sgd = (0.95, 0.95) if role == "0.95" else (0.9, 0.9)
        memory, length = (variant if role in ("both", part) else sgd for part in ("direction", "length"))
        optimizer = LCAM(model.parameters(), rate, *memory)  # with equal momenta it is SGD
        phase = LossPhase(optimizer)

    def logits(inputs: Tensor) -> Tensor:
        inputs = inputs / 127.5 - 1 if inputs.ndim == 4 else inputs.float()
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
            inputs, labels = data[name]
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
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps({"training": asked, "found": found}) + "\n", encoding="utf-8")
    os.replace(partial_file, file)
    return found


def summarise(family: str, variant: Any, rates: list[float], seeds: int, runs: dict[Any, Any]) -> dict[str, Any]:
    """Return the figures of one panel: of one end of p's cycle, or of one pair of momenta."""
    last = LAST[family]
    own = {
        training[2:]: found for training, found in runs.items() if training[:2] in ((family, variant), (family, None))
    }

    def values(role: str, key: str) -> np.ndarray:  # of shape (seeds, rates, epochs)
        return np.array([[own[role, rate, seed][key] for rate in rates] for seed in range(seeds)])

    accuracy, chosen, methods = {}, {}, {}  # test accuracy in % of each seed: at all rates, at the chosen one
    for role, name in NAMES[family].items():
        accuracy[role] = 100 * values(role, "test_accuracy")[..., -last:].mean(-1)
        validation = 100 * values(role, "validation_accuracy")[..., -last:].mean((0, 2))
        chosen[role] = accuracy[role][:, validation.argmax()]
        methods[role] = {
            "name": name,
            "chosen_rate": rates[validation.argmax()],
            "validation_accuracy": validation,
            "test_accuracy": over_seeds(accuracy[role]),
            "test_loss": over_seeds(values(role, "test_loss")[..., -last:].mean(-1)),
            "curves": 100 * values(role, "test_accuracy").mean(0),
        }
        if family == "lcam":
            methods[role]["low_share"] = over_seeds(values(role, "low_share"))
    drawn = np.mean([methods[role]["validation_accuracy"] for role in ("base", *VARIED)], 0).argmax()
    curves = {role: method["curves"][drawn] for role, method in methods.items()}
    pairs = [("length", "base"), ("direction", "base"), *(("both", role) for role in methods if role != "both")]
    differences = [
        {
            "of": methods[one]["name"],
            "to": methods[other]["name"],
            "same_rate": over_seeds(accuracy[one] - accuracy[other]),
            "chosen_rates": over_seeds(chosen[one] - chosen[other]),
            "curves_apart": float(np.abs(curves[one] - curves[other]).mean()),
        }
        for one, other in pairs
    ]
    return {"rates": rates, "drawn_rate": rates[drawn], "methods": methods, "differences": differences}


def tables(panel: dict[str, Any]) -> str:
    """Lay out the figures of a panel in Markdown."""
    rates = [f"rate {rate:g}" for rate in panel["rates"]]
    rows = []
    for method in panel["methods"].values():
        row = [method["name"]]
        for k, rate in enumerate(panel["rates"]):
            cell = f"{plus_minus(method['test_accuracy'][:, k])} ({method['test_loss'][0, k]:.3f})"
            cell = f"**{cell}**" if rate == method["chosen_rate"] else cell
            row.append(f"{cell}, {method['low_share'][0, k]:.2f} low" if "low_share" in method else cell)
        rows.append(row)
    text = markdown(["test accuracy, % (loss)", *rates], *rows)
    heads = ["difference, points", *rates, "at the chosen rates", f"curves apart, rate {panel['drawn_rate']:g}"]
    rows = [
        [f"{pair['of']} - {pair['to']}", *pair["same_rate"].T, pair["chosen_rates"], f"{pair['curves_apart']:.1f}"]
        for pair in panel["differences"]
    ]
    return f"{text}\n{markdown(heads, *rows, sign='+')}"


def draw(panels: dict[str, Any]) -> Any:
    """Draw the picture: a row for each panel, accuracy against the epoch and against the rate."""
    figure, axes = subplots(len(panels), 2, 14, 4.2 * len(panels))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    for (title, panel), (curves, finals) in zip(panels.items(), axes, strict=True):
        rates, rate = panel["rates"], panel["drawn_rate"]
        for k, (method, color, dash, width) in enumerate(
            zip(panel["methods"].values(), COLORS, DASHES, WIDTHS, strict=True)
        ):
            style = {"color": color, "linestyle": dash, "linewidth": width, "label": method["name"]}
            curve = method["curves"][rates.index(rate)]
            curves.plot(range(1, 1 + len(curve)), curve, **style)
            beside = [each * 1.02 ** (k - 2.5) for each in rates]  # so that no error bar hides another
            finals.errorbar(beside, *method["test_accuracy"], capsize=3, marker="o", markersize=4, **style)
        curves.set(title=f"{next(letters)}. {title}, rate {rate:g}", xlabel="epoch", ylabel="test accuracy (%)")
        finals.set(title=f"{next(letters)}. The same, all rates", xlabel="learning rate", ylabel="test accuracy (%)")
        finals.set_xscale("log")
        finals.set_xticks(rates, [f"{rate:g}" for rate in rates])
        finals.minorticks_off()
        finals.legend(*curves.get_legend_handles_labels(), fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def main(args: list[str] | None = None) -> None:
    """Train, write and print."""
    parser = make_parser(__doc__, seeds=5)
    add = parser.add_argument
    add("--train_file", help="images and labels, as in image_classification.py (default: docstrings)")
    add("--test_file", help="with --train_file, whose rest is for validation")
    add("--epochs", type=positive, default=8, help="(default: 8)")
    add("--p_min", type=float, nargs="+", default=[0.25, 0.0, -0.25], help="ends of p's cycle from 1/2")
    add("--nsf_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="learning rates of AdamW and NSF")
    add("--lcam_rates", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="learning rates of SGD and LCAM")
    add("--bf16", action="store_true", help="compute in bfloat16 under autocast")
    options = parser.parse_args(args)
    if (options.train_file is None) != (options.test_file is None):
        parser.error("--train_file and --test_file: give both or neither")
    data = load_data(options.train_file, options.test_file)
    folder = options.output_dir / "runs"
    folder.mkdir(parents=True, exist_ok=True)

    panels: dict[str, Any] = {f"NSF, p from 1/2 to {p:g}": ("nsf", p, options.nsf_rates) for p in options.p_min}
    panels |= {f"LCAM, low {low}, high {high}": ("lcam", (low, high), options.lcam_rates) for low, high in PAIRS}
    # Seed by seed, so that the first seeds are there first; the panels of a family share what does not vary.
    trainings = dict.fromkeys(
        (family, variant if role in VARIED else None, role, rate, seed)
        for seed in range(options.seeds)
        for family, variant, rates in panels.values()
        for role, rate in product(NAMES[family], rates)
    )
    setting = {name: getattr(options, name) for name in ("train_file", "test_file", "epochs", "bf16")}
    jobs = (joblib.delayed(train_to_file)(folder, training, setting, data) for training in trainings)
    runs = dict(zip(trainings, joblib.Parallel(options.jobs, verbose=10)(jobs), strict=True))
    panels = {title: summarise(*panel, options.seeds, runs) for title, panel in panels.items()}

    sizes = {name: len(labels) for name, (_, labels) in data.items()}
    text = "{} rows to train, {} for validation, {} to test; ".format(*sizes.values())
    text += f"{options.seeds} seeds, mean ± standard error; final accuracy is the mean over the last epochs, "
    text += "{nsf} (NSF) or {lcam} (LCAM).\n**Bold**: the rate chosen on validation.\n".format(**LAST)
    text += "".join(f"\n## {title}\n\n{tables(panel)}" for title, panel in panels.items())
    results = {"seeds": options.seeds, "epochs": options.epochs, "rows": sizes, "last_epochs": LAST, "panels": panels}
    write(options.output_dir, __file__, args, results, text, draw(panels))


if __name__ == "__main__":
    main()
