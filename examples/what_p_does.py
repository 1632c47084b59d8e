# SPDX-License-Identifier: Apache-2.0
"""What NSF's exponent p does: three small experiments and one picture, in a few minutes on 2 cores.

    python examples/what_p_does.py --output_dir out

a. Frequencies: a small network fits a sum of sines. Which of them does it learn first?
b, c. Rare features that mislead, a problem of the kind of arXiv 2609.30271: a linear classifier learns where rare
   spurious features agree with the label, and is tested where they agree less, or disagree. A lower rate may do what a
   lower p does, so b shows all rates of each p, and of SGD; c shows the rate that validation chooses for each.
d. Rare words: a linear classifier of bags of words, where rare words carry the label: topics of docstrings.

In each, p is constant and all else is equal; figures are means over the seeds with their standard errors. That low p
resists rare features that mislead was seen in this linear problem only.
"""

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import joblib
import numpy as np
import torch
from embedded_data import load_bags
from figures import make_parser, markdown, over_seeds, subplots, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from hf_nsf import NSF

EXPONENTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
FREQUENCIES = (1, 2, 4, 8)
AGREEMENTS = (0.95, 0.65, 0.35, 0.05)  # of the rare spurious features with the label; the first is where it learns
SPURIOUS, STABLE, DENSE, NOISE = 500, 500, 20, 1980
RARE_SHARE, STABLE_AGREEMENT, DENSE_SHIFT = 0.02, 0.8, 0.25
SOURCE = 95.0  # %, the accuracy where it learnt at which the fronts are compared
METHODS = (*(f"p = {p:g}" for p in EXPONENTS), "SGD 0.9")
MOMENTS, STEPS, WORD_EPOCHS = (200, 1000), 800, 3  # of the experiments a, b and d
RATES, SGD_RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WORD_RATES = (4e-3, 1.6e-2, 6.4e-2)
# Of the methods, by Okabe and Ito, for readers who see colours differently.
STYLES = tuple(zip(("#D55E00", "#E69F00", "#000000", "#56B4E9", "#0072B2", "#009E73"), "o^sDvP", strict=True))


def fit_sines(seed: int, width: int = 64) -> np.ndarray:
    """Experiment a: the error of each sine as a share of its amplitude, of shape (moments, exponents, frequencies)."""
    x = torch.linspace(-1, 1, 257)[:-1, None]
    sines = torch.sin(math.pi * x * torch.tensor(FREQUENCIES))
    errors = np.empty((len(MOMENTS), len(EXPONENTS), len(FREQUENCIES)))
    for k, p in enumerate(EXPONENTS):
        torch.manual_seed(seed)  # the same first weights for each p
        inner = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        model = nn.Sequential(inner, nn.Linear(width, 1))
        optimizer = NSF(model.parameters(), lr=1e-3, p=p, weight_decay=0.0)
        for step in range(1, max(MOMENTS) + 1):
            residual = model(x) - sines.sum(1, keepdim=True)
            optimizer.zero_grad()
            residual.square().mean().backward()
            optimizer.step()
            if step in MOMENTS:  # a sine's square has the mean 1/2
                errors[MOMENTS.index(step), k] = (residual.detach().T @ sines * 2 / len(x)).abs()
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


def rare_features(seed: int, rows: int = 4000, batch: int = 32) -> np.ndarray:
    """Experiment b: accuracies in %, of shape (methods, rates, 1 + environments); the first is the validation's."""
    generator = torch.Generator().manual_seed(seed)
    x, y = draw_environment(rows, AGREEMENTS[0], generator)
    tests = [draw_environment(rows // 4, agreement, generator) for agreement in (AGREEMENTS[0], *AGREEMENTS)]
    first = (2 * torch.rand(x.shape[1], generator=generator) - 1) * x.shape[1] ** -0.5  # as nn.Linear has it
    batches = torch.randint(rows, (STEPS, batch), generator=generator)
    accuracies = []
    for p, k in product((*EXPONENTS, None), range(len(RATES))):
        weights = first.clone().requires_grad_()
        optimizer: Any = torch.optim.SGD([weights], SGD_RATES[k], momentum=0.9)
        if p is not None:
            optimizer = NSF([weights], RATES[k], p=p, weight_decay=0.0)
        for chosen in batches:
            optimizer.zero_grad()
            softplus(-(x[chosen] @ weights) * y[chosen]).mean().backward()
            optimizer.step()
        accuracies.append([100 * ((x @ weights) * y > 0).float().mean().item() for x, y in tests])
    return np.reshape(accuracies, (len(METHODS), len(RATES), -1))


def worst_at_source(source: np.ndarray, worst: np.ndarray) -> float:
    """The worst environment's accuracy where that of the source first reaches `SOURCE`, between rates on a line."""
    k = int(np.argmax(source >= SOURCE))  # 0 also where none reaches it
    return float(np.interp(SOURCE, source[k - 1 : k + 1], worst[k - 1 : k + 1])) if k > 0 else math.nan


def rare_words(seed: int, bags: dict[str, tuple[np.ndarray, np.ndarray]], batch: int = 64) -> np.ndarray:
    """Experiment d: accuracies in %, of shape (exponents, rates, validation and test); each seed learns of 80 %."""
    (x, y), *tests = [(torch.tensor(words).float(), torch.tensor(labels)) for words, labels in bags.values()]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(y), generator=generator)[: round(0.8 * len(y))]
    batches = rows[torch.randint(len(rows), (round(WORD_EPOCHS * len(rows) / batch), batch), generator=generator)]
    accuracies = []
    for p, lr in product(EXPONENTS, WORD_RATES):
        weights = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
        optimizer = NSF([weights], lr, p=p, weight_decay=0.0)
        for chosen in batches:
            optimizer.zero_grad()
            cross_entropy(x[chosen] @ weights, y[chosen]).backward()
            optimizer.step()
        right = [(words @ weights).argmax(1) == labels for words, labels in tests]
        accuracies.append([100 * each.float().mean().item() for each in right])
    return np.reshape(accuracies, (len(EXPONENTS), len(WORD_RATES), 2))


def run(seeds: int, jobs: int) -> dict[str, Any]:
    """Run all three experiments; returns their figures."""

    def each_seed(experiment: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
        runs = (joblib.delayed(experiment)(seed, *arguments) for seed in range(seeds))
        return np.stack(joblib.Parallel(jobs)(runs))

    errors = each_seed(fit_sines)
    sines = {f"after {moment} steps": over_seeds(100 * errors[:, k]) for k, moment in enumerate(MOMENTS)}
    accuracy = each_seed(rare_features)
    source, worst = accuracy[..., 1], accuracy[..., 1:].min(-1)
    every, best = range(len(METHODS)), accuracy[..., 0].mean(0).argmax(1)  # the rate of each method, by validation
    features = {
        "rates": RATES,
        "sgd_rates": SGD_RATES,
        "steps": STEPS,
        "source": over_seeds(source),
        "worst": over_seeds(worst),
        "best_worst": over_seeds(worst[:, every, worst.mean(0).argmax(1)]),
        "worst_at_source": over_seeds([[*map(worst_at_source, *seed)] for seed in zip(source, worst, strict=True)]),
        "chosen_rates": [*(RATES[k] for k in best[:-1]), SGD_RATES[best[-1]]],
        "environments_at_chosen_rates": over_seeds(accuracy[:, every, best, 1:]),
    }
    bags = load_bags()
    accuracy = each_seed(rare_words, bags)
    best = accuracy[..., 0].mean(0).argmax(1)
    words = {
        "name": "topics of docstrings",
        "words": bags["train"][0].shape[1],
        "chosen_rates": [WORD_RATES[k] for k in best],
        "accuracy": over_seeds(accuracy[:, range(len(EXPONENTS)), best, 1]),
    }
    return {"seeds": seeds, "methods": METHODS, "sines": sines, "features": features, "words": words}


def table(title: str, heads: list[str], figures: np.ndarray, *labels: Iterable[Any]) -> str:
    """Lay out figures, of shape (mean and error, rows, columns), behind the labels of the rows."""
    rows = [[*label, *figures[:, k].T] for k, label in enumerate(zip(*labels, strict=True))]
    return f"\n{title}\n\n{markdown(heads, *rows)}"


def tables(results: dict[str, Any]) -> str:
    """Lay out all figures in Markdown."""
    a, b, d = (results[key] for key in ("sines", "features", "words"))
    text = f"{results['seeds']} seeds, mean ± standard error, in %.\n"
    heads = ["p", *(f"sin {k} pi x" for k in FREQUENCIES)]
    for moment, errors in a.items():
        text += table(f"a. Error of each sine {moment}, as a share of its amplitude", heads, errors, EXPONENTS)
    heads = ["", *(f"rate {lr:g} (SGD {sgd:g})" for lr, sgd in zip(RATES, SGD_RATES, strict=True))]
    for key, where in (("source", "where it learnt"), ("worst", "in the worst environment")):
        text += table(f"b. Rare features that mislead: accuracy {where}", heads, b[key], METHODS)
    heads = ["", "best of all rates", f"at {SOURCE:g} % where it learnt"]
    figures = np.stack([b["best_worst"], b["worst_at_source"]], -1)
    text += table("b. Accuracy in the worst environment", heads, figures, METHODS)
    heads = ["", "rate", *(f"{100 * agreement:g} % agree" for agreement in AGREEMENTS)]
    figures, rates = b["environments_at_chosen_rates"], b["chosen_rates"]
    text += table("c. Accuracy in each environment, rates chosen where it learnt", heads, figures, METHODS, rates)
    title = f"d. Rare words: {d['name']}, {d['words']} words: test accuracy, rates chosen on validation"
    labels = METHODS[:-1], d["chosen_rates"]
    return text + table(title, ["", "rate", "test accuracy"], d["accuracy"][..., None], *labels)


def draw(results: dict[str, Any]) -> Any:
    """Draw the picture."""
    a, b, d = (results[key] for key in ("sines", "features", "words"))
    figure, axes = subplots(2, 2, 12, 9.5)
    (sines, front), (environments, words) = axes
    for k, (name, (color, marker)) in enumerate(zip(METHODS, STYLES, strict=True)):
        style = {"color": color, "marker": marker, "capsize": 3}
        if k in (0, 2, 4):
            for (moment, errors), dash in zip(a.items(), ("-", ":"), strict=True):
                x, label = range(len(FREQUENCIES)), f"{name} {moment}"
                sines.errorbar(x, *errors[:, k], linestyle=dash, label=label, **style)
        (x, x_error), (y, y_error) = b["source"][:, k], b["worst"][:, k]
        front.errorbar(x, y, y_error, x_error, label=name, **style)
        agreements = [100 * agreement for agreement in AGREEMENTS]
        label = f"{name}, rate {b['chosen_rates'][k]:g}"
        environments.errorbar(agreements, *b["environments_at_chosen_rates"][:, k], label=label, **style)
        if k < len(EXPONENTS):
            label = f"{name}, rate {d['chosen_rates'][k]:g}"
            words.errorbar([EXPONENTS[k]], *d["accuracy"][:, [k]], linestyle="", label=label, **style)
    sines.set(title="a. Sum of sines: error of each", ylabel="% of its amplitude")
    sines.set_xticks(range(len(FREQUENCIES)), [rf"$\sin {k if k > 1 else ''}\pi x$" for k in FREQUENCIES])
    front.set(title="b. Rare features that mislead: all rates", xlabel="accuracy where it learnt (%)")
    front.set_ylabel("accuracy in the worst environment (%)")
    front.axvline(SOURCE, color="#888888", linestyle="--", linewidth=1)
    environments.set(title="c. The same, rates chosen where it learnt", ylabel="accuracy (%)")
    environments.set_xlabel("rare features that agree with the label (%)")
    environments.invert_xaxis()
    words.set(title=f"d. Rare words: {d['name']}", xlabel="p", ylabel="test accuracy (%)", xticks=EXPONENTS)
    for axis in axes.flat:
        axis.legend(fontsize=9)
    return figure


def main(args: list[str] | None = None) -> None:
    """Run all three, write and print."""
    options = make_parser(__doc__, seeds=5).parse_args(args)
    results = run(options.seeds, options.jobs)
    write(options.output_dir, __file__, args, results, tables(results), draw(results))


if __name__ == "__main__":
    main()
