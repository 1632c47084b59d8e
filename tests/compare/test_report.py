# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: verdicts, remarks, Markdown of any name, and what its picture shows."""

import json
import math
import subprocess
import sys

import pytest
from stand_in import carry_out, plan_options

from hf_nsf.compare.plan import Plan
from hf_nsf.compare.report import _figure_of, chance, page, picture, table


def finished(optims, make, **changed):
    """A plan whose runs `make` has done."""
    rates = {"max_learning_rates": 5, "adam_lr": 0.01, "sgd_lr": 0.01}
    return carry_out(Plan(plan_options(*optims, **rates | changed), lambda text: None), make)


def result(value, seed, rate, **more):
    """One of any metric at rates around 0.01, better with each seed, and a cycle of p of 30 updates."""
    value += 0.01 * seed % 0.1 - 0.1 * abs(math.log2(rate / 0.01)) if value else 0
    log = []
    for step in range(3, 121, 3):
        cycle = 0.25 + 0.25 * math.cos(2 * math.pi * step / 30)
        log.append({"step": step, "loss": 1 / step, "nsf_p": cycle, "eval_accuracy": value * step / 120})
    return {"code": 0, "log_history": log, "all_results": {"eval_accuracy": value or None}, **more}


def verdicts(plan):
    lines = table(plan.summary()).splitlines()
    return [line.partition(": ")[2].rstrip(".") for line in lines if line.startswith("- ")]


def test_chance_is_students_t():
    """Two-sided 5 and 1 % quantiles of the usual tables."""
    for pairs, five, one in [(2, 12.706, 63.657), (3, 4.303, 9.925), (5, 2.776, 4.604), (6, 2.571, 4.032)]:
        assert chance(five, pairs) == pytest.approx(0.05, rel=2e-3)
        assert chance(one, pairs) == pytest.approx(0.01, rel=2e-3)
    assert chance(0.0, 5) == 1 and chance(1.96, 100_000) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("differences", "changed", "verdict"),
    [
        ([0.01, -0.012, 0.005], {}, "level with `first` (+0.001 ± 0.0067)"),
        ([0.10, 0.11, 0.12], {}, "better by 0.11 ± 0.0058 (19.1 standard errors)"),
        ([-0.10, -0.11, -0.12], {}, "worse by 0.11 ± 0.0058 (19.1 standard errors)"),
        ([0.10, 0.11, 0.12], {"better": "lower"}, "worse by 0.11 ± 0.0058 (19.1 standard errors)"),
        ([0.01, 0.02, 0.04], {}, "undecided with 3 seeds (+0.0233 ± 0.0088, 2.6 standard errors)"),
        ([0.5, 0.5], {}, "undecided with 2 seeds (+0.5 ± 0, the same with each of 2 seeds)"),
        ([0.5] * 6, {}, "better by 0.5 ± 0 (the same with each of 6 seeds)"),
        ([0.0, 0.0], {}, "level with `first` (+0 ± 0)"),
        ([0.5], {}, "+0.5 with one seed: no verdict without more --seeds"),
        ([math.nan, math.nan], {}, "no result: all runs failed or diverged"),
        ([0.10, math.nan, 0.11, 0.12], {},
         "better by 0.11 ± 0.0058 (19.1 standard errors); 1 of 4 runs failed or diverged"),
    ],
)  # fmt: skip
def test_verdict(differences, changed, verdict):
    """Differences are taken seed by seed, so that seeds may be as different as they like."""

    def make(run):
        more = differences[run.seed - 1] if run.optim == "other" else 0
        return {"code": 0, "log_history": [], "all_results": {"eval_accuracy": run.seed**2 + more}}

    plan = finished(["first", "other"], make, seeds=len(differences), learning_rates=1, **changed)
    assert verdicts(plan) == ["the one that others are compared with", verdict]
    text = table(plan.summary())
    assert ("one in twenty" in text) == ("1 comparison, paired by seed" in text) == (" ± " in verdict)


def test_search_in_words():
    """Where a rate diverged, the other optimizer is better; rates that only one searched do not count."""

    def make(run):
        if run.optim == "adam" and run.learning_rate == 0.02:
            return result(0, run.seed, run.learning_rate)
        shift = {"adam": 0.0, "nsf": 0.1 if run.learning_rate > 0.005 else -0.1, "up": 50 * run.learning_rate}
        return result(0.5 + shift.get(run.optim, 0.0), run.seed, run.learning_rate)

    first, same, apart = verdicts(finished(["adam", "nsf", "lcam"], make, sgd_lr=1.0, max_learning_rates=3))
    assert same.endswith("; at the same rate better at 2 of 3 in the search") and "rate" not in first
    assert apart.endswith("; rate on the edge: search further; no rate was searched for both")
    text = table(finished(["adam", "nsf", "up"], make).summary())
    assert "2 comparisons, paired by seed." in text and "on average 0.1 of 2 here" in text
    assert "; rate on the edge: search further; at the same rate better at" in text
    assert "Search of `adam`:" in text and "– at 0.02" in text


def test_the_page_has_the_command_remarks_and_any_name():
    names = ["a|b", "new\nline", "back`tick", "lost"]

    def make(run):
        code = -6 if run.optim == "a|b" and run.seed == 2 else 0
        return result(0 if run.optim == "lost" and run.seed != 1 else 0.5, run.seed, run.learning_rate, code=code)

    summary = finished(names, make, learning_rates=1).summary()
    text = page(json.loads(json.dumps(summary)), "python -m hf_nsf.compare --optims 'a|b'", "The protocol.", "it.png")
    assert "```sh\npython -m hf_nsf.compare --optims 'a|b'\n```\n\n![" in text and "](it.png)" in text
    assert text.endswith("## Protocol\n\nThe protocol.\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(names) and {row.replace("\\|", "").count("|") for row in rows} == {9}
    assert [row.split(" ", 2)[1] for row in rows[2:5]] == ["`a\\|b`", "`new\\nline`", "``"]
    assert "`a|b` ended with exit code -6 (seed 2) after its results, which count." in text
    assert "`lost` failed or diverged with seed 2, 3." in text
    assert "![" not in page(summary, "command", "protocol", None)


def drawn(figure):
    """The panels of a figure and their names."""
    axes = [axis for axis in figure.axes if axis.axison]
    return axes, [(axis.get_ylabel() or axis.get_xlabel()).partition("\n")[0] for axis in axes]


def test_the_picture_shows_search_results_and_curves():
    names = ["adam", "nsf:cycle_steps=30", "_$x$", "diverging"]

    def make(run):
        diverges = run.optim == "diverging" and run.learning_rate == 0.02
        return result(0 if diverges else 0.5 + 0.1 * names.index(run.optim), run.seed, run.learning_rate)

    plan = finished(names, make)
    (search, final, *curves), found = drawn(_figure_of(plan))
    assert found == ["eval_accuracy", "final eval_accuracy", "training loss", "exponent p", "eval_accuracy"]
    labels = [text.get_text() for text in final.get_yticklabels()]
    assert labels == [f"{name}, lr 0.01" for name in names]
    assert not any(text.get_parse_math() for text in final.get_yticklabels())
    colours = [text.get_color() for text in final.get_yticklabels()]
    assert len(set(colours)) == len(names)
    for axis in (search, *curves):
        assert list(dict.fromkeys(line.get_color() for line in axis.lines)) == colours
    assert search.get_xscale() == "log"
    assert [text.get_text() for text in search.get_xticklabels()] == ["0.005", "0.01", "0.02"]
    lines = [line for line in search.lines if line.get_color() == colours[1]]
    assert list(lines[0].get_xdata()) == [0.005, 0.01, 0.02]  # the search, what diverged, and the seeds at the rate
    assert list(lines[2].get_ydata()) == list(plan.summary()["optimizers"][1]["values"].values())
    bad = [line for line in search.lines if line.get_color() == colours[3]][1]
    assert list(bad.get_xdata()) == [0.02] and bad.get_marker() == "x"
    (reference,) = [line for line in final.lines if list(line.get_ydata()) == [0, 1]]
    assert reference.get_xdata()[0] == plan.summary()["target"] and reference.get_color() == colours[0]


@pytest.mark.parametrize(
    ("changed", "log", "curves"),
    [
        ({"learning_rates": 1}, [], []),
        ({}, [{"step": 1, "loss": 1.0, "eval_accuracy": 1.0}], []),
        ({"seeds": 1}, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}], ["training loss"]),
        ({}, [{"step": "1", "loss": [1]}, {"step": 2, "loss": None}, {"loss": 1}], []),
    ],
)
def test_only_curves_of_more_than_one_point_are_drawn(changed, log, curves, tmp_path):
    def make(run):
        return result(0.5, run.seed, run.learning_rate) | {"log_history": log}

    plan = finished(["a", "b"], make, **changed)
    search = ["eval_accuracy"] if "learning_rates" not in changed else []
    assert drawn(_figure_of(plan))[1] == [*search, "final eval_accuracy", *curves]
    assert picture(plan, tmp_path / "it.png") is None and (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_or_matplotlib_there_is_a_sentence(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "sys.argv[0] = '-m'; sys.orig_argv = ['python', '-m', 'hf_nsf.compare']\n"
    code += "from hf_nsf.compare.report import picture; print(picture(None, __import__('pathlib').Path('it.png')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("No picture: hf_nsf.plots needs matplotlib: pip install"), done.stderr
    plan = finished(["a"], lambda run: result(0, run.seed, run.learning_rate))
    assert "- `a`: no result: all runs" in table(plan.summary())
    assert picture(plan, tmp_path / "it.png") == "No picture: no run has a result."
    plan = finished(["a"], lambda run: result(1, run.seed, run.learning_rate))
    assert "No picture: " in str(picture(plan, tmp_path / "no folder" / "it.png"))
