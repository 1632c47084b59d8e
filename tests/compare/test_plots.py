# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_nsf.plots`, plot_runs and plot_cycle: what is drawn, what the labels say, what gets a sentence."""

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainingArguments

from hf_nsf import p_schedule, plots
from hf_nsf.plots import plot_cycle, plot_runs


def history(steps=6, shift=0.0, **control):
    """What a Trainer logs: a loss at each step, an evaluation at every third, a summary that is none of both."""
    log = []
    for step in range(1, steps + 1):
        values = {key: value(step) for key, value in control.items()}
        log.append({"step": step, "epoch": step / steps, "loss": 2 / step + shift, "learning_rate": 0.1, **values})
        if step % 3 == 0:
            no_metrics = {"eval_runtime": 3.0, "eval_samples_per_second": 9.0, "eval_model_preparation_time": 0.1}
            log.append(
                {"step": step, "eval_loss": 1 / step, "eval_accuracy": step / 10, "eval_note": "x", **no_metrics}
            )
    return [*log, {"step": steps, "train_loss": 1.0, "train_runtime": 1.0}]


def lcam(steps=6, **changes):
    return history(steps, lcam_momentum=lambda k: (0.9, 0.95)[k % 2], lcam_loss_phase=lambda k: k % 2, **changes)


def panels(figure):
    return {axis.get_ylabel().partition("\n")[0]: axis for axis in figure.axes if axis.axison}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def data(axis):
    return [list(line.get_ydata()) for line in axis.lines]


def test_what_is_drawn():
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


def test_phases_are_shaded():
    """The whole panel for one run, a strip for each of several; none for means over seeds."""
    for runs, labels, spans in [
        ([lcam()], ["a"], [(0, 1)]),
        ([lcam(), lcam()], ["a", "b"], [(0.01, 0.07), (0.09, 0.15)]),
        ([lcam(), lcam()], ["a", "a"], []),
    ]:
        axis = panels(plot_runs(*runs, labels=labels))["momentum"]
        shades = [c for c in axis.collections if c.get_transform() == axis.get_xaxis_transform()]
        shaded = [np.concatenate([path.vertices for path in shade.get_paths()]) for shade in shades]
        assert [height for span in spans for height in span] == pytest.approx(
            [height for vertices in shaded for height in (vertices[:, 1].min(), vertices[:, 1].max())]
        )
        for vertices in shaded:  # the odd steps, each to half the way to its neighbours
            assert set(vertices[vertices[:, 1] == vertices[:, 1].max(), 0]) == {1, 1.5, 2.5, 3.5, 4.5, 5.5}


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


def test_the_standard_error_shows_at_a_single_evaluation():
    runs = [[{"step": 5, "eval_accuracy": value}] for value in (0.5, 0.6, 0.7)]
    axis = panels(plot_runs(*runs, labels=["a"] * 3))["eval_accuracy"]
    (bar,) = axis.collections[0].get_segments()
    assert bar[:, 1] == pytest.approx([0.6 - 0.1 / math.sqrt(3), 0.6 + 0.1 / math.sqrt(3)])


def test_fourteen_configurations_look_different():
    figure = plot_runs(*(history(50, shift=shift) for shift in range(14)))
    handles, lines = figure.legends[0].get_lines(), panels(figure)["eval_loss"].lines
    for drawn in (handles, lines):
        looks = {(line.get_color(), line.get_markerfacecolor() == "white", line.get_marker()) for line in drawn}
        dashes = {(line.get_color(), str(line._dash_pattern)) for line in drawn}
        assert len(drawn) == len(looks) == len(dashes) == 14
    losses = [line for line in panels(figure)["training loss"].lines if line.get_marker() != "None"]
    assert [bool(line.get_markevery()) for line in losses] == [False] * 7 + [True] * 7


def test_long_and_diverged_runs():
    """Noise is smoothed around its mean and shown as it is; what is not finite is a gap and hides nothing else."""
    noise = history(400, loss=lambda k: 1 + (-1) ** k / 2)
    raw, smooth = data(panels(plot_runs(noise))["training loss"])
    assert panels(plot_runs(noise))["training loss"].get_ylabel() == "training loss\n(moving mean)"
    assert panels(plot_runs(history()))["training loss"].get_ylabel() == "training loss"
    assert set(raw) == {0.5, 1.5} and smooth[50:-50] == pytest.approx([1] * 300, abs=0.01)
    broken = history(400, loss=lambda k: math.nan if 100 < k <= 300 else math.inf if k == 399 else 1.0)
    smooth = data(panels(plot_runs(broken))["training loss"])[1]
    assert [k + 1 for k, value in enumerate(smooth) if math.isnan(value)] == [*range(101, 301), 399]
    assert smooth[:100] == pytest.approx([1] * 100)
    figure = plot_runs(history(), history(loss=lambda k: 10.0 ** (3 * k)))
    assert (
        panels(figure)["training loss"].get_yscale() == "log" and panels(figure)["eval_loss"].get_yscale() == "linear"
    )


def test_plot_cycle():
    options = {"p_min": -0.25, "cycles": 3, "total_steps": 90, "cycle_shape": "triangular"}
    (line,) = plot_cycle(**options).axes[0].lines
    assert list(line.get_ydata()) == p_schedule(range(90), **options)
    (line,) = plot_cycle(cycle_steps=12.5).axes[0].lines
    assert list(line.get_ydata()) == p_schedule(range(50), cycle_steps=12.5)
    with pytest.raises(ValueError, match="p_min"):
        plot_cycle(p_min=1, p_max=0)


def write(folder, log=None, step=6, optim=None, **values):
    """A folder as the Trainer leaves it."""
    folder.mkdir(parents=True)
    state = {"global_step": step, "log_history": history(step) if log is None else log}
    Path(folder, "trainer_state.json").write_text(json.dumps(state))
    if optim:
        import torch

        args = TrainingArguments(str(folder), optim=optim, use_cpu=True, report_to="none", **values)
        torch.save(args, folder / "training_args.bin")
    return folder


def test_the_command(tmp_path, monkeypatch, capsys):
    """It reads the newest of an output_dir, a checkpoint or a file, and says which optimizer ran with which options."""
    monkeypatch.chdir(tmp_path)
    cycle = {"optim": "nsf", "optim_args": "p_min=-0.25,cycles=2"}
    for seed in (1, 2):
        write(tmp_path / f"seed{seed}", **cycle, seed=seed)
    write(tmp_path / "out" / "checkpoint-3", step=3, optim="adamw_torch")
    write(tmp_path / "out" / "checkpoint-12", step=12, optim="adamw_torch")
    Path("out", "checkpoint-13").mkdir()
    seen = []
    monkeypatch.setattr(
        plots, "plot_runs", lambda *runs, **options: seen.append((runs, options)) or plot_runs(*runs, **options)
    )
    assert plots.main(["seed1", "seed2", "out", "out/checkpoint-3", "seed1/trainer_state.json", "--learning_rate"]) == 0
    runs, options = seen.pop()
    assert [max(entry["step"] for entry in run) for run in runs] == [6, 6, 12, 3, 6]
    nsf = "nsf (p_min=-0.25, cycles=2)"
    others = ["adamw_torch: out", f"adamw_torch: {Path('out', 'checkpoint-3')}"]
    file = Path("seed1", "trainer_state.json")
    assert options["labels"] == [f"{nsf}: seed1", f"{nsf}: seed2", *others, f"{nsf}: {file}"]
    assert Path("runs.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == "runs.png\n"
    for names, labels in [
        (["seed1", "seed2"], [nsf, nsf]),
        (["seed1", "out"], [nsf, "adamw_torch"]),
        (["seed1", "slow"], [f"{nsf}, lr 5e-05", f"{nsf}, lr 0.1"]),
        (["seed1", "unknown"], [nsf, "unknown"]),
    ]:
        Path("slow").exists() or write(tmp_path / "slow", **cycle, learning_rate=0.1)
        Path("unknown").exists() or write(tmp_path / "unknown")
        assert plots.main([*names, "--output", "two.png"]) == 0 and seen.pop()[1]["labels"] == labels
    assert plots.main(["seed1", "seed2", "--labels", "a", "b"]) == 0 and seen.pop()[1]["labels"] == ["a", "b"]


def test_reading_settings_executes_nothing(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "planted"),)

    with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Planted()))
    assert plots._settings(tmp_path) == {} and not Path(tmp_path, "planted").exists()


def test_what_cannot_be_drawn_gets_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write(tmp_path / "silent", log=[{"step": 1, "train_loss": 1.0, "eval_runtime": 1.0}])
    write(tmp_path / "good")
    Path("other.json").write_text("[1]")
    Path("broken.json").write_text("{")
    for arguments, sentence in [
        (["nowhere"], "There is no file or folder nowhere."),
        (["empty"], "empty holds no trainer_state.json, nor does a checkpoint-N in it."),
        (["silent"], "The log of silent holds no losses and no evaluation metrics."),
        (["good", "other.json"], "other.json is no trainer_state.json."),
        (["broken.json"], "broken.json is no trainer_state.json."),
        (["good", "--labels", "a", "b"], "plot_runs needs one label for each run, got 2 for 1 runs."),
    ]:
        assert plots.main(arguments) == 2
        assert capsys.readouterr().err == f"python -m hf_nsf.plots: {sentence}\n"
    for output in ("runs.xyz", "nowhere/runs.png"):
        assert plots.main(["good", "--output", output]) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="The log of a holds no losses"):
        plot_runs([{"step": 1}], labels=["a"])
    with pytest.raises(ValueError, match="got 0 for 0 runs"):
        plot_runs()
