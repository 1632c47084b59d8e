# SPDX-License-Identifier: Apache-2.0
"""What the examples that draw share: means over seeds, tables in Markdown, and the three files of results."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)

plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})


def over_seeds(values: Any) -> np.ndarray:
    """Mean over the first dimension, that of the seeds, and its standard error, stacked."""
    values = np.asarray(values)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1:])
    return np.stack([values.mean(0), error])


def markdown(*rows: list[Any]) -> str:
    """Lay out a table, the heads first; an array is a mean and its standard error."""

    def shown(cell: Any) -> str:
        if not isinstance(cell, np.ndarray):
            return str(cell)
        return "-" if np.isnan(cell).any() else "{:.1f} ± {:.1f}".format(*cell)

    lines = [f"| {' | '.join(map(shown, row))} |\n" for row in rows]
    return "".join([lines[0], "|" + " --- |" * len(rows[0]) + "\n", *lines[1:]])


def command(script: str, args: list[str] | None) -> str:
    """The command line of an example."""
    return f"python examples/{Path(script).name} {shlex.join(sys.argv[1:] if args is None else args)}"


def write(name: Path, results: dict[str, Any], text: str, figure: Any) -> None:
    """Write NAME.json, with what `over_seeds` made as mean and error, NAME.md and NAME.png, each with the command."""

    def as_lists(x: np.ndarray) -> Any:
        return np.where(np.isnan(x), None, np.round(x.astype(float), 5)).tolist()  # JSON has no NaN

    name.parent.mkdir(parents=True, exist_ok=True)
    name.with_suffix(".json").write_text(json.dumps(results, indent=1, default=as_lists) + "\n", encoding="utf-8")
    name.with_suffix(".md").write_text(f"`{results['command']}`\n\n{text}", encoding="utf-8")
    figure.savefig(name.with_suffix(".png"), dpi=100)
    plt.close(figure)
    print(text)
    print(f"Wrote {name}.json, .md and .png")
