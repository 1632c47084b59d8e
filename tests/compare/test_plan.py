# SPDX-License-Identifier: Apache-2.0
"""The protocol without a process: grids, choices, statistics; names of runs and what their files are filled with."""

import itertools
import json
import math
import statistics

import pytest
import yaml
from stand_in import carry_out, plan_options

from hf_nsf.compare.plan import Plan, Run, fill
from hf_nsf.compare.report import table

BEST = {"sgd": 0.32, "sgd:momentum=0.9": 0.02}


def train(run):
    """A log in which the metric falls with the square of the distance from the best rate in octaves."""
    if run.optim == "broken":
        return {"failed": "exit code 1"}
    best, is_nsf = BEST.get(run.optim, 1e-4), run.optim.startswith("nsf")
    value = 0.9 - 0.01 * math.log2(run.learning_rate / best) ** 2 + 0.001 * run.seed + 0.02 * is_nsf
    loss = math.nan if run.learning_rate > 2 * best or run.optim == "diverging" else 0.5
    evaluations = [
        {"eval_accuracy": value * min((1 + is_nsf) * k / 10, 1), "eval_loss": loss, "step": 10 * k}
        for k in range(1, 11)
    ]
    log = [{"loss": loss, "step": 5}, *evaluations, {"train_runtime": 50.0, "train_loss": 0.4, "step": 100}]
    return {"code": 0, "all_results": {}, "log_history": [*log, {"eval_accuracy": value, "step": 100}]}


def done(*optims, **changes):
    """A plan whose runs are all done, the summary by optimizer, what it said, and the runs in their order."""
    said = []
    plan = carry_out(Plan(plan_options(*optims, search_seeds=2, **changes), said.append), train)
    return plan, {row["optim"]: row for row in plan.summary()["optimizers"]}, said, list(plan.results)


def test_protocol():
    nsf = "nsf:p=0,eps=1e-6"
    plan, rows, said, runs = done("adamw", nsf, "sgd")
    # sgd's best rate is four doublings above its start: all grids grow until it lies inside, adamw's at its better end.
    rates = {optim: sorted({run.learning_rate for run in runs if run.optim == optim}) for optim in rows}
    assert rates["sgd"] == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]
    assert {len(of_one) for of_one in rates.values()} == {7} and len(said) == 4
    assert all(b == pytest.approx(2 * a, rel=1e-3) for of_one in rates.values() for a, b in itertools.pairwise(of_one))
    assert [(row["learning_rate"], row["rate_on_edge"]) for row in rows.values()] == [
        (1e-4, False), (1e-4, False), (0.32, False),
    ]  # fmt: skip
    # The seeds of the result are the same for all, and none of the search.
    assert {run.seed for run in runs[: 3 * 7 * 2]} == {1001, 1002}
    assert [(run.seed, run.optim) for run in runs[3 * 7 * 2 :]] == list(itertools.product((1, 2, 3), rows))
    values = [0.901, 0.902, 0.903]
    first, nsf = rows["adamw"], rows[nsf]
    assert list(first["values"].values()) == pytest.approx(values) and first["mean"] == pytest.approx(0.902)
    assert first["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(3)) and first["difference"] is None
    assert nsf["difference"] == pytest.approx(0.02) and nsf["difference_error"] == pytest.approx(0, abs=1e-12)
    # Runs of adamw reach their own mean at the end, if at all; nsf stands above it half-way.
    assert (first["reached"], first["updates_to_target"], first["seconds_to_target"]) == (2, 100, 50)
    assert (nsf["reached"], nsf["updates_to_target"], nsf["seconds_to_target"]) == (3, 50, 25)
    assert plan.count() == len(runs) == 51


@pytest.mark.parametrize(
    ("optims", "changes", "chosen"),
    [
        (["adamw", "sgd"], {"max_learning_rates": 5, "sgd_lr": 0.04}, {"sgd": (0.32, True), "adamw": (1e-4, False)}),
        # Of this "accuracy" the lowest is the farthest from the best rate, and higher rates diverge.
        (["adamw"], {"better": "lower", "max_learning_rates": 4}, {"adamw": (2.5e-5, True)}),
        (["sgd:momentum=0.9", "sgd", "adamw"],
         {"learning_rates": 1, "start_lr": {"sgd:momentum=0.9": 0.02, "sgd": 0.32}},
         {"sgd:momentum=0.9": (0.02, False), "sgd": (0.32, False), "adamw": (1e-4, False)}),
        (["lcam:x=1", "my_sgd", "adafactor"], {"learning_rates": 1},
         {"lcam:x=1": (0.02, False), "my_sgd": (0.02, False), "adafactor": (1e-4, False)}),
    ],
)  # fmt: skip
def test_choice_of_the_rate(optims, changes, chosen):
    _, rows, _, _ = done(*optims, **changes)
    assert {optim: (rows[optim]["learning_rate"], rows[optim]["rate_on_edge"]) for optim in chosen} == chosen


def test_lost_runs_are_counted_and_left_out_of_means():
    plan, rows, said, runs = done("broken", "adamw", "diverging", max_learning_rates=4)
    keys = ("learning_rate", "rate_on_edge", "runs", "lost", "mean", "difference")
    found = {optim: tuple(row[key] for key in keys) for optim, row in rows.items()}
    # All runs of one failed: it has no final runs, and does not let the grids of others grow.
    assert sum(run.optim == "broken" for run in runs) == 6 and "broken: all runs failed" in said[0]
    assert found["broken"] == (None, False, 0, 0, None, None)
    assert found["adamw"] == (1e-4, False, 3, 0, pytest.approx(0.902), None)
    assert found["diverging"] == (2.5e-5, True, 3, 3, None, None)  # the grids grow towards lower rates


def test_logs_of_the_search_shrink_to_their_last_values():
    plan = Plan(plan_options("adamw"))
    for run in (Run("adamw", 1e-4, 1), Run("adamw", 1e-4, 1001)):
        result = train(run)
        judged, length = plan.judge(result), len(result["log_history"])
        plan.add(run, result)
        assert plan.judge(plan.results[run]) == judged
        assert len(plan.results[run]["log_history"]) == (length if run.seed == 1 else 1)


@pytest.mark.parametrize(("change", "chosen"), [({"failed": "exit code 1"}, 1e-4), ({"diverged": True}, 5e-5)])
def test_a_failed_run_of_the_search_is_left_out_and_a_diverged_one_is_the_worst(change, chosen):
    def once(run):
        return train(run) | (change if run == Run("adamw", 1e-4, 1002) else {})

    plan = carry_out(Plan(plan_options("adamw", search_seeds=3), lambda text: None), once)
    (row,) = plan.summary()["optimizers"]
    assert (row["learning_rate"], row["search_failed"]) == (chosen, "failed" in change)
    remark = "Search of `adamw`" in table(plan.summary()) and " (1 runs failed)" in table(plan.summary())
    assert remark == ("failed" in change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"all_results": {"eval_accuracy": 0.25}}, 0.25),
        ({"code": -6}, 0.901),  # train_runtime says that training came to its end
        ({"code": -6, "log_history": [{"eval_accuracy": 0.5, "step": 1}]}, "exit code -6"),
        ({"code": -6, "log_history": [], "all_results": {"eval_accuracy": 0.25}}, 0.25),
        ({"all_results": {"eval_accuracy": "0.5"}}, math.nan),
        ({"all_results": {"eval_accuracy": True}}, math.nan),
        ({"all_results": {"eval_accuracy": 10**400}}, math.nan),
        ({"all_results": {"eval_loss": math.inf}}, math.nan),
        ({"log_history": [{"loss": math.inf}, {"eval_accuracy": 0.5}]}, math.nan),
        ({"log_history": [{"eval_f1": 1.0}, {"loss": 1}]},
         "--metric eval_accuracy is not among what it reports: eval_f1"),
        ({"log_history": [{"loss": 1, "train_runtime": 1.0}], "code": 1}, "exit code 1"),
        ({"log_history": [{}], "all_results": {}}, "--metric eval_accuracy is not among what it reports: nothing"),
    ],
)  # fmt: skip
def test_judgement_of_a_result(change, expected):
    value, reason = Plan(plan_options("adamw")).judge({**train(Run("adamw", 1e-4, 1)), **change})
    if isinstance(expected, str):
        assert reason == expected
    else:
        assert (value, reason) == (pytest.approx(expected, nan_ok=True), "")


@pytest.mark.parametrize("steps", [[None, None], ["1", [2]], [math.nan, math.inf], [{}, 2]])
def test_entries_without_a_step_cost_nothing_but_themselves(steps):
    plan = Plan(plan_options("adamw"))
    log = [{"eval_accuracy": 0.5, **({"step": step} if step != {} else {})} for step in steps]
    run = Run("adamw", 1e-4, 1)
    plan.results[run] = {"code": 0, "all_results": {}, "log_history": log}
    cost = plan.cost(run, 0.4)
    assert cost is None or cost[0] == 2


def test_seeds_above_1000_do_not_meet_those_of_the_search():
    plan = Plan(plan_options("adamw", seeds=1500))
    assert not set(plan.seeds) & set(plan.search_seeds)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adam_lr": 1e-320}, "adamw: 9 rates around .*, leave the range from 1e-37 to 1e37"),
        ({"factor": 1e300}, "leave the range"),
        ({"start_lr": {"adamw": 1e36}, "factor": 100.0}, "leave the range"),
    ],
)
def test_rates_that_would_coincide_or_vanish_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan(plan_options("adamw", **changes))


def test_names_of_folders():
    optims = ["a:x=a/b", "a:x=a_b", "a:x=A_b", "own:" + ",".join(f"option_{k}=0.1234" for k in range(30)), "a\nb", "ü"]
    names = [Run(optim, 1e-4, 1).name for optim in optims]
    assert len(set(names)) == len(names) and all(len(name) < 240 and name.isascii() for name in names)
    assert Run("nsf:p_min=-0.25", 5e-5, 7).name.startswith("nsf_p_min=-0.25-")
    assert Run("adamw", 5e-5, 7).name == "adamw-lr5e-05-seed7"


def test_filled_files_keep_their_format():
    values = Run("nsf:p_min=0", 5e-5, 7).values('C:\\out "1" {seed}')
    text = fill('{"lr": {learning_rate}, "seed": {seed}, "out": "{output_dir}"}', values, in_json=True)
    assert json.loads(text) == {"lr": 5e-5, "seed": 7, "out": 'C:\\out "1" {seed}'}
    text = fill("lr: {learning_rate}\noptim_args: {optim_args}\nx: {y}", values)
    assert yaml.safe_load(text)["lr"] == 5e-5 and "x: {y}" in text
    assert fill("{output_dir}/{seed}", values) == 'C:\\out "1" {seed}/7'
