# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the README runs as pasted, its commands parse, and what it names is there."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import run_support
import torch

import hf_nsf
from hf_nsf import compare, plots
from hf_nsf.trainer.options import readers_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "examples/README.md")}
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(
    re.sub(r"\\\n", " ", block) for block in re.findall(r"```bash\n(.*?)```", "".join(PAGES.values()), re.DOTALL)
)


def commands(program):
    """Arguments of each command of that module in the pages' shell blocks."""
    parts = [part for line in SHELL.splitlines() for part in re.split(r"\s+&&\s+|\s+#", line)]
    found = [shlex.split(part) for part in parts if f"-m {program} " in part]
    return [words[words.index(program) + 1 :] for words in found]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160 and len(SNIPPETS) >= 3


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs_as_pasted(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    exec(compile(SNIPPETS[index], f"README snippet {index}", "exec"), {})


def test_commands_of_the_comparison_parse(monkeypatch):
    """With the scripts that they name, of which some are the reader's."""
    monkeypatch.chdir(ROOT)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: self.name == "run_glue.py" or is_file(self))
    found = commands("hf_nsf.compare")
    assert len(found) >= 4
    for words in found:
        options, script = compare.parse(words)
        assert options.optims and script
        for optim in options.optims:
            name, _, text = optim.partition(":")
            if name in ("lcam", "nsf"):
                hf_nsf.trainer.options.parse_optim_args(name, text)


def test_commands_of_the_plots_parse(tmp_path, monkeypatch, capsys):
    """They come as far as to miss the runs that they name."""
    monkeypatch.chdir(tmp_path)
    for words in commands("hf_nsf.plots"):
        with pytest.raises(SystemExit) as end:
            raise SystemExit(plots.main(words))
        assert end.value.code == 2 and words[0] in capsys.readouterr().err


def test_the_options_table_has_every_option():
    table = README[README.index("## Options") : README.index("## Your own loop")]
    for optim in ("lcam", "nsf"):
        assert all(f"`{name}`" in table for name in readers_of(optim))
    defaults = {name: p.default for name, p in inspect.signature(hf_nsf.LCAM).parameters.items()}
    assert f"{defaults['low_loss_momentum']}, {defaults['high_loss_momentum']}" in table


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


def test_ci_calls_the_test_command_of_the_readme():
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text() and "python -m pytest" in README


def test_every_test_that_the_table_of_support_names_exists():
    for _, tests in run_support.CLAIMS:
        for file, _, name in (test.partition("::") for test in tests):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name}(" in text if name else "def test_" in text, (file, name)


def test_the_table_of_support_is_the_one_that_was_written():
    """Its claims are those of the list, and each has the result of a run in which nothing failed."""
    _, inside, _ = run_support.parts(run_support.README.read_text(encoding="utf-8"))
    blank = re.sub(r"\| [^|]* \|$", "|  |", run_support.table({}), flags=re.MULTILINE)
    assert re.sub(r"\| [^|]* \|$", "|  |", inside, flags=re.MULTILINE) == blank
    rows = inside.splitlines()[2:]
    assert len(rows) == len(run_support.CLAIMS)
    assert all(re.search(r"\| [1-9]\d* (passed(, \d+ skipped)?|skipped) \|$", row) for row in rows)


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
