# SPDX-License-Identifier: Apache-2.0
"""The examples that write results: what they compute, the files they write, and the READMEs' figures of them."""

import functools
import json
import math
import re
from pathlib import Path

import benchmark
import direction_and_length
import embedded_data
import numpy as np
import PIL.Image
import pytest
import torch
import what_p_does
from direction_and_length import DirectionAndLength

from hf_nsf import NSF, p_schedule

ROOT = Path(__file__).parents[2]
load_docstrings_once = functools.cache(embedded_data.load_docstring_sentences)


@pytest.fixture(autouse=True)
def docstrings(monkeypatch):
    monkeypatch.setattr(embedded_data, "load_docstring_sentences", load_docstrings_once)


def run(script, folder, *flags):
    """Run a script; return its JSON and Markdown after checks of what all have in common."""
    script.main(["--output_dir", str(folder), *map(str, flags)])
    name = folder / script.__name__
    written, text = json.loads(name.with_suffix(".json").read_text()), name.with_suffix(".md").read_text()
    assert text.startswith(f"`{written['command']}`\n\n") and f"{script.__name__}.py --output_dir" in written["command"]
    if script is not benchmark:
        with PIL.Image.open(name.with_suffix(".png")) as picture:
            assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    return written, text


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_figures_stand_in_the_linked_result_files(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")

    def linked(part):
        return [(path.parent / link).read_text(encoding="utf-8") for link in re.findall(r"\]\(([^)#]*\.md)\)", part)]

    of_page, count = linked(text), 0
    for line in text.splitlines():
        files = linked(line) or of_page
        for figure in re.findall(r"[\d.]+ ± [\d.]*\d", line):
            assert any(figure in file for file in files), (figure, line)
            count += 1
    assert count


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        (what_p_does, ["--seeds", "0"], "argument --seeds: 0: give 1 or more"),
        (direction_and_length, ["--jobs", "-1"], "argument --jobs: -1: give 1 or more"),
        (direction_and_length, ["--train_file", "a.parquet"], "give both or neither"),
        (direction_and_length, ["--train_file", "gone.parquet", "--test_file", "gone.parquet"], "gone.parquet"),
    ],
)
def test_bad_input_is_a_sentence(script, flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(["--output_dir", str(tmp_path), *flags])
    assert sentence in f"{caught.value}{capsys.readouterr().err}"


# ---- the benchmark: no times are asserted


@pytest.mark.parametrize(("name", "millions"), [("minilm", 22.713), ("llama", 218.112), ("small", 1)])
def test_models_have_their_number_of_parameters(name, millions):
    assert sum(map(math.prod, benchmark.SHAPES[name]())) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_steps_and_memory_of_every_candidate(tmp_path, capsys):
    flags = ["--parts", "steps", "--shapes", "tiny", "--dtypes", "float32", "bfloat16", "--repeats", 2]
    written, text = run(benchmark, tmp_path, "--device", "cpu", *flags)
    assert text.partition("\n\n")[2] in capsys.readouterr().out
    full, low = (
        {row["optimizer"]: row for row in written["results"][f"Steps: tiny, {dtype}"]}
        for dtype in ("float32", "bfloat16")
    )
    assert set(full) == set(benchmark.CANDIDATES) and set(full) - set(low) == {"SGD fused", "LCAM fused"}
    for name, row in full.items():
        assert row["ms"] > 0 and row["first, s"] > 0 and f"| {name} | {row['ms']:.3g} |" in text
    assert full["AdamW fused"]["/ AdamW fused"] == 1
    state, peak = "bytes of state a parameter", "MiB beyond the state"
    expected = [(full["NSF p=0.1"], 8), (full["LCAM"], 4), (low["NSF p=0.1"], 10)]  # float32 moments and a Kahan sum
    assert [row[state] for row, _ in expected] == pytest.approx([size for _, size in expected], abs=0.01)
    # The reference holds whole temporaries of the largest tensor, 60,000 float32; fused AdamW holds none.
    assert full["NSF reference p=0.1"][peak] > 60_000 * 4 / 2**20 > full["AdamW fused"][peak]


@pytest.mark.slow
def test_training():
    rows = benchmark.training("cpu", rounds=2, updates=3, batch=2, hidden=24)
    assert [row["optim"] for row in rows] == list(benchmark.TRAININGS)
    assert rows[0]["ratio"] == 1 and all(row["samples/s"] > 0 for row in rows)


# ---- what p does


@pytest.mark.parametrize(
    ("source", "expected"),
    [([90, 94, 96], 75), ([90, 95, 94], 80), ([96, 97, 98], math.nan), ([1, 2, 3], math.nan)],
)
def test_fronts_are_compared_where_the_source_reaches_95_percent(source, expected):
    found = what_p_does.worst_at_source(np.array(source), np.array([85.0, 80.0, 70.0]))
    assert found == pytest.approx(expected, nan_ok=True)


def test_what_p_does_in_a_few_steps(tmp_path, monkeypatch):
    few = {"MOMENTS": (2, 4), "STEPS": 5, "RATES": (1e-3, 3e-3), "SGD_RATES": (1e-1, 3e-1), "WORD_RATES": (4e-3,)}
    for name, value in {**few, "WORD_EPOCHS": 0.05}.items():
        monkeypatch.setattr(what_p_does, name, value)
    written, text = run(what_p_does, tmp_path, "--seeds", 2, "--jobs", 1)
    features = written["features"]
    source, worst, best = (np.array(features[part][0]) for part in ("source", "worst", "best_worst"))
    assert source.shape == (6, 2) and (worst <= source).all() and best == pytest.approx(worst.max(1))
    assert features["worst_at_source"][0][4] is None and "| p = 0.5 | " in text  # after five steps nothing reaches 95 %
    words = [what_p_does.rare_words(seed, embedded_data.load_bags())[:, 0, 1] for seed in (0, 1)]
    assert written["words"]["accuracy"][0] == pytest.approx(np.mean(words, 0), abs=1e-4)
    assert f"{written['words']['accuracy'][0][0]:.1f} ± " in text and "topics of docstrings" in text


# ---- direction and length


def test_bags_of_the_commonest_words():
    data = direction_and_length.load_data(None, None)
    x, y = data["train"]
    assert x.shape == (len(y), direction_and_length.WORDS) and x.max() == 1
    rare, common = (counts := x.sum(0)).min(), counts.max()
    assert 2 <= rare < common < len(y) and {words.shape[1] for words, _ in data.values()} == {x.shape[1]}


STEPS, SHAPES = 14, ((7, 5), (40,), (), (3,))
CYCLE = {"p_max": 0.5, "cycles": 3.5, "total_steps": STEPS}
CORNERS = {
    ("adam", "adam"): lambda params, p_min: torch.optim.AdamW(params, lr=0.01, weight_decay=0),
    ("nsf", "nsf"): lambda params, p_min: NSF(params, 0.01, p_min=p_min, weight_decay=0.0, grafting="none", **CYCLE),
    ("nsf", "adam"): lambda params, p_min: NSF(params, 0.01, p_min=p_min, weight_decay=0.0, **CYCLE),
}


def walk(make, p_min):
    """The tensors after each step, the last of them with gradients of zero."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(params, p_min)
    path = [[param.detach().clone() for param in params]]
    for _ in range(STEPS):
        for param in params:
            param.grad = 0.01 * torch.randn(param.shape, generator=generator) * (param is not params[-1])
        optimizer.step()
        path.append([param.detach().clone() for param in params])
    return path


def corner(direction, length):
    return lambda params, p_min: DirectionAndLength(
        params, 0.01, p_schedule(range(STEPS), p_min=p_min, **CYCLE), direction, length
    )


@pytest.mark.parametrize("p_min", [0.25, 0.0, -0.25])
@pytest.mark.parametrize("names", CORNERS)
def test_three_corners_are_adamw_and_nsf_with_and_without_grafting(names, p_min):
    torch.testing.assert_close(walk(corner(*names), p_min), walk(CORNERS[names], p_min), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p_min", [0.25, -0.25])
def test_fourth_corner_has_adams_direction_and_the_length_of_the_formula(p_min):
    adam, formula, found = (walk(corner(*names), p_min) for names in [("adam",) * 2, ("nsf",) * 2, ("adam", "nsf")])
    for k in range(STEPS):
        a, r, u = (
            [after - before for before, after in zip(*path[k : k + 2], strict=True)] for path in (adam, formula, found)
        )
        for tensor in range(len(SHAPES)):
            expected = a[tensor] * r[tensor].norm() / a[tensor].norm().clamp(min=1e-30)
            torch.testing.assert_close(u[tensor], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("nsf", 0.5, "both", 0.01), ("nsf", None, "base", 0.01)),
        (("nsf", 0.5, "direction", 0.01), ("nsf", None, "base", 0.01)),
        (("nsf", 0.5, "length", 0.01), ("nsf", None, "base", 0.01)),
        (("lcam", (0.9, 0.9), "both", 0.1), ("lcam", None, "base", 0.1)),
        (("lcam", (0.95, 0.95), "both", 0.1), ("lcam", None, "0.95", 0.1)),
        (("lcam", (0.95, 0.95), "length", 0.1), ("lcam", None, "base", 0.2)),
        (("lcam", (0.95, 0.95), "direction", 0.1), ("lcam", None, "0.95", 0.05)),
    ],
)
def test_equal_ends_make_a_method_one_that_is_known(one, other):
    generator = np.random.default_rng(0)
    words = {name: torch.from_numpy(generator.integers(2, size=(192, 30))) for name in direction_and_length.SPLITS}
    data = {name: (x, torch.arange(192) % 3) for name, x in words.items()}
    losses = [direction_and_length.train(*each, 0, 4, False, data)["test_loss"] for each in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][-1]


def test_runs_end_to_end_and_repeats_no_training(tmp_path, monkeypatch):
    flags = ["--epochs", 2, "--bf16", "--p_min", -0.25, "--nsf_rates", 0.01, "--lcam_rates", 0.1, "--jobs", 1]
    for name, rows in (("train", 240), ("test", 60)):
        embedded_data.load_digits_images()[name].select(range(rows)).to_parquet(tmp_path / f"{name}.parquet")
        flags += [f"--{name}_file", tmp_path / f"{name}.parquet"]
    trained = []
    train = direction_and_length.train
    monkeypatch.setattr(direction_and_length, "train", lambda *of: trained.append(of) or train(*of))
    run(direction_and_length, tmp_path, *flags, "--seeds", 1)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 6 + 9 == len(trained)
    before = {file: json.loads(file.read_text()) for file in runs}
    runs[0].write_text(runs[0].read_text()[:40])  # damaged
    runs[1].write_text(json.dumps({**before[runs[1]], "training": {}}))  # another training's
    del trained[:]
    written, text = run(direction_and_length, tmp_path, *flags, "--seeds", 2)
    assert [seed for _, _, _, _, seed, *_ in trained] == [0] * 2 + [1] * (6 + 9)
    assert {file: json.loads(file.read_text()) for file in runs} == before

    lcam = ["LCAM, low 0.9, high 0.95", "LCAM, low 0.95, high 0.9"]
    assert list(written["panels"]) == ["NSF, p from 1/2 to -0.25", *lcam] and "--seeds 2" in written["command"]
    for title, panel in written["panels"].items():
        assert f"## {title}" in text
        mean = {method["name"]: method["test_accuracy"][0] for method in panel["methods"].values()}
        for pair in panel["differences"]:
            difference = np.subtract(mean[pair["of"]], mean[pair["to"]])
            assert pair["same_rate"][0] == pytest.approx(difference, abs=1e-4)
            assert f"| {pair['of']} - {pair['to']} |" in text
    assert 0 < written["panels"][lcam[0]]["methods"]["both"]["low_share"][0][0] < 1
