# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_nsf.plots`, plot_runs and plot_cycle: curves, labels, damaged logs, and time linear in their length."""

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_nsf import p_schedule, plots
from hf_nsf.plots import plot_cycle, plot_runs


def history(steps=6, shift=0.0, every=1, **control):
    """What a Trainer logs: a loss at each step, an evaluation at every third, a summary that is none of both."""
    log = []
    for step in range(every, steps + 1, every):
        values = {key: value(step) for key, value in control.items()}
        log.append({"step": step, "epoch": step / steps, "loss": 2 / step + shift, "learning_rate": 0.1, **values})
        if step % 3 == 0:
            other = {"eval_runtime": 3.0, "eval_samples_per_second": 9.0, "eval_model_preparation_time": 0.1}
            log.append({"step": step, "eval_loss": 1 / step, "eval_accuracy": step / 10, "eval_note": "x", **other})
    return [*log, {"step": steps, "train_loss": 1.0, "train_runtime": 1.0}]


def lcam(steps=6, **changes):
    return history(steps, lcam_momentum=lambda k: (0.9, 0.95)[k % 2], lcam_loss_phase=lambda k: k % 2, **changes)


def panels(figure):
    return {axis.get_ylabel().partition("\n")[0]: axis for axis in figure.axes if axis.axison}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def data(axis):
    return [list(line.get_ydata()) for line in axis.lines]


def test_panels_curves_and_legend():
    nsf = history(nsf_p=lambda k: k / 10)
    figure = plot_runs(nsf, lcam(), labels=["one", "two"])
    found = panels(figure)
    assert list(found) == ["training loss", "exponent p", "momentum", "eval_loss", "eval_accuracy"]
    assert data(found["training loss"]) == [[2 / k for k in range(1, 7)]] * 2
    assert data(found["exponent p"]) == [[k / 10 for k in range(1, 7)]]
    assert data(found["momentum"]) == [[0.95, 0.9] * 3]
    assert data(found["eval_accuracy"]) == [[0.3, 0.6]] * 2
    assert legend(figure) == ["one", "two", "phase of low loss"]
    colours = {line.get_color() for line in found["training loss"].lines}
    assert len(colours) == 2 and colours == {line.get_color() for line in found["eval_loss"].lines}
    assert "learning rate" in panels(plot_runs(nsf, learning_rate=True)) and legend(plot_runs(nsf)) == ["run 1"]
    assert "momentum" not in panels(plot_runs(nsf))


def test_phases_are_shaded_over_their_steps():
    """The whole panel for one run, a strip for each of several; none for means over seeds."""
    for runs, labels, spans in [
        ([lcam()], ["a"], [(0, 1)]),
        ([lcam(), lcam()], ["a", "b"], [(0.01, 0.07), (0.09, 0.15)]),
        ([lcam(), lcam()], ["a", "a"], []),
        ([lcam()] * 20, list(range(20)), [(0.03 * k + 0.00375, 0.03 * k + 0.02625) for k in range(20)]),
    ]:
        axis = panels(plot_runs(*runs, labels=labels))["momentum"]
        shades = [shade for shade in axis.collections if shade.get_transform() == axis.get_xaxis_transform()]
        found = [np.array([path.vertices for path in shade.get_paths()]) for shade in shades]
        assert [(part[..., 1].min(), part[..., 1].max()) for part in found] == [pytest.approx(span) for span in spans]
        for part in found:  # odd steps, each half-way to its neighbours
            assert [(x.min(), x.max()) for x in part[..., 0]] == [(1, 1.5), (2.5, 3.5), (4.5, 5.5)]
        low, high = axis.get_ylim()
        if spans:
            assert high == pytest.approx(0.9525) and low < (0.9 if len(spans) == 1 else 0.89)


def test_seeds_are_a_mean_and_its_standard_error():
    runs = [history(shift=shift) for shift in (0.0, 0.1, 0.5)]
    figure = plot_runs(*runs, history(), labels=["seeds"] * 3 + ["alone"])
    axis = panels(figure)["training loss"]
    assert legend(figure) == ["seeds: 3 seeds", "alone"]
    assert data(axis)[0] == pytest.approx([2 / k + 0.2 for k in range(1, 7)])
    (band,) = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    error = np.std([0.0, 0.1, 0.5], ddof=1) / math.sqrt(3)
    assert "bands, bars: standard error" in figure._supxlabel.get_text()
    assert heights.min() == pytest.approx(2 / 6 + 0.2 - error) and heights.max() == pytest.approx(2.2 + error)
    mean = panels(plot_runs(lcam(), lcam(), labels=["a", "a"]))["momentum"]  # between its two values
    assert mean.get_ylabel() == "momentum\n(moving mean)" and all(0.91 < y < 0.94 for y in data(mean)[0])
    single = [[{"step": 5, "eval_accuracy": value}] for value in (0.5, 0.6, 0.7)]  # an error bar, not a band
    (bar,) = panels(plot_runs(*single, labels=["a"] * 3))["eval_accuracy"].collections[0].get_segments()
    assert bar[:, 1] == pytest.approx([0.6 - 0.1 / math.sqrt(3), 0.6 + 0.1 / math.sqrt(3)])
    apart = [[{"step": step, "loss": 1.0}] for step in (1, 2)]  # no step in common
    assert len(panels(plot_runs(*apart, labels=["a", "a"]))["training loss"].lines) == 2


def test_fourteen_configurations_look_different():
    figure = plot_runs(*(history(50, shift=shift) for shift in range(14)))
    handles, lines = figure.legends[0].get_lines(), panels(figure)["eval_loss"].lines
    assert len({line.get_color() for line in lines[:12]}) == 12
    for drawn in (handles, lines):
        looks = {(line.get_color(), line.get_markerfacecolor() == "white", line.get_marker()) for line in drawn}
        dashes = {(line.get_color(), str(line._dash_pattern)) for line in drawn}
        assert len(drawn) == len(looks) == len(dashes) == 14
    losses = [line for line in panels(figure)["training loss"].lines if line.get_marker() != "None"]
    assert [bool(line.get_markevery()) for line in losses] == [False] * 12 + [True] * 2


def test_noise_is_averaged_and_what_is_not_finite_is_a_gap():
    noise = history(400, loss=lambda k: 1 + (-1) ** k / 2)
    raw, smooth = data(panels(plot_runs(noise))["training loss"])
    assert panels(plot_runs(noise))["training loss"].get_ylabel() == "training loss\n(moving mean)"
    assert panels(plot_runs(history()))["training loss"].get_ylabel() == "training loss"
    assert set(raw) == {0.5, 1.5} and smooth[50:-50] == pytest.approx([1] * 300, abs=0.01)
    broken = history(400, loss=lambda k: math.nan if 100 < k <= 300 else math.inf if k == 399 else 1.0)
    smooth = data(panels(plot_runs(broken))["training loss"])[1]
    assert [k + 1 for k, value in enumerate(smooth) if math.isnan(value)] == [*range(101, 301), 399]
    assert smooth[:100] == pytest.approx([1] * 100)
    wide = history(loss=lambda k: 10.0 ** (3 * k))
    found = panels(plot_runs(history(), wide))
    assert (found["training loss"].get_yscale(), found["eval_loss"].get_yscale()) == ("log", "linear")
    for runs in ([wide, history(shift=-9)], [history(shift=-9), wide]):  # a loss may be below 0
        assert panels(plot_runs(*runs))["training loss"].get_yscale() == "linear"
    (point,) = panels(plot_runs([{"step": 500, "loss": 1.0}, {"step": 600, "eval_loss": 1.0}]))["training loss"].lines
    assert point.get_markevery() == (0, 1)  # a line through one point would not be seen


def test_long_logs_take_linear_time():
    def drawn(steps):
        log = lcam(steps, loss=lambda k: 1 + (-1) ** k / 2)
        start = time.process_time()
        figure = plot_runs(log)
        figure.savefig(io.BytesIO())
        return time.process_time() - start, figure

    drawn(100)
    (short, _), (long, figure) = drawn(5_000), drawn(20_000)
    assert long < 5 * short
    raw, smooth = data(panels(figure)["training loss"])
    assert set(raw) == {0.5, 1.5} and smooth == pytest.approx([1] * len(smooth), abs=0.01)
    (shade,) = panels(figure)["momentum"].collections
    assert len(shade.get_paths()) == 10_000


def test_a_cycle_of_p_is_drawn_as_points():
    """A line through values further apart than a cycle would show a longer cycle that does not exist."""
    (line,) = panels(plot_runs(history(240, every=10, nsf_p=lambda k: k % 7)))["exponent p"].lines
    assert line.get_linestyle() == "None" and line.get_marker() != "None" and line.get_markevery() is None
    assert list(line.get_ydata()) == [k % 7 for k in range(10, 241, 10)]


def test_plot_cycle():
    options = {"p_min": -0.25, "cycles": 3, "total_steps": 90, "cycle_shape": "triangular"}
    (line,) = plot_cycle(**options).axes[0].lines
    assert list(line.get_ydata()) == p_schedule(range(90), **options)
    (line,) = plot_cycle(cycle_steps=12.5).axes[0].lines
    assert list(line.get_ydata()) == p_schedule(range(50), cycle_steps=12.5)


def test_labels_and_axes_are_drawn_as_they_stand():
    names = ["_hidden", "a $x$ b", "two\nlines", "nsf:" + "p_max=0.25," * 12]
    runs = [history(loss=lambda k: 1e6 + k / 10, shift=shift) for shift in range(4)]
    figure = plot_runs(*runs, labels=names)
    figure.savefig(io.BytesIO())
    assert legend(figure)[:3] == names[:3] and legend(figure)[3].replace("\n", "") == names[3]
    assert all(line.endswith(",") for line in legend(figure)[3].split("\n"))
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    assert not any(axis.yaxis.get_offset_text().get_text() for axis in figure.axes)


def test_foreign_entries_are_left_out_and_numpy_numbers_are_numbers():
    good = [{"step": np.int64(1), "loss": np.float32(0.5), "eval_f1": np.float64(0.25)}, {"step": 2.0, "loss": 1}]
    foreign = [{"loss": 9}, {"step": "3", "loss": 9}, {"step": [4], "loss": 9}, {"step": None, "loss": 9}, None, [1]]
    foreign += [{"step": 10**400, "loss": 9}, {"step": math.nan, "loss": 9}, {"step": True, "loss": 9}, {"step": 3}]
    foreign += [{"step": 5, "loss": value, "eval_f1": value} for value in ("0.5", [0.5], None, True, {})]
    found = panels(plot_runs([*foreign, *good, *foreign]))
    assert data(found["training loss"]) == [[0.5, 1]] and data(found["eval_f1"]) == [[0.25]]
    plot_runs([{"step": 1, "loss": 1, "lcam_loss_phase": 7}, {"step": 2, "loss": -1e308, "lcam_momentum": 1e308}])


def write(folder, log=None, step=6):
    """A folder as the Trainer leaves it; the text of a damaged one."""
    folder.mkdir(parents=True)
    state = {"global_step": step, "log_history": history(step) if log is None else log}
    (folder / "trainer_state.json").write_text(log if isinstance(log, str) else json.dumps(state))


def test_runs_and_their_labels(tmp_path, monkeypatch, capsys):
    """Names mean the latest whole state of an output_dir, a checkpoint, a file, or the runs in a folder."""
    monkeypatch.chdir(tmp_path)
    for name, step in [("out/checkpoint-3", 3), ("out/checkpoint-12", 12), ("all/a", 6), ("all/b", 6), ("again/a", 6)]:
        write(Path(name), step=step)
    Path("out/checkpoint-13").mkdir()
    write(Path("out/checkpoint-20"), log="")
    write(Path("all/c"), log='{"log_history": [{"step')
    Path("all/notes").mkdir()
    write(Path("resumed"), step=3)
    write(Path("resumed/checkpoint-9"), step=9)
    seen = []
    monkeypatch.setattr(plots, "plot_runs", lambda *runs, **given: seen.append((runs, given)) or plot_runs(*runs))
    for names, labels, steps, left_out in [
        (["out"], ["out"], [12], ["out/checkpoint-20"]),
        (["out/checkpoint-3", "all/a"], ["out/checkpoint-3", "a"], [3, 6], []),
        (["all/a/trainer_state.json", "resumed"], ["a", "resumed"], [6, 9], []),
        (["all"], ["a", "b"], [6, 6], ["all/c"]),
        (["all/a", "again"], [str(Path("all/a")), str(Path("again/a"))], [6, 6], []),
        (["all/a", "resumed", "--labels", "x", "x"], ["x", "x"], [6, 9], []),
    ]:
        assert plots.main(names) == 0
        runs, given = seen.pop()
        assert given["labels"] == labels
        assert [max(entry["step"] for entry in run) for run in runs] == steps
        said = capsys.readouterr()
        assert said.out == "runs.png\n" and Path("runs.png").read_bytes().startswith(b"\x89PNG")
        found = [str(Path(name, "trainer_state.json")) for name in left_out]
        assert said.err.splitlines() == [f"{n} is no trainer_state.json, or damaged. It is left out." for n in found]


def test_damaged_and_foreign_runs_get_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write(Path("silent"), log=[{"step": 1, "train_loss": 1.0, "eval_runtime": 1.0}])
    write(Path("stepless"), log=[{"loss": 1.0}, {"loss": 2.0, "step": "2"}])
    write(Path("good"))
    no_state = "{} is no trainer_state.json, or damaged."
    no_losses = "The log of {} holds no losses and no evaluation metrics."
    cases = [
        (["nowhere"], "There is no file or folder nowhere."),
        (["empty"], "empty holds no trainer_state.json, nor does a checkpoint-N or another folder in it."),
        (["silent"], no_losses.format("silent")),
        (["good", "stepless"], no_losses.format("stepless")),
        (["good", "--labels", "a", "b"], "plot_runs needs one label for each run, got 2 for 1 runs."),
    ]
    foreign = ["[1]", "{", "", "null", '{"log_history": 3}', '{"global_step": 3}', "[" * 100_000, "\x00", "\xff"]
    for index, text in enumerate(foreign):
        Path(f"{index}.json").write_bytes(text.encode("latin-1"))
        cases.append((["good", f"{index}.json"], no_state.format(f"{index}.json")))
    for arguments, sentence in cases:
        assert plots.main(arguments) == 2, arguments
        assert capsys.readouterr().err == f"python -m hf_nsf.plots: {sentence}\n"
    for output in ("runs.xyz", "nowhere/runs.png"):
        assert plots.main(["good", "--output", output]) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="got 0 for 0 runs"):
        plot_runs()


def test_the_command_needs_no_torch(tmp_path):
    write(tmp_path / "out")
    command = [sys.executable, "-m", "hf_nsf.plots", "out", "--output", "ä.png"]
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = sys.modules['transformers'] = None")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "?.png\n"), done.stderr
