# SPDX-License-Identifier: Apache-2.0
"""What NSF's exponent p does: three small experiments and one picture, in a few minutes on 2 cores.

    python examples/what_p_does.py --output_dir out
    python examples/what_p_does.py --output_dir out --sst2 FOLDER    # train, validation and test.parquet of SST-2

a. Frequencies: a small network fits a sum of sines. Which of them does it learn first?
b. Rare features and the learning rate, a problem of the kind of arXiv 2609.30271: a linear classifier learns where rare
   spurious features agree with the label, and is tested where they agree less, or disagree.
c. Rare words: a linear classifier of bags of words, where rare words carry the label.

In each, p is constant and all else is equal. All models of an experiment train side by side, each with tensors of its
own, as parameter groups of one `hf_nsf.NSF`. Writes what_p_does.png and what_p_does.json; figures are means over the
seeds with their standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from embedded_data import SPLITS, DataTrainingArguments, load_docstring_sentences, load_splits, one_sentence
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor, nn

from hf_nsf import NSF

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)

FREQUENCIES = (1, 2, 4, 8)
AGREEMENTS = (0.95, 0.65, 0.35, 0.05)  # of the rare spurious features with the label; the first is where it learns
SPURIOUS, STABLE, DENSE, NOISE = 500, 500, 20, 1980
RARE_SHARE, STABLE_AGREEMENT, DENSE_SHIFT = 0.02, 0.8, 0.25
GRAFTINGS = ("none", "adam")
PARTS = {"source": "where it learnt", "cross": "over all four environments", "worst": "in the worst environment"}
COLOURS = ("#D55E00", "#0072B2", "#000000", "#009E73")  # of Okabe and Ito, for readers who see colours differently


class ManyModels:
    """Models of one shape for each option and seed: `stacks` of shape (options, seeds, ...), all steps by one NSF."""

    def __init__(self, shapes: list[tuple[int, ...]], bounds: list[float], options: list[dict[str, Any]], seeds: int):
        """Draw the weights uniformly within the bounds; a seed's are the same for all options."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        self.stacks = []
        for shape, bound in zip(shapes, bounds, strict=True):
            first = torch.stack([(torch.rand(shape, generator=own) * 2 - 1) * bound for own in self.generators])
            self.stacks.append(first.repeat(len(options), 1, *[1] * len(shape)).requires_grad_())
        groups = []
        for index, option in enumerate(options):
            params = []
            for stack in self.stacks:
                stack.grad = torch.zeros_like(stack) if stack.grad is None else stack.grad
                for seed in range(seeds):  # memory shared with the stack
                    params.append(nn.Parameter(stack.detach()[index, seed]))
                    params[-1].grad = stack.grad[index, seed]
            groups.append({"params": params, **option})
        self.optimizer = NSF(groups, weight_decay=0.0)

    def step(self, losses: Tensor) -> None:
        """Update each model by the gradient of its own loss; no weight takes part in the loss of another."""
        for stack in self.stacks:
            stack.grad.zero_()  # in place: the parameters' gradients are parts of it
        losses.sum().backward()
        self.optimizer.step()

    def batch(self, rows: int, size: int) -> Tensor:
        """Draw the numbers of `size` rows for each seed."""
        return torch.stack([torch.randint(0, rows, (size,), generator=own) for own in self.generators])


def over_seeds(values: Tensor, dim: int = -1) -> dict[str, Any]:
    """Mean over a dimension of seeds, and its standard error."""
    count = values.shape[dim]
    error = values.std(dim) / count**0.5 if count > 1 else torch.zeros_like(values.mean(dim))
    return {"mean": values.mean(dim).tolist(), "error": error.tolist()}


def fit_sines(
    exponents: list[float], seeds: int, moments: list[int], lr: float = 1e-3, width: int = 64
) -> dict[str, Any]:
    """Experiment a: the error of each sine as a share of its amplitude, at some moments of the training."""
    x = torch.linspace(-1, 1, 257)[:-1]
    sines = torch.stack([torch.sin(k * math.pi * x) for k in FREQUENCIES])
    width = 64
    shapes, bounds = [], []
    for inputs, outputs in ((1, width), (width, width), (width, 1)):  # as nn.Linear has them
        shapes += [(inputs, outputs), (1, outputs)]
        bounds += [inputs**-0.5] * 2
    models = ManyModels(shapes, bounds, [{"p": p, "lr": lr} for p in exponents], seeds)
    w1, b1, w2, b2, w3, b3 = models.stacks
    result: dict[str, Any] = {"p": exponents, "frequency": list(FREQUENCIES), "lr": lr}
    for step in range(1, max(moments) + 1):
        residual = (torch.tanh(torch.tanh(x[:, None] * w1 + b1) @ w2 + b2) @ w3 + b3).squeeze(-1) - sines.sum(0)
        models.step(residual.square().mean(-1))
        if step in moments:
            errors = (residual.detach() @ sines.T * 2 / len(x)).abs()  # a sine's square has the mean 1/2
            result[f"after {step} steps"] = over_seeds(errors, dim=1)
    return result


def draw_environment(rows: int, agreement: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of -1 and 1, and 3,000 features of which few tell the label everywhere."""
    labels = torch.randint(0, 2, (rows, 1), generator=generator) * 2.0 - 1

    def rare(count: int, agrees: float) -> Tensor:
        active = torch.rand(rows, count, generator=generator) < RARE_SHARE
        return torch.where(torch.rand(rows, count, generator=generator) < agrees, labels, -labels) * active

    dense = torch.randn(rows, DENSE, generator=generator) + DENSE_SHIFT * labels
    parts = [rare(SPURIOUS, agreement), rare(STABLE, STABLE_AGREEMENT), dense, rare(NOISE, 0.5)]
    return torch.cat(parts, 1), labels[:, 0]


def rare_features(
    exponents: list[float], rates: list[float], seeds: int, steps: int, rows: int = 4000, batch: int = 32
) -> dict[str, Any]:
    """Experiment b: accuracies in four environments over p and the learning rate, ungrafted and grafted."""
    options = [{"grafting": each, "lr": lr, "p": p} for each in GRAFTINGS for lr in rates for p in exponents]
    count = SPURIOUS + STABLE + DENSE + NOISE
    models = ManyModels([(count,)], [count**-0.5], options, seeds)
    (weights,) = models.stacks

    def draw_for_all(count: int, agreement: float) -> tuple[Tensor, Tensor]:
        drawn = [draw_environment(count, agreement, own) for own in models.generators]
        return torch.stack([x for x, _ in drawn]), torch.stack([y for _, y in drawn])

    train, labels = draw_for_all(rows, AGREEMENTS[0])
    for _ in range(steps):
        chosen = models.batch(rows, batch)
        x = torch.stack([own[index] for own, index in zip(train, chosen, strict=True)])
        margins = torch.einsum("sbf,osf->osb", x, weights) * labels.gather(1, chosen)
        models.step(nn.functional.softplus(-margins).mean(-1))
    right = []
    for agreement in AGREEMENTS:
        x, y = draw_for_all(rows // 4, agreement)
        right.append((torch.einsum("sbf,osf->osb", x, weights.detach()) * y > 0).float().mean(-1))
    accuracy = torch.stack(right).view(len(AGREEMENTS), len(GRAFTINGS), len(rates), len(exponents), seeds)
    result: dict[str, Any] = {"p": exponents, "lr": rates, "steps": steps}
    for number, grafting in enumerate(GRAFTINGS):
        own = accuracy[:, number]
        parts = {"cross": own.mean(0), "worst": own.amin(0), "source": own[0]}
        entry = {name: over_seeds(part) for name, part in parts.items()}
        best = torch.tensor([[best_exponent(exponents, run) for run in runs.T.tolist()] for runs in parts["cross"]])
        entry["best_p"] = over_seeds(best)
        slopes = torch.tensor([np.polyfit(np.log10(rates), seed, 1)[0] for seed in best.T.numpy()])
        entry["slope_per_decade"] = over_seeds(slopes)
        result[grafting] = entry
    return result


def best_exponent(exponents: list[float], accuracy: list[float]) -> float:
    """The best p, between those tried by the parabola through the best and its neighbours."""
    k = int(np.argmax(accuracy))
    if k in (0, len(exponents) - 1):
        return exponents[k]
    a, b, _ = np.polyfit(exponents[k - 1 : k + 2], accuracy[k - 1 : k + 2], 2)
    return -b / (2 * a) if a < 0 else exponents[k]


def load_texts(sst2: str | None) -> dict[str, tuple[list[str], list[int]]]:
    """The texts and labels of each split."""
    files = {} if sst2 is None else {f"{name}_file": str(Path(sst2, f"{name}.parquet")) for name in SPLITS}
    with one_sentence():
        splits = load_splits(DataTrainingArguments(**files), load_docstring_sentences, "text", "sentence")
    return {name: (split["text"][:], split["labels"][:]) for name, split in splits.items()}


def rare_words(
    texts: dict[str, tuple[list[str], list[int]]],
    exponents: list[float], rates: list[float], seeds: int, epochs: float, batch: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """Experiment c: test accuracy for each p, at its best learning rate on validation; each seed learns of 80 %."""
    vectorizer = CountVectorizer(binary=True, min_df=2, dtype=np.uint8).fit(texts["train"][0])
    words = {name: torch.from_numpy(vectorizer.transform(part).toarray()) for name, (part, _) in texts.items()}
    labels = {name: torch.tensor(part) for name, (_, part) in texts.items()}
    classes = int(labels["train"].max()) + 1
    options = [{"lr": lr, "p": p} for lr in rates for p in exponents]
    models = ManyModels([(words["train"].shape[1], classes)], [0.0], options, seeds)
    (weights,) = models.stacks
    rows = round(0.8 * len(labels["train"]))
    own_rows = torch.stack([torch.randperm(len(labels["train"]), generator=g)[:rows] for g in models.generators])
    steps = round(epochs * rows / batch)
    for _ in range(steps):
        chosen = own_rows.gather(1, models.batch(rows, batch))
        logits = torch.einsum("sbi,osij->osbj", words["train"][chosen].float(), weights)
        targets = labels["train"][chosen].expand(len(options), -1, -1)
        losses = nn.functional.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
        models.step(losses.mean(-1))
    accuracy = {}
    for name in ("validation", "test"):
        logits = torch.einsum("bi,osij->osbj", words[name].float(), weights.detach())
        right = (logits.argmax(-1) == labels[name]).float().mean(-1)
        accuracy[name] = right.view(len(rates), len(exponents), seeds)
    best = accuracy["validation"].mean(-1).argmax(0)
    test = torch.stack([accuracy["test"][k, p] for p, k in enumerate(best)])
    chosen_rates = [rates[k] for k in best]
    return {"p": exponents, "lr": chosen_rates, "steps": steps, "words": weights.shape[2], **over_seeds(test)}


def table(title: str, heads: list[str], rows: dict[str, dict[str, list[float]]]) -> None:
    """Print means and standard errors in percent."""
    print(f"\n{title}, %\n{'':>12}" + "".join(f"{head:>11}" for head in heads))
    for name, row in rows.items():
        cells = (f"{100 * mean:.1f}±{100 * error:.1f}" for mean, error in zip(row["mean"], row["error"], strict=True))
        print(f"{name:>12}" + "".join(f"{cell:>11}" for cell in cells))


def row_of(figures: dict[str, list], index: int) -> dict[str, list[float]]:
    """One row of figures with two dimensions."""
    return {"mean": figures["mean"][index], "error": figures["error"][index]}


def print_tables(results: dict[str, Any]) -> None:
    """Print all figures."""
    a, b, c = (results[key] for key in ("sines", "features", "words"))
    for moment in (key for key in a if key.startswith("after")):
        rows = {f"p={p:g}": row_of(a[moment], k) for k, p in enumerate(a["p"])}
        table(
            f"a. Error of each sine {moment}, as a share of its amplitude", [f"sin {k} pi x" for k in FREQUENCIES], rows
        )
    for grafting in GRAFTINGS:
        for part, words in PARTS.items():
            rows = {f"rate {lr:.2g}": row_of(b[grafting][part], k) for k, lr in enumerate(b["lr"])}
            table(f'b. grafting="{grafting}": accuracy {words}', [f"p={p:g}" for p in b["p"]], rows)
        best, slope = b[grafting]["best_p"], b[grafting]["slope_per_decade"]
        shown = ", ".join(f"{p:.2f}±{error:.2f}" for p, error in zip(best["mean"], best["error"], strict=True))
        print(f"   best p by rate: {shown}; slope {slope['mean']:.3f}±{slope['error']:.3f} a decade")
    rates = ", ".join(f"{rate:g}" for rate in c["lr"])
    title = f"c. {c['name']}, {c['words']} words, {c['steps']} steps: test accuracy (rates {rates})"
    table(title, [f"p={p:g}" for p in c["p"]], {"": c})


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the picture."""
    a, b, c = (results[key] for key in ("sines", "features", "words"))
    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    (sines, accuracy), (best, words) = axes

    def line(axis: Any, x: Any, figures: dict[str, list], style: int, scale: float = 100, **options: Any) -> None:
        mean, error = scale * np.array(figures["mean"]), scale * np.array(figures["error"])
        axis.errorbar(x, mean, error, color=COLOURS[style], marker="osD^"[style], capsize=3, **options)

    moments = [key for key in a if key.startswith("after")]
    for style, p in enumerate((-0.5, 0.0, 0.5)):
        for moment, dash in zip((moments[0], moments[-1]), ("-", ":"), strict=True):
            row = row_of(a[moment], a["p"].index(p))
            line(sines, range(len(FREQUENCIES)), row, style, linestyle=dash, label=f"p = {p:g} {moment}")
    sines.set_xticks(range(len(FREQUENCIES)), [rf"$\sin {k if k > 1 else ''}\pi x$" for k in FREQUENCIES])
    sines.set(title="a. Sum of sines: error of each", ylabel="% of its amplitude")
    rate = int(np.argmax(np.max(b["adam"]["cross"]["mean"], axis=1)))
    for style, (part, text) in enumerate(PARTS.items()):
        line(accuracy, b["p"], row_of(b["adam"][part], rate), style, label=text)
    accuracy.set(title=f"b. Rare spurious features (rate {b['lr'][rate]:.2g})", xlabel="p", ylabel="accuracy (%)")
    for style, grafting in enumerate(GRAFTINGS):
        slope = b[grafting]["slope_per_decade"]
        text = f'grafting="{grafting}": {slope["mean"]:.2f}±{slope["error"]:.2f} a decade'
        line(best, b["lr"], b[grafting]["best_p"], style, scale=1, label=text)
    best.set(title="b. Best p over all environments", xscale="log", xlabel="learning rate", ylabel="p (-0.5 to 0.5)")
    line(words, c["p"], c, 0, label="best rate of each p")
    words.set(title=f"c. Rare words: {c['name']}", xlabel="p", ylabel="test accuracy (%)")
    for axis in axes.flat:
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run all three; returns what stands in the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of what_p_does.png and what_p_does.json")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--sst2", help="folder of SST-2's parquet files, for part c (default: docstrings)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few models: tests that it runs")
    options = parser.parse_args(args)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give 1 or more")
    seeds, start = options.seeds, time.perf_counter()
    texts = load_texts(options.sst2)
    few, many = [-0.5, -0.25, 0.0, 0.25, 0.5], [round(0.1 * k - 0.5, 1) for k in range(11)]
    results: dict[str, Any] = {"seeds": seeds}
    if options.quick:
        results["sines"] = fit_sines(few, seeds, moments=[2, 4])
        results["features"] = rare_features(few, [1e-3, 1e-2], seeds, steps=5)
        results["words"] = rare_words(texts, few, [4e-3], seeds, epochs=0.05)
    else:
        results["sines"] = fit_sines(few, seeds, moments=[200, 1000])
        results["features"] = rare_features(many, [1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2], seeds, steps=800)
        results["words"] = rare_words(texts, few, [4e-3, 1.6e-2, 6.4e-2], seeds, epochs=3)
    results["words"]["name"] = "SST-2" if options.sst2 else "topics of docstrings"
    results["seconds"] = round(time.perf_counter() - start)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "what_p_does.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results, output / "what_p_does.png")
    print_tables(results)
    print(f"\nWrote {output / 'what_p_does.png'} and {output / 'what_p_does.json'} after {results['seconds']} s")
    return results


if __name__ == "__main__":
    main()
