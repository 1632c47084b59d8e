# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs from the Trainer's log, and of a cycle of p before a run: `python -m hf_nsf.plots --help`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

try:
    import matplotlib.pyplot  # noqa: F401 (a notebook shows figures only after this import)
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter
except ImportError as problem:
    raise ImportError(f"hf_nsf.plots needs matplotlib: pip install 'hf_nsf[plots]' ({problem})") from None

# Okabe and Ito's palette without its yellow, then Tol's; dashes and markers help readers who see colours differently.
_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9 #882255 #999933 #8C8C8C #332288 #8B5A2B".split()
_DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1)), (0, (9, 2)))
_MARKERS = "osD^v<>PXph*"
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.labelpad": 6, "axes.xmargin": 0.01, "lines.linewidth": 1.5, "legend.frameon": False,
    "figure.dpi": 150, "text.parse_math": False, "axes.formatter.useoffset": False, "axes.formatter.limits": (-12, 12),
}  # fmt: skip
_NAMES = {"loss": "training loss", "nsf_p": "exponent p", "lcam_momentum": "momentum", "learning_rate": "learning rate"}
STEPS, SEEDS = "step (updates)", "   ·   means where all seeds logged; bands, bars: standard error"
_NO_METRICS = ("runtime", "_per_second", "_time")  # endings of other names that start with eval_
Series = dict[float, float]  # values by step


def plot_runs(
    *log_histories: list[dict[str, Any]], labels: Sequence[str] | None = None, learning_rate: bool = False
) -> Figure:
    """Draw runs over each other: loss, p, momentum with the phases of low loss shaded, each evaluation metric.

    Runs of the same label are seeds of one configuration: their mean is drawn, with its standard error.

    Args:
        log_histories: `trainer.state.log_history` of each run. Entries without a step are left out.
        labels: one for each run.
        learning_rate: draw it too.

    Returns:
        The figure, to be shown by a notebook or saved by its `savefig`.

    Raises:
        ValueError: a run has neither losses nor evaluation metrics, or the numbers of runs and labels differ.
    """
    labels = [f"run {index + 1}" for index in range(len(log_histories))] if labels is None else labels
    if not log_histories or len(labels) != len(log_histories):
        raise ValueError(f"plot_runs needs one label for each run, got {len(labels)} for {len(log_histories)} runs.")
    groups: dict[str, list[dict[str, Series]]] = {}
    for label, history in zip(labels, log_histories, strict=True):
        run = numbers(history)
        if not metrics(run):
            raise ValueError(f"The log of {label} holds no losses and no evaluation metrics.")
        groups.setdefault(label, []).append(run)
    names = {name: None for runs in groups.values() for run in runs for name in run}
    controls = ("nsf_p", "lcam_momentum", "learning_rate") if learning_rate else ("nsf_p", "lcam_momentum")
    keys = metrics(names)
    keys[1:1] = [key for key in controls if key in names]
    columns = 1 if len(keys) <= 5 else 2
    with style():
        texts = [f"{label}: {len(runs)} seeds" if len(runs) > 1 else label for label, runs in groups.items()]
        texts = [wrap(str(text), 100) for text in texts] + ["phase of low loss"]
        width = 4.5 + 3 * columns
        legend_columns = max(1, min(3, int(14 * width) // (8 + max(map(len, texts)))))
        legend_rows = "\n".join(texts).count("\n") // legend_columns + 1
        figure = new_figure(width, 0.9 + 0.2 * legend_rows + 1.8 * math.ceil(len(keys) / columns))
        axes = panels(figure, keys, columns)
        for index, runs in enumerate(groups.values()):
            for key, axis in axes.items():
                draw(axis, key, [run[key] for run in runs if key in run], index)
        handles: list[Any] = [Line2D([], [], **look(index)) for index in range(len(groups))]
        single = [(index, runs[0]) for index, runs in enumerate(groups.values()) if len(runs) == 1]
        phases = [(index, run["lcam_loss_phase"]) for index, run in single if "lcam_loss_phase" in run]
        if phases and "lcam_momentum" in axes:
            _shade(axes["lcam_momentum"], phases)
            handles.append(Patch(color="0.5", alpha=0.35, lw=0))
        place: Any = {"loc": "outside upper left", "ncols": legend_columns, "handlelength": 3.2}
        legend = figure.legend(handles, ["?"] * len(handles), **place)
        for entry, text in zip(legend.get_texts(), texts, strict=False):
            entry.set_text(text)  # as a label, one that starts with _ would be left out
        figure.supxlabel(STEPS + SEEDS * (len(groups) < len(log_histories)), fontsize=9)
    return figure


def plot_cycle(**options: Any) -> Figure:
    """Preview the schedule of p over `total_steps` updates, else over four periods.

    The options are those of :func:`hf_nsf.p_schedule`, and so are the errors.
    """
    from .optim.p_cycle import DEFAULT_CYCLE_STEPS, p_schedule  # not above: pictures of runs need no torch

    steps = range(math.ceil(options.get("total_steps") or 4 * (options.get("cycle_steps") or DEFAULT_CYCLE_STEPS)))
    values = p_schedule(steps, **options)
    with style():
        figure = new_figure(7.5, 2.9)
        axis = panels(figure, ["nsf_p"])["nsf_p"]
        axis.plot(steps, values, color=_COLOURS[0])
        axis.set_xlabel(STEPS)
    return figure


def style() -> Any:
    """A context in which figures are drawn in this module's style."""
    return rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(figure: FigureBase, keys: list[str], columns: int = 1) -> dict[str, Axes]:
    """Panels with a common axis of steps, in rows of so many columns."""
    rows: Any = [keys[k : k + columns] for k in range(0, len(keys), columns)]
    rows[-1] += ["."] * (columns - len(rows[-1]))
    axes = figure.subplot_mosaic(rows, sharex=True)
    for key, axis in axes.items():
        axis.set_ylabel(_NAMES.get(key, key))
    for key in keys[-columns:]:
        axes[key].tick_params(labelbottom=True)  # those above an empty place, too
    figure.align_ylabels()
    return axes


def look(index: int) -> dict[str, Any]:
    """Line style of a configuration. From the 13th on, colours return with hollow markers in all panels."""
    colour = _COLOURS[index % 12]
    marker = {"marker": _MARKERS[index % 12], "ms": 4, "mfc": colour if index < 12 else "white"}
    return {"color": colour, "ls": _DASHES[index % 5], **marker}


def wrap(text: str, width: int) -> str:
    """Break lines longer than `width`, after a comma, colon or space if there is one; keep everything else."""
    part = rf".{{1,{width}}}(?:(?<=[,: ])|$)|.{{{width}}}"
    return "\n".join("\n".join(re.findall(part, line)) for line in text.split("\n"))


def _number(value: Any) -> float | None:
    """Python's and numpy's real numbers as floats, None for anything else."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf


def numbers(history: Any) -> dict[str, Series]:
    """The numbers logged, the last one at each step; gaps (nan) where they are not finite or cannot be drawn."""
    found: dict[str, Series] = {}
    for entry in history if isinstance(history, (list, tuple)) else ():
        step = _number(entry.get("step")) if isinstance(entry, dict) else None
        if step is None or not abs(step) < 1e15:
            continue
        for name, value in entry.items():
            if (number := _number(value)) is not None:
                found.setdefault(str(name), {})[step] = number if abs(number) < 1e100 else math.nan
    return found


def metrics(names: Iterable[str]) -> list[str]:
    """The loss and the evaluation metrics, in this order."""
    found = [name for name in names if name == "loss" or name.startswith("eval_") and not name.endswith(_NO_METRICS)]
    return sorted(found, key=lambda name: (name != "loss", name != "eval_loss"))


def _moving_mean(values: Any, width: int) -> Any:
    """Centred means over `width` values, over fewer at the ends; gaps stay gaps and spread no further."""
    known = ~np.isnan(values)
    total, count = (np.convolve(x, np.ones(width), "same") for x in (np.where(known, values, 0.0), known.astype(float)))
    return np.where(known, total / np.maximum(count, 1), np.nan)


def draw(axis: Axes, key: str, runs: list[Series], index: int) -> None:
    """Draw the runs of one configuration into a panel: one run, or the mean of several with its standard error."""
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    if not common:
        for run in runs if len(runs) > 1 else ():  # logged at different steps
            draw(axis, key, [run], index)
        return
    style = look(index)
    colour, control = style["color"], key in _NAMES
    steps, table = np.array(common), np.array([[run[step] for step in common] for run in runs])
    drawstyle: Any = "default"
    # A mean of some runs' two momenta says nothing without the steps around it.
    if key in ("loss", "lcam_momentum") and len(common) > 80 or key == "lcam_momentum" and len(runs) > 1:
        if key == "loss" and len(runs) == 1:
            axis.plot(steps, table[0], color=colour, lw=0.6, alpha=0.2, zorder=1)
        width = min(max(len(steps) // 40, 4), 1000) | 1  # limited, so that the time is linear in the length
        table = np.array([_moving_mean(_moving_mean(row, width), width) for row in table])
        axis.set_ylabel(f"{_NAMES[key]}\n(moving mean)")
    elif key == "lcam_momentum":
        drawstyle = "steps-mid"
    mean, every = table.mean(axis=0), math.ceil(len(steps) / 12)
    places: Any = (index % every, every)
    style["markevery"] = [] if control and index < 12 and len(steps) > 1 else places
    if key == "nsf_p":  # points alone: lines between points of different cycles would show a cycle that is none
        style |= {"ls": "none", "marker": style["marker"] if len(steps) < 100 else ".", "ms": 3, "markevery": None}
    axis.plot(steps, mean, zorder=3, drawstyle=drawstyle, **style)
    if len(runs) > 1:
        error = table.std(axis=0, ddof=1) / math.sqrt(len(runs))
        if control:
            axis.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        else:  # a band would not show at a single one
            axis.errorbar(steps, mean, error, color=colour, fmt="none", capsize=2, elinewidth=1, errorevery=places)
    scale_losses(axis, key)


def scale_losses(axis: Axes, name: str) -> None:
    """Make the axis of a loss logarithmic if its values, all above 0, are far apart, as where a run diverged."""
    low, high = axis.dataLim.intervaly
    if name.endswith("loss") and low > 0 and high > 100 * low:
        log_scale(axis.set_yscale, axis.yaxis)
    elif axis.get_yscale() == "log":  # for the runs drawn so far
        axis.set_yscale("linear")


def log_scale(set_scale: Any, axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Make an axis logarithmic, with plain numbers as labels, for certain ticks or for powers of ten."""
    set_scale("log")
    if ticks is not None:
        axis.set_ticks(ticks)
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _shade(axis: Axes, phases: list[tuple[int, Series]]) -> None:
    """Shade the steps taken in a phase of low loss: the whole panel for one run, a strip for each of several."""
    low, high = axis.get_ylim()
    several, height = len(phases) > 1, min(0.08, 0.6 / len(phases))
    for row, (index, run) in enumerate(phases):
        place = (height * (row + 1 / 8), height * 3 / 4) if several else (0.0, 1.0)
        steps, phase = (np.array(column) for column in zip(*sorted(run.items()), strict=True))
        edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
        spans = edges[np.flatnonzero(np.diff(phase == 1, prepend=False, append=False))].reshape(-1, 2)
        look: Any = {"color": _COLOURS[index % 12] if several else "0.5", "alpha": 0.35, "lw": 0, "snap": False}
        ranges = [(start, end - start) for start, end in spans.tolist()]
        axis.broken_barh(ranges, place, transform=axis.get_xaxis_transform(), **look)
    axis.set_ylim(high - (high - low) / (1 - height * len(phases)) if several else low, high)


def _states(folder: Path) -> list[Path]:
    """The states of the Trainer in a folder: its own, and those of its checkpoints, the latest first."""
    found = folder.glob("checkpoint-*/trainer_state.json")
    latest = sorted(found, key=lambda file: int("0" + re.sub(r"\D", "", file.parent.name)), reverse=True)
    return [*folder.glob("trainer_state.json"), *latest]


def _read(run: Path) -> list[Any]:
    """The log of a run: of the latest state in its folder and checkpoints that is whole."""
    files = [run] if run.is_file() else _states(run)
    found: list[tuple[float, list[Any]]] = []
    damaged = []
    for file in files:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            found.append((_number(state.get("global_step")) or 0.0, list(state["log_history"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(file)
        if found and file.parent != run:
            break  # the checkpoints before this one are older
    if not found:
        raise ValueError(f"{damaged[0]} is no trainer_state.json, or damaged.")
    for file in damaged:
        print(f"{file} is no trainer_state.json, or damaged. It is left out.", file=sys.stderr)
    return max(found, key=lambda state: state[0])[1]


def _load(name: Path) -> list[tuple[Path, list[Any]]]:
    """The run of this name with its log, or the runs in a folder of this name."""
    if not name.exists():
        raise ValueError(f"There is no file or folder {name}.")
    if name.is_file() or _states(name):
        return [(name, _read(name))]
    found = []
    for run in sorted(path for path in name.iterdir() if path.is_dir() and _states(path)):
        try:
            found.append((run, _read(run)))
        except ValueError as error:
            print(f"{error} It is left out.", file=sys.stderr)
    if not found:
        raise ValueError(f"{name} holds no trainer_state.json, nor does a checkpoint-N or another folder in it.")
    return found


def _labels(runs: Sequence[Path]) -> list[str]:
    """The names of the runs' folders, or the runs as named where these are the same."""
    folders = [(run.parent if run.is_file() else run).resolve() for run in runs]
    names = ["/".join(folder.parts[-1 - folder.name.startswith("checkpoint-") :]) for folder in folders]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    """Draw the runs that the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_nsf.plots", description="Draw runs of the Trainer in one PNG.")
    add = parser.add_argument
    kinds = "output_dir, checkpoint, trainer_state.json, or a folder of these"
    add("runs", nargs="+", type=Path, metavar="RUN", help=kinds)
    add("--output", type=Path, default=Path("runs.png"), help="default: runs.png")
    add("--labels", nargs="+", help="one for each run; the same for seeds of one configuration")
    add("--learning_rate", action="store_true", help="draw the learning rate too")
    options = parser.parse_args(arguments)
    try:
        runs, histories = zip(*(found for name in options.runs for found in _load(name)), strict=True)
        labels = options.labels or _labels(runs)
        options.output = options.output if options.output.suffix else options.output.with_suffix(".png")
        plot_runs(*histories, labels=labels, learning_rate=options.learning_rate).savefig(options.output)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(str(options.output).encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
