# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the README runs, in order, in one namespace that holds the reader's model and data."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(32)]
    batch = {"x": torch.stack([r["x"] for r in rows]), "labels": torch.stack([r["labels"] for r in rows])}
    exec(compile(SNIPPETS[index], f"README snippet {index}", "exec"), {
        "model": Model(), "train_dataset": rows, "batches": [batch] * 3,
    })  # fmt: skip


def test_ci_calls_the_test_command_of_the_readme():
    ci = (README.parent / ".ci" / "run").read_text()
    assert "python -m pytest" in ci and "python -m pytest" in README.read_text()


CLAIMS = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README.read_text())


def test_every_test_that_the_readme_names_exists():
    assert len(CLAIMS) >= 10
    for file, name in CLAIMS:
        text = (README.parent / file).read_text()
        assert f"def {name}(" in text if name else "def test_" in text or file.endswith("run_versions.py"), (file, name)
