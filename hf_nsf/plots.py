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

# Okabe and Ito's palette without its yellow, for readers who see colours differently; styles and markers help them too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1)), (0, (9, 2)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX"
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.labelpad": 6, "axes.xmargin": 0.01, "lines.linewidth": 1.5, "legend.frameon": False,
    "figure.dpi": 150,
}  # fmt: skip
_NAMES = {"loss": "training loss", "nsf_p": "exponent p", "lcam_momentum": "momentum", "learning_rate": "learning rate"}
_NO_METRICS = ("runtime", "_per_second", "_time")  # how other names that start with eval_ end
_OF_ONE_RUN = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint")
_Log = list[dict[str, Any]]


def plot_runs(*log_histories: _Log, labels: Sequence[str] | None = None, learning_rate: bool = False) -> Figure:
    """Draw runs over each other: loss, p, momentum with the phases of low loss shaded, each evaluation metric.

    Runs of the same label are seeds of one configuration: their mean is drawn, with a band of its standard error.

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
    groups: dict[str, list[_Log]] = {}
    for label, history in zip(labels, log_histories, strict=True):
        if not _metrics([history]):
            raise ValueError(f"The log of {label} holds no losses and no evaluation metrics.")
        groups.setdefault(label, []).append(history)
    keys = _metrics(log_histories)
    others = ["nsf_p", "lcam_momentum", *(["learning_rate"] if learning_rate else [])]
    keys[1:1] = [key for key in others if any(key in entry for history in log_histories for entry in history)]
    handles: list[Any] = []
    notes: set[str] = set()
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(keys)
        for index, (label, histories) in enumerate(groups.items()):
            for key, axis in axes.items():
                runs = [run for run in (_values(history, key) for history in histories) if run]
                notes |= _draw(axis, key, runs, index, faint=0.3 if len(groups) < 4 else 0.1) if runs else set()
            text = textwrap.fill(f"{label}: {len(histories)} seeds" if len(histories) > 1 else label, 100)
            handles.append(Line2D([], [], color=_COLOURS[index % 7], ls=_DASHES[index % 6], label=text))
        single = [(index, runs[0]) for index, runs in enumerate(groups.values()) if len(runs) == 1]
        phases = [(index, values) for index, log in single if (values := _values(log, "lcam_loss_phase"))]
        if phases and "lcam_momentum" in axes:
            _shade(axes["lcam_momentum"], phases)
            handles.append(Patch(color="0.5", alpha=0.35, lw=0, label="phase of low loss"))
        columns = 105 // (8 + max(len(handle.get_label()) for handle in handles))
        figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(3, columns)), handlelength=3.2)
        figure.supxlabel("step (updates)" + "".join(f"   ·   {note}" for note in sorted(notes)), fontsize=9)
    return figure


def plot_cycle(
    *,
    p: float | None = None,
    p_min: float | None = None,
    p_max: float | None = None,
    cycle_steps: float | None = None,
    cycles: float | None = None,
    total_steps: int | None = None,
    cycle_shape: str | None = None,
) -> Figure:
    """Preview the schedule of p over `total_steps` updates, else over four periods.

    The options are those of :func:`hf_nsf.p_schedule`, and so are the errors.
    """
    steps = range(math.ceil(total_steps or 4 * (cycle_steps or DEFAULT_CYCLE_STEPS)))
    values = p_schedule(steps, p, p_min, p_max, cycle_steps, cycles, total_steps, cycle_shape)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(["nsf_p"])
        axes["nsf_p"].plot(steps, values, color=_COLOURS[0])
        axes["nsf_p"].set_xlabel("step (updates)")
    return figure


def _panels(keys: list[str]) -> tuple[Figure, dict[str, Axes]]:
    """One panel above the other with a common axis of steps; two columns if there are many."""
    columns = 1 if len(keys) <= 5 else 2
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4.5 + 3 * columns, 1.1 + 1.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    for key, axis in zip(keys, axes, strict=False):
        axis.set_ylabel(_NAMES.get(key, key))
    figure.align_ylabels()
    return figure, dict(zip(keys, axes, strict=False))


def _metrics(histories: Iterable[_Log]) -> list[str]:
    """The loss and the evaluation metrics that any of the runs logged, in this order."""
    numbers = (
        key
        for history in histories
        for entry in history
        for key, value in entry.items()
        if isinstance(value, (int, float)) and not key.endswith(_NO_METRICS)
    )
    found = dict.fromkeys(key for key in numbers if key == "loss" or key.startswith("eval_"))
    return sorted(found, key=lambda key: (key != "loss", key != "eval_loss"))


def _values(history: _Log, key: str) -> dict[int, float]:
    """The last value logged at each step; what is not finite becomes a gap in the line."""
    found = {entry["step"]: float(entry[key]) for entry in history if key in entry}
    return {step: value if math.isfinite(value) else math.nan for step, value in sorted(found.items())}


def _moving_mean(values: Any, width: int) -> Any:
    """Centred means over `width` values, over fewer at the ends; gaps stay gaps and spread no further."""
    known = ~np.isnan(values)
    total, count = (np.convolve(x, np.ones(width), "same") for x in (np.where(known, values, 0.0), known.astype(float)))
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _draw(axis: Axes, key: str, runs: list[dict[int, float]], index: int, faint: float) -> set[str]:
    """Draw the runs of one label into a panel; returns what a reader must be told about it."""
    colour, dashes, notes = _COLOURS[index % 7], _DASHES[index % 6], set()
    steps = sorted(set.intersection(*map(set, runs)) or set().union(*runs))
    table = np.array([[run.get(step, math.nan) for step in steps] for run in runs])
    width = len(steps) // 40 | 1
    smooth = key in ("loss", "lcam_momentum") and width > 1
    if smooth:
        if key == "loss" and len(runs) == 1:
            axis.plot(steps, table[0], color=colour, lw=0.6, alpha=faint, zorder=1)
            notes.add("faint: as logged")
        table = np.array([_moving_mean(_moving_mean(row, width), width) for row in table])
        notes.add("losses, momenta: moving means")
    mean, few = table.mean(axis=0), key.startswith("eval_") and len(steps) <= 20
    marker: dict[str, Any] = {"marker": _MARKERS[index % 7], "ms": 4} if few else {}
    shape = "steps-mid" if key == "lcam_momentum" and not smooth else "default"
    axis.plot(steps, mean, color=colour, ls=dashes, drawstyle=shape, zorder=3, **marker)
    if len(runs) > 1:
        error = table.std(axis=0, ddof=1) / math.sqrt(len(runs))
        if few:
            axis.errorbar(steps, mean, error, color=colour, fmt="none", capsize=2, elinewidth=1)
        else:
            axis.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        notes.add("bands: standard error of the mean")
    low, high = axis.dataLim.intervaly
    if key.endswith("loss") and low > 0 and high > 100 * low:  # as where a run diverged
        axis.set_yscale("log")
    return notes


def _shade(axis: Axes, phases: list[tuple[int, dict[int, float]]]) -> None:
    """Shade the steps taken in a phase of low loss: the whole panel for one run, a strip for each of several."""
    low, high = axis.get_ylim()
    several = len(phases) > 1
    if several:
        axis.set_ylim(high - (high - low) / (1 - 0.08 * len(phases)), high)
    for row, (index, run) in enumerate(phases):
        bottom, top = (0.08 * row + 0.01, 0.08 * row + 0.07) if several else (0.0, 1.0)
        steps = np.array(list(run), dtype=float)
        edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])  # half the way to the neighbours
        heights = np.where(np.array(list(run.values())) == 1, top, bottom)
        colour = _COLOURS[index % 7] if several else "0.5"
        axis.fill_between(
            np.repeat(edges, 2)[1:-1], bottom, np.repeat(heights, 2), color=colour, alpha=0.35, lw=0,
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip


class _Settings(pickle.Unpickler):
    """Reads the values in a training_args.bin without calling anything it names: the run may be somebody else's."""

    class Named:
        def __init__(self, *arguments: Any) -> None:
            self.arguments = arguments

        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state)

    def find_class(self, module: str, name: str) -> Any:
        return self.Named

    def persistent_load(self, pid: Any) -> None:
        return None


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


def _read(run: Path) -> tuple[_Log, Path]:
    """The log of a run and its file: the run itself, or in its folder, or in its newest checkpoint if that is later."""
    if not run.exists():
        raise ValueError(f"There is no file or folder {run}.")
    checkpoints = (file for file in run.glob("checkpoint-*/trainer_state.json") if file.parts[-2][11:].isdecimal())
    files = [run] if run.is_file() else sorted(checkpoints, key=lambda file: int(file.parts[-2][11:]))[-1:]
    files += [file for file in [run / "trainer_state.json"] if file.is_file()]
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
    if not _metrics([history]):
        raise ValueError(f"{file} holds no losses and no evaluation metrics.")
    return history, file


def _labels(runs: Sequence[Path], files: Sequence[Path]) -> list[str]:
    """Optimizer and options, or else the run as named; the same for runs that differ in nothing but their seeds."""
    settings = [_settings(file.parent) for file in files]
    several_rates = len({found["learning_rate"] for found in settings if found}) > 1
    labels = [str(run) for run in runs]
    groups: dict[str, list[int]] = {}
    for index, found in enumerate(settings):
        if found:
            options = f" ({', '.join(found['optim_args'].split(','))})" if found.get("optim_args") else ""
            rate = f", lr {found['learning_rate']:g}" if several_rates else ""
            groups.setdefault(f"{found['optim']}{options}{rate}", []).append(index)
    for text, members in groups.items():
        seeds = {settings[member]["seed"] for member in members}
        rest = [{k: v for k, v in settings[member].items() if k not in _OF_ONE_RUN} for member in members]
        are_seeds = len(seeds) == len(members) and all(other == rest[0] for other in rest)
        for member in members:
            labels[member] = text if are_seeds else f"{text}: {labels[member]}"
    return labels


def main(arguments: list[str] | None = None) -> int:
    """Draw the runs that the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_nsf.plots", description="Draw runs of the Trainer in one PNG.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output_dir, checkpoint or trainer_state.json"
    )
    parser.add_argument("--output", type=Path, default=Path("runs.png"), help="default: runs.png")
    parser.add_argument("--labels", nargs="+", help="one for each run; the same for seeds of one configuration")
    parser.add_argument("--learning_rate", action="store_true", help="draw the learning rate too")
    options = parser.parse_args(arguments)
    try:
        histories, files = zip(*(_read(run) for run in options.runs), strict=True)
        figure = plot_runs(
            *histories, labels=options.labels or _labels(options.runs, files), learning_rate=options.learning_rate
        )
        figure.savefig(options.output)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
