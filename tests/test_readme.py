# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the README runs as pasted, its commands parse, and what it names is there."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import hf_nsf
from hf_nsf import plots
from hf_nsf.compare.__main__ import parse
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
    assert len(found) >= 3
    for words in found:
        options, script = parse(words)
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
