# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs from the Trainer's log, and of a cycle of p before a run: `python -m hf_nsf.plots --help`."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
import textwrap
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .optim.p_cycle import DEFAULT_CYCLE_STEPS, p_schedule

try:
    import matplotlib.pyplot  # noqa: F401 (a notebook shows figures only after this import)
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ImportError as problem:
    raise ImportError(f"hf_nsf.plots needs matplotlib: pip install 'hf_nsf[plots]' ({problem})") from None

# Okabe and Ito's palette without its yellow, for readers who see colours differently; dashes and markers help them too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1)), (0, (9, 2)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = "osD^v<>"
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.labelpad": 6, "axes.xmargin": 0.01, "lines.linewidth": 1.5, "legend.frameon": False,
    "figure.dpi": 150,
}  # fmt: skip
_NAMES = {"loss": "training loss", "nsf_p": "exponent p", "lcam_momentum": "momentum", "learning_rate": "learning rate"}
_NO_METRICS = ("runtime", "_per_second", "_time")  # how other names that start with eval_ end
_OF_ONE_RUN = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint")
_Run = dict[str, dict[int, float]]  # the values of each name by step


def plot_runs(
    *log_histories: list[dict[str, Any]], labels: Sequence[str] | None = None, learning_rate: bool = False
) -> Figure:
    """Draw runs over each other: loss, p, momentum with the phases of low loss shaded, each evaluation metric.

    Runs of the same label are seeds of one configuration: their mean is drawn, with its standard error.

    Args:
        log_histories: `trainer.state.log_history` of each run.
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
    groups: dict[str, list[_Run]] = {}
    for label, history in zip(labels, log_histories, strict=True):
        run = _values(history)
        if not _metrics(run):
            raise ValueError(f"The log of {label} holds no losses and no evaluation metrics.")
        groups.setdefault(label, []).append(run)
    names = {name: None for runs in groups.values() for run in runs for name in run}
    controls = ("nsf_p", "lcam_momentum", "learning_rate") if learning_rate else ("nsf_p", "lcam_momentum")
    keys = _metrics(names)
    keys[1:1] = [key for key in controls if key in names]
    handles: list[Any] = []
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(keys)
        for index, (label, runs) in enumerate(groups.items()):
            for key, axis in axes.items():
                if logged := [run[key] for run in runs if key in run]:
                    _draw(axis, key, logged, index)
            text = textwrap.fill(f"{label}: {len(runs)} seeds" if len(runs) > 1 else label, 100)
            handles.append(Line2D([], [], label=text, **_line(index)))
        single = [(index, runs[0]) for index, runs in enumerate(groups.values()) if len(runs) == 1]
        if phases := [(index, run["lcam_loss_phase"]) for index, run in single if "lcam_loss_phase" in run]:
            _shade(axes["lcam_momentum"], phases)
            handles.append(Patch(color="0.5", alpha=0.35, lw=0, label="phase of low loss"))
        columns = int(14 * figure.get_figwidth()) // (8 + max(len(handle.get_label()) for handle in handles))
        figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(3, columns)), handlelength=3.2)
        bands = "   ·   bands, bars: standard error of the mean" if len(groups) < len(log_histories) else ""
        figure.supxlabel(f"step (updates){bands}", fontsize=9)
    return figure


def plot_cycle(**options: Any) -> Figure:
    """Preview the schedule of p over `total_steps` updates, else over four periods.

    The options are those of :func:`hf_nsf.p_schedule`, and so are the errors.
    """
    steps = range(math.ceil(options.get("total_steps") or 4 * (options.get("cycle_steps") or DEFAULT_CYCLE_STEPS)))
    values = p_schedule(steps, **options)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(["nsf_p"])
        axes["nsf_p"].plot(steps, values, color=_COLOURS[0])
        axes["nsf_p"].set_xlabel("step (updates)")
    return figure


def _panels(keys: list[str]) -> tuple[Figure, dict[str, Axes]]:
    """One panel above the other with a common axis of steps; two columns if there are many."""
    columns = 1 if len(keys) <= 5 else 2
    rows: Any = [keys[k : k + columns] for k in range(0, len(keys), columns)]
    rows[-1] += ["."] * (columns - len(rows[-1]))
    figure = Figure(figsize=(4.5 + 3 * columns, 1.1 + 1.8 * len(rows)), layout="constrained")
    axes = figure.subplot_mosaic(rows, sharex=True)
    for key, axis in axes.items():
        axis.set_ylabel(_NAMES.get(key, key))
    figure.align_ylabels()
    return figure, axes


def _line(index: int) -> dict[str, Any]:
    """How the lines of a configuration look: from the eighth on colours return, with hollow markers in all panels."""
    colour = _COLOURS[index % 7]
    marker = {"marker": _MARKERS[index % 7], "ms": 4, "mfc": colour if index < 7 else "white"}
    return {"color": colour, "ls": _DASHES[index % 6], **marker}


def _values(history: list[dict[str, Any]]) -> _Run:
    """The numbers logged, the last one at each step; what is not finite becomes a gap in the line."""
    found: _Run = {}
    for entry in history:
        for name, value in entry.items():
            if isinstance(value, (int, float)):
                found.setdefault(name, {})[entry["step"]] = value if math.isfinite(value) else math.nan
    return found


def _metrics(names: Iterable[str]) -> list[str]:
    """The loss and the evaluation metrics, in this order."""
    found = [name for name in names if name == "loss" or name.startswith("eval_") and not name.endswith(_NO_METRICS)]
    return sorted(found, key=lambda name: (name != "loss", name != "eval_loss"))


def _moving_mean(values: Any, width: int) -> Any:
    """Centred means over `width` values, over fewer at the ends; gaps stay gaps and spread no further."""
    known = ~np.isnan(values)
    total, count = (np.convolve(x, np.ones(width), "same") for x in (np.where(known, values, 0.0), known.astype(float)))
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _draw(axis: Axes, key: str, runs: list[dict[int, float]], index: int) -> None:
    """Draw the runs of one configuration into a panel."""
    colour, evaluation = _COLOURS[index % 7], key.startswith("eval_")
    steps = sorted(set.intersection(*map(set, runs)) or set().union(*runs))
    table = np.array([[run.get(step, math.nan) for step in steps] for run in runs])
    width = len(steps) // 40 | 1
    step: Any = "mid" if key == "lcam_momentum" else None
    if key in ("loss", "lcam_momentum") and width > 1:
        if key == "loss" and len(runs) == 1:
            axis.plot(steps, table[0], color=colour, lw=0.6, alpha=0.2, zorder=1)
        table, step = np.array([_moving_mean(_moving_mean(row, width), width) for row in table]), None
        axis.set_ylabel(f"{_NAMES[key]}\n(moving mean)")
    mean, every = table.mean(axis=0), math.ceil(len(steps) / 12)
    places: Any = (index % every, every)
    look: Any = {**_line(index), "markevery": places if evaluation or index > 6 else []}
    axis.plot(steps, mean, zorder=3, drawstyle="steps-mid" if step else "default", **look)
    if len(runs) > 1:
        error = table.std(axis=0, ddof=1) / math.sqrt(len(runs))
        if evaluation:  # a band would not show at a single one
            axis.errorbar(steps, mean, error, color=colour, fmt="none", capsize=2, elinewidth=1, errorevery=places)
        else:
            axis.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, lw=0, step=step)
    low, high = axis.dataLim.intervaly
    if key.endswith("loss") and low > 0 and high > 100 * low:  # as where a run diverged
        axis.set_yscale("log")


def _shade(axis: Axes, phases: list[tuple[int, dict[int, float]]]) -> None:
    """Shade the steps taken in a phase of low loss: the whole panel for one run, a strip for each of several."""
    low, high = axis.get_ylim()
    several = len(phases) > 1
    if several:
        axis.set_ylim(high - (high - low) / (1 - 0.08 * len(phases)), high)
    for row, (index, run) in enumerate(phases):
        bottom, top = (0.08 * row + 0.01, 0.08 * row + 0.07) if several else (0.0, 1.0)
        heights = [top if phase == 1 else bottom for phase in run.values()]
        look: Any = {"color": _COLOURS[index % 7] if several else "0.5", "alpha": 0.35, "lw": 0, "step": "mid"}
        axis.fill_between(list(run), bottom, heights, transform=axis.get_xaxis_transform(), **look)


class _Settings(pickle.Unpickler):
    """Reads the values in a training_args.bin without calling anything it names: the run may be somebody else's."""

    class Named:
        def __init__(self, *arguments: Any) -> None:
            self.arguments = arguments

    def find_class(self, module: str, name: str) -> Any:
        return self.Named


def _settings(folder: Path) -> dict[str, Any]:
    """The plain values of a run's TrainingArguments; nothing if the file is missing or of an unknown format."""
    try:
        with zipfile.ZipFile(folder / "training_args.bin") as archive:
            data = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            found = vars(_Settings(archive.open(data)).load())
        found["optim"] = getattr(found["optim"], "arguments", [found["optim"]])[0]
        return {key: value for key, value in found.items() if isinstance(value, (str, int, float, type(None)))}
    except Exception:
        return {}


def _read(run: Path) -> tuple[list[dict[str, Any]], Path]:
    """The log of a run and its file: the run itself, or the latest state in its folder and checkpoints."""
    if not run.exists():
        raise ValueError(f"There is no file or folder {run}.")
    files = [run] if run.is_file() else [*run.glob("checkpoint-*/trainer_state.json"), *run.glob("trainer_state.json")]
    states = []
    for file in files:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            states.append((state["global_step"], [dict(entry) for entry in state["log_history"]], file))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is no trainer_state.json.") from None
    if not states:
        raise ValueError(f"{run} holds no trainer_state.json, nor does a checkpoint-N in it.")
    _, history, file = max(states, key=lambda state: state[0])
    return history, file


def _labels(runs: Sequence[Path], files: Sequence[Path]) -> list[str]:
    """Optimizer and options, or else the run as named; the same for runs that differ in nothing but their seeds."""
    settings = [_settings(file.parent) for file in files]
    several_rates = len({found["learning_rate"] for found in settings if found}) > 1
    texts = [str(run) for run in runs]
    for index, found in enumerate(settings):
        if found:
            options = f" ({found['optim_args'].replace(',', ', ')})" if found.get("optim_args") else ""
            rate = f", lr {found['learning_rate']:g}" if several_rates else ""
            texts[index] = f"{found['optim']}{options}{rate}"
    labels = []
    for run, text in zip(runs, texts, strict=True):
        same = [found for found, other in zip(settings, texts, strict=True) if other == text]
        seeds = {found.get("seed") for found in same}
        rests = {frozenset(item for item in found.items() if item[0] not in _OF_ONE_RUN) for found in same}
        labels.append(text if len(seeds) == len(same) and len(rests) == 1 else f"{text}: {run}")
    return labels


def main(arguments: list[str] | None = None) -> int:
    """Draw the runs that the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_nsf.plots", description="Draw runs of the Trainer in one PNG.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output_dir, checkpoint or trainer_state.json")
    add("--output", type=Path, default=Path("runs.png"), help="default: runs.png")
    add("--labels", nargs="+", help="one for each run; the same for seeds of one configuration")
    add("--learning_rate", action="store_true", help="draw the learning rate too")
    options = parser.parse_args(arguments)
    try:
        histories, files = zip(*(_read(run) for run in options.runs), strict=True)
        labels = options.labels or _labels(options.runs, files)
        plot_runs(*histories, labels=labels, learning_rate=options.learning_rate).savefig(options.output)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
