# SPDX-License-Identifier: Apache-2.0
"""The picture of one or two training runs: losses, what the optimizer's controller did, validation accuracy."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)
from matplotlib.axes import Axes  # noqa: E402

LOSS_COLOURS = ("tab:blue", "tab:orange")
CONTROL_COLOURS = ("tab:green", "tab:red")


def series(history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of one key of the Trainer's log."""
    rows = [entry for entry in history if key in entry]
    return [entry["step"] for entry in rows], [entry[key] for entry in rows]


def plot_runs(path: Path, title: str, names: list[str], histories: list[list[dict[str, float]]]) -> None:
    """Draw the runs one over the other and save the picture.

    Args:
        path: of the PNG file.
        title: heading.
        names: optimizers, one for each run.
        histories: the Trainer's log of each run.
    """
    controlled = [
        (name, history)
        for name, history in zip(names, histories, strict=True)
        if any("nsf_p" in entry or "lcam_momentum" in entry for entry in history)
    ]
    count = 2 + len(controlled)
    figure, axes = plt.subplots(count, 1, sharex=True, figsize=(9, 1 + 2.3 * count), layout="constrained")
    figure.suptitle(title)
    _draw_losses(axes[0], names, histories)
    for axis, colour, (name, history) in zip(axes[1:-1], CONTROL_COLOURS, controlled, strict=False):
        _draw_control(axis, colour, name, history)
    _draw_accuracies(axes[-1], names, histories)
    axes[-1].set_xlabel("step (optimizer updates)")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_losses(axis: Axes, names: list[str], histories: list[list[dict[str, float]]]) -> None:
    for name, colour, history in zip(names, LOSS_COLOURS, histories, strict=False):
        axis.plot(*series(history, "loss"), color=colour, linewidth=1, label=name)
        steps, means = series(history, "lcam_loss_mean")
        if steps:
            axis.plot(steps, means, color=colour, linewidth=1.2, linestyle="--", label=f"{name}: loss mean")
    axis.set_ylabel("training loss")


def _draw_control(axis: Axes, colour: str, name: str, history: list[dict[str, float]]) -> None:
    """Draw the exponent p, or the momentum with the updates of low loss shaded."""
    steps, exponents = series(history, "nsf_p")
    if steps:
        axis.plot(steps, exponents, color=colour, linewidth=1.2, label=f"{name}: p")
        axis.set_ylabel("exponent p")
        return
    steps, momenta = series(history, "lcam_momentum")
    axis.plot(steps, momenta, color=colour, linewidth=1, drawstyle="steps-mid", label=f"{name}: momentum")
    steps, phases = series(history, "lcam_loss_phase")
    axis.fill_between(
        steps,
        0,
        phases,
        step="mid",
        transform=axis.get_xaxis_transform(),
        color="tab:gray",
        alpha=0.25,
        linewidth=0,
        label="loss phase: low",
    )
    axis.set_ylabel("momentum")


def _draw_accuracies(axis: Axes, names: list[str], histories: list[list[dict[str, float]]]) -> None:
    for name, colour, history in zip(names, LOSS_COLOURS, histories, strict=False):
        steps, values = series(history, "eval_accuracy")
        axis.plot(steps, [100 * value for value in values], "o-", color=colour, markersize=4, label=name)
    axis.set_ylabel("validation accuracy (%)")
