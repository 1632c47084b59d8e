# SPDX-License-Identifier: Apache-2.0
"""What the examples that write results share: options, means over seeds, tables in Markdown, and the files."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np


def positive(text: str) -> int:
    """Read an option that counts something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def make_parser(description: str | None, seeds: int | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options that the examples share; those with seeds repeat their trainings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    if seeds is not None:
        parser.add_argument("--seeds", type=positive, default=seeds, help=f"number of seeds (default: {seeds})")
        parser.add_argument("--jobs", type=positive, default=-1, help="trainings at a time (default: one a core)")
    return parser


def over_seeds(values: Any) -> np.ndarray:
    """Mean over the first dimension, that of the seeds, and its standard error, stacked."""
    values = np.asarray(values)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1:])
    return np.stack([values.mean(0), error])


def plus_minus(figure: np.ndarray, sign: str = "") -> str:
    """Show a mean and its standard error; the sign "+" is shown on positive means, too."""
    mean, error = figure
    return "-" if np.isnan(mean) else f"{mean:{sign}.1f} ± {error:.1f}"


def markdown(*rows: list[Any], sign: str = "") -> str:
    """Lay out a table, the heads first; an array is a mean and its standard error."""

    def shown(cell: Any) -> str:
        if isinstance(cell, np.ndarray):
            return plus_minus(cell, sign)
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell)

    heads, *lines = [f"| {' | '.join(map(shown, row))} |\n" for row in rows]
    return "".join([heads, "|" + " --- |" * len(rows[0]) + "\n", *lines])


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Make an empty figure, in inches, and its axes."""
    from matplotlib import rcParams  # not above: the benchmark draws nothing
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def write(
    folder: Path, script: str, args: list[str] | None, results: dict[str, Any], text: str, figure: Any = None
) -> None:
    """Write SCRIPT.json, with arrays as lists, SCRIPT.md and SCRIPT.png; both texts have the command."""

    def as_lists(x: np.ndarray) -> Any:
        return np.where(np.isnan(x), None, np.round(x.astype(float), 5)).tolist()  # JSON has no NaN

    file = Path(script)
    command = f"python examples/{file.name} {shlex.join(sys.argv[1:] if args is None else args)}"
    name = folder / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps({"command": command, **results}, indent=1, default=as_lists)
    name.with_suffix(".json").write_text(as_json + "\n", encoding="utf-8")
    name.with_suffix(".md").write_text(f"`{command}`\n\n{text}", encoding="utf-8")
    if figure is not None:
        figure.savefig(name.with_suffix(".png"), dpi=100)
    print(text)
    print(f"Wrote {name}.json, .md{'' if figure is None else ' and .png'}")
