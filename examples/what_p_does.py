# SPDX-License-Identifier: Apache-2.0
"""What NSF's exponent p does: three small experiments and one picture, in a few minutes on 2 cores.

    python examples/what_p_does.py --output_dir out
    python examples/what_p_does.py --output_dir out --sst2 FOLDER    # train, validation and test.parquet of SST-2

a. Frequencies: a small network fits a sum of sines. Which of them does it learn first?
b. Rare features and the learning rate, a problem of the kind of arXiv 2609.30271: a linear classifier learns where rare
   spurious features agree with the label, and is tested where they agree less, or disagree.
c. Rare words: a linear classifier of bags of words, where rare words carry the label.

In each, p is constant and all else is equal. Writes what_p_does.png and what_p_does.json; figures are means over the
seeds with their standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import matplotlib
import numpy as np
import torch
from embedded_data import SPLITS, DataTrainingArguments, load_docstring_sentences, load_splits, one_sentence
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

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


def fit_sines(seed: int, exponents: list[float], moments: list[int], width: int = 64) -> np.ndarray:
    """Experiment a: the error of each sine as a share of its amplitude, of shape (moments, exponents, frequencies)."""
    x = torch.linspace(-1, 1, 257)[:-1, None]
    sines = torch.sin(math.pi * x * torch.tensor(FREQUENCIES))
    errors = np.empty((len(moments), len(exponents), len(FREQUENCIES)))
    for k, p in enumerate(exponents):
        torch.manual_seed(seed)  # the same first weights for each p
        inner = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        model = nn.Sequential(inner, nn.Linear(width, 1))
        optimizer = NSF(model.parameters(), lr=1e-3, p=p, weight_decay=0.0)
        for step in range(1, max(moments) + 1):
            residual = model(x) - sines.sum(1, keepdim=True)
            optimizer.zero_grad()
            residual.square().mean().backward()
            optimizer.step()
            if step in moments:  # a sine's square has the mean 1/2
                errors[moments.index(step), k] = (residual.detach().T @ sines * 2 / len(x)).abs()
    return errors


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
    seed: int, exponents: list[float], rates: list[float], steps: int, rows: int = 4000, batch: int = 32
) -> np.ndarray:
    """Experiment b: accuracies, of shape (graftings, rates, exponents, environments)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = draw_environment(rows, AGREEMENTS[0], generator)
    tests = [draw_environment(rows // 4, agreement, generator) for agreement in AGREEMENTS]
    first = (2 * torch.rand(x.shape[1], generator=generator) - 1) * x.shape[1] ** -0.5  # as nn.Linear has it
    batches = torch.randint(rows, (steps, batch), generator=generator)
    accuracies = []
    for grafting, lr, p in product(GRAFTINGS, rates, exponents):
        weights = first.clone().requires_grad_()
        optimizer = NSF([weights], lr, p=p, grafting=grafting, weight_decay=0.0)
        for chosen in batches:
            optimizer.zero_grad()
            softplus(-(x[chosen] @ weights) * y[chosen]).mean().backward()
            optimizer.step()
        accuracies.append([((x @ weights) * y > 0).float().mean().item() for x, y in tests])
    return np.reshape(accuracies, (len(GRAFTINGS), len(rates), len(exponents), len(AGREEMENTS)))


def best_exponent(exponents: list[float], accuracy: list[float]) -> float:
    """The best p, between those tried by the parabola through the best and its neighbours."""
    k = int(np.argmax(accuracy))
    if k in (0, len(exponents) - 1):
        return exponents[k]
    a, b, _ = np.polyfit(exponents[k - 1 : k + 2], accuracy[k - 1 : k + 2], 2)
    return -b / (2 * a) if a < 0 else exponents[k]


def load_bags(sst2: str | None) -> list[tuple[Any, Any]]:
    """The bag of words of each text, as a sparse matrix, and the labels, for each split."""
    files = {} if sst2 is None else {f"{name}_file": str(Path(sst2, f"{name}.parquet")) for name in SPLITS}
    with one_sentence():
        splits = load_splits(DataTrainingArguments(**files), load_docstring_sentences, "text", "sentence")
    vectorizer = CountVectorizer(binary=True, min_df=2, dtype=np.float32).fit(splits["train"]["text"][:])
    return [(vectorizer.transform(splits[name]["text"][:]), np.array(splits[name]["labels"][:])) for name in SPLITS]


def rare_words(
    seed: int, exponents: list[float], rates: list[float], epochs: float, bags: list[tuple[Any, Any]], batch: int = 64
) -> np.ndarray:
    """Experiment c: accuracies, of shape (rates, exponents, validation and test); each seed learns of 80 %."""
    (x, y), *tests = [(torch.from_numpy(words.toarray()), torch.from_numpy(labels)) for words, labels in bags]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(y), generator=generator)[: round(0.8 * len(y))]
    batches = rows[torch.randint(len(rows), (round(epochs * len(rows) / batch), batch), generator=generator)]
    accuracies = []
    for lr, p in product(rates, exponents):
        weights = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
        optimizer = NSF([weights], lr, p=p, weight_decay=0.0)
        for chosen in batches:
            optimizer.zero_grad()
            cross_entropy(x[chosen] @ weights, y[chosen]).backward()
            optimizer.step()
        accuracies.append([((words @ weights).argmax(1) == labels).float().mean().item() for words, labels in tests])
    return np.reshape(accuracies, (len(rates), len(exponents), 2))


def over_seeds(values: Any) -> np.ndarray:
    """Mean over the first dimension, that of the seeds, and its standard error, stacked."""
    values = np.asarray(values)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1:])
    return np.stack([values.mean(0), error])


def run(seeds: int, sst2: str | None, quick: bool) -> dict[str, Any]:
    """Run all three experiments; returns their figures."""

    def each_seed(experiment: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
        runs = (joblib.delayed(experiment)(seed, *arguments) for seed in range(seeds))
        return np.stack(joblib.Parallel(n_jobs=min(seeds, joblib.cpu_count()))(runs))

    bags = load_bags(sst2)
    few, many = [-0.5, -0.25, 0.0, 0.25, 0.5], [round(0.1 * k - 0.5, 1) for k in range(11)]
    moments, steps, epochs = ([2, 4], 5, 0.05) if quick else ([200, 1000], 800, 3)
    rates = [1e-3, 1e-2] if quick else [1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2]
    word_rates = [4e-3] if quick else [4e-3, 1.6e-2, 6.4e-2]

    errors = each_seed(fit_sines, few, moments)
    sines = {f"after {moment} steps": over_seeds(errors[:, k]) for k, moment in enumerate(moments)}
    accuracy = each_seed(rare_features, many, rates, steps)
    features: dict[str, Any] = {"p": many, "lr": rates, "steps": steps}
    for k, grafting in enumerate(GRAFTINGS):
        own = accuracy[:, k]
        parts = {"source": own[..., 0], "cross": own.mean(-1), "worst": own.min(-1)}
        best = [[best_exponent(many, run) for run in runs] for runs in parts["cross"]]
        slopes = [np.polyfit(np.log10(rates), seed, 1)[0] for seed in best]
        parts |= {"best_p": best, "slope_per_decade": slopes}
        features[grafting] = {name: over_seeds(part) for name, part in parts.items()}
    accuracy = each_seed(rare_words, few, word_rates, epochs, bags)
    chosen = accuracy[..., 0].mean(0).argmax(0)  # the rate of each p, by validation
    words: dict[str, Any] = {"p": few, "accuracy": over_seeds(accuracy[:, chosen, range(len(few)), 1])}
    name = "SST-2" if sst2 else "topics of docstrings"
    words |= {"name": name, "lr": [word_rates[k] for k in chosen], "words": bags[0][0].shape[1]}
    return {"seeds": seeds, "sines": {"p": few, **sines}, "features": features, "words": words}


def table(title: str, heads: list[str], rows: dict[str, np.ndarray]) -> None:
    """Print means and standard errors in percent."""
    print(f"\n{title}, %\n{'':>12}" + "".join(f"{head:>11}" for head in heads))
    for name, row in rows.items():
        print(f"{name:>12}" + "".join(f"{f'{mean:.1f}±{error:.1f}':>11}" for mean, error in 100 * row.T))


def print_tables(results: dict[str, Any]) -> None:
    """Print all figures."""
    a, b, c = (results[key] for key in ("sines", "features", "words"))
    for moment in [key for key in a if key != "p"]:
        title = f"a. Error of each sine {moment}, as a share of its amplitude"
        table(
            title, [f"sin {k} pi x" for k in FREQUENCIES], {f"p={p:g}": a[moment][:, k] for k, p in enumerate(a["p"])}
        )
    for grafting in GRAFTINGS:
        for part, words in PARTS.items():
            rows = {f"rate {lr:.2g}": b[grafting][part][:, k] for k, lr in enumerate(b["lr"])}
            table(f'b. grafting="{grafting}": accuracy {words}', [f"p={p:g}" for p in b["p"]], rows)
        best = ", ".join(f"{p:.2f}±{error:.2f}" for p, error in b[grafting]["best_p"].T)
        print("   best p by rate: {}; slope {:.3f}±{:.3f} a decade".format(best, *b[grafting]["slope_per_decade"]))
    title = f"c. {c['name']}, {c['words']} words: test accuracy (rates {', '.join(f'{lr:g}' for lr in c['lr'])})"
    table(title, [f"p={p:g}" for p in c["p"]], {"": c["accuracy"]})


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the picture."""
    a, b, c = (results[key] for key in ("sines", "features", "words"))
    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    (sines, accuracy), (best, words) = axes

    def line(axis: Any, x: Any, figures: np.ndarray, style: int, **options: Any) -> None:
        axis.errorbar(x, *figures, color=COLOURS[style], marker="osD^"[style], capsize=3, **options)

    moments = [key for key in a if key != "p"]
    for style, p in enumerate((-0.5, 0.0, 0.5)):
        for moment, dash in zip(moments, ("-", ":"), strict=True):
            errors = 100 * a[moment][:, a["p"].index(p)]
            line(sines, range(len(FREQUENCIES)), errors, style, linestyle=dash, label=f"p = {p:g} {moment}")
    sines.set_xticks(range(len(FREQUENCIES)), [rf"$\sin {k if k > 1 else ''}\pi x$" for k in FREQUENCIES])
    sines.set(title="a. Sum of sines: error of each", ylabel="% of its amplitude")
    rate = int(b["adam"]["cross"][0].max(1).argmax())
    for style, (part, text) in enumerate(PARTS.items()):
        line(accuracy, b["p"], 100 * b["adam"][part][:, rate], style, label=text)
    accuracy.set(title=f"b. Rare spurious features (rate {b['lr'][rate]:.2g})", xlabel="p", ylabel="accuracy (%)")
    for style, grafting in enumerate(GRAFTINGS):
        text = 'grafting="{}": {:.2f}±{:.2f} a decade'.format(grafting, *b[grafting]["slope_per_decade"])
        line(best, b["lr"], b[grafting]["best_p"], style, label=text)
    best.set(title="b. Best p over all environments", xscale="log", xlabel="learning rate", ylabel="p (-0.5 to 0.5)")
    line(words, c["p"], 100 * c["accuracy"], 0, label="best rate of each p")
    words.set(title=f"c. Rare words: {c['name']}", xlabel="p", ylabel="test accuracy (%)")
    for axis in axes.flat:
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run all three, write and print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="of what_p_does.png and what_p_does.json")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--sst2", help="folder of SST-2's parquet files, for part c (default: docstrings)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few models: tests that it runs")
    options = parser.parse_args(args)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give 1 or more")
    start = time.perf_counter()
    results = run(options.seeds, options.sst2, options.quick)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=lambda x: {"mean": x[0].tolist(), "error": x[1].tolist()})
    (options.output_dir / "what_p_does.json").write_text(text + "\n", encoding="utf-8")
    draw(results, options.output_dir / "what_p_does.png")
    print_tables(results)
    seconds = time.perf_counter() - start
    print(f"\nWrote what_p_does.png and what_p_does.json to {options.output_dir} after {seconds:.0f} s")
    return results


if __name__ == "__main__":
    main()
