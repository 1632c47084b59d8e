# SPDX-License-Identifier: Apache-2.0
"""What the examples that write results share: means over seeds, tables in Markdown, and the files."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np


def over_seeds(values: Any) -> np.ndarray:
    """Mean over the first dimension, that of the seeds, and its standard error, stacked."""
    values = np.asarray(values)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1:])
    return np.stack([values.mean(0), error])


def markdown(*rows: list[Any]) -> str:
    """Lay out a table, the heads first; an array is a mean and its standard error."""

    def shown(cell: Any) -> str:
        if not isinstance(cell, np.ndarray):
            return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
        return "-" if np.isnan(cell).any() else "{:.1f} ± {:.1f}".format(*cell)

    lines = [f"| {' | '.join(map(shown, row))} |\n" for row in rows]
    return "".join([lines[0], "|" + " --- |" * len(rows[0]) + "\n", *lines[1:]])


def command(script: str, args: list[str] | None) -> str:
    """The command line of an example."""
    return f"python examples/{Path(script).name} {shlex.join(sys.argv[1:] if args is None else args)}"


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Make an empty figure, in inches, and its axes."""
    from matplotlib import rcParams  # not above: the benchmark draws nothing
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def write(name: Path, command_line: str, results: dict[str, Any], text: str, figure: Any = None) -> None:
    """Write NAME.json, with what `over_seeds` made as mean and error, NAME.md with the command, and NAME.png."""

    def as_lists(x: np.ndarray) -> Any:
        return np.where(np.isnan(x), None, np.round(x.astype(float), 5)).tolist()  # JSON has no NaN

    name.parent.mkdir(parents=True, exist_ok=True)
    name.with_suffix(".json").write_text(json.dumps(results, indent=1, default=as_lists) + "\n", encoding="utf-8")
    name.with_suffix(".md").write_text(f"`{command_line}`\n\n{text}", encoding="utf-8")
    if figure is not None:
        figure.savefig(name.with_suffix(".png"), dpi=100)
    print(text)
    print(f"Wrote {name}.json, .md{'' if figure is None else ' and .png'}")
