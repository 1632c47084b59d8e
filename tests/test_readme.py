# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the README runs, in order, in one namespace that holds the reader's model and data."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
_SPEC = importlib.util.spec_from_file_location("run_support", Path(__file__).with_name("run_support.py"))
run_support = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run_support)
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


def test_every_test_that_the_table_names_exists():
    for _, tests in run_support.CLAIMS:
        for file, _, name in (test.partition("::") for test in tests):
            text = (README.parent / file).read_text()
            assert f"def {name}(" in text if name else "def test_" in text, (file, name)


def test_the_table_names_every_test_of_the_distributed_file():
    named = {test.partition("::")[2] for _, tests in run_support.CLAIMS for test in tests if run_support.DDP in test}
    text = (README.parent / run_support.DDP).read_text()
    assert named == set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))


def test_the_table_of_support_is_the_one_that_was_written():
    """Its claims are those of the list, and each has the result of a run in which nothing failed."""
    _, inside, _ = run_support.parts(README.read_text())
    blank = re.sub(r"\| [^|]* \|$", "|  |", run_support.table({}), flags=re.MULTILINE)
    assert re.sub(r"\| [^|]* \|$", "|  |", inside, flags=re.MULTILINE) == blank
    rows = inside.splitlines()[2:]
    assert len(rows) == len(run_support.CLAIMS)
    assert all(re.search(r"\| [1-9]\d* passed(, \d+ skipped)? \|$", row) for row in rows)


def test_results_are_read_from_pytests_file(tmp_path):
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="tests.a.test_b" name="test_c[1]"/>'
        '<testcase classname="tests.a.test_b" name="test_c[2]"><skipped/></testcase>'
        '<testcase classname="tests.a.test_b" name="test_d"><failure/></testcase></testsuite></testsuites>'
    )
    results = run_support.read(file)
    assert results["tests/a/test_b.py::test_c"] == ["passed", "skipped"]
    assert results["tests/a/test_b.py"] == ["passed", "skipped", "failed"]
    assert run_support.counts(results["tests/a/test_b.py"]) == "1 passed, 1 skipped, 1 failed"
    again = tmp_path / "again.xml"
    again.write_text('<testsuite><testcase classname="tests.a.test_b" name="test_d"/></testsuite>')
    assert run_support.read(file, again)["tests/a/test_b.py::test_d"] == ["passed"]
