# SPDX-License-Identifier: Apache-2.0
"""Direction and length: three corners of the trial are known optimizers, and a rerun repeats no training."""

import json

import direction_and_length
import numpy as np
import PIL.Image
import pytest
import torch
from direction_and_length import DirectionAndLength
from embedded_data import load_digits_images

from hf_nsf import NSF, p_schedule

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
    data = {
        name: (generator.integers(2, size=(192, 30), dtype=np.uint8), np.arange(192) % 3)
        for name in direction_and_length.SPLITS
    }
    losses = [direction_and_length.train(*each, 0, 4, False, data)["test_loss"] for each in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][-1]


def test_runs_end_to_end_and_repeats_no_training(tmp_path, monkeypatch):
    for name, split in load_digits_images().items():
        split.select(range(240 if name == "train" else 60)).to_parquet(tmp_path / f"{name}.parquet")
    args = ["--output_dir", str(tmp_path / "out"), "--train_file", str(tmp_path / "train.parquet"), "--jobs", "1"]
    args += ["--test_file", str(tmp_path / "test.parquet"), "--epochs", "2", "--bf16", "--p_min", "-0.25"]
    args += ["--nsf_rates", "0.01", "--lcam_rates", "0.1", "--seeds"]
    trained = []
    train = direction_and_length.train
    monkeypatch.setattr(direction_and_length, "train", lambda *of: trained.append(of) or train(*of))
    direction_and_length.main([*args, "1"])
    runs = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 6 + 9 == len(trained)
    before = {file: json.loads(file.read_text()) for file in runs}
    runs[0].write_text(runs[0].read_text()[:40])  # damaged
    runs[1].write_text(json.dumps({**before[runs[1]], "training": {}}))  # another training's
    del trained[:]
    direction_and_length.main([*args, "2"])
    assert [seed for _, _, _, _, seed, *_ in trained] == [0] * 2 + [1] * (6 + 9)
    assert {file: json.loads(file.read_text()) for file in runs} == before

    name = tmp_path / "out" / "direction_and_length"
    written = json.loads(name.with_suffix(".json").read_text())
    text = name.with_suffix(".md").read_text()
    assert text.startswith(f"`{written['command']}`") and "--seeds 2" in written["command"]
    lcam = ["LCAM, low 0.9, high 0.95", "LCAM, low 0.95, high 0.9"]
    assert list(written["panels"]) == ["NSF, p from 1/2 to -0.25", *lcam]
    for title, panel in written["panels"].items():
        assert f"## {title}" in text
        mean = {method["name"]: method["test_accuracy"][0] for method in panel["methods"].values()}
        for pair in panel["differences"]:
            difference = np.subtract(mean[pair["of"]], mean[pair["to"]])
            assert pair["same_rate"][0] == pytest.approx(difference, abs=1e-4)
            assert f"| {pair['of']} - {pair['to']} |" in text
    assert 0 < written["panels"][lcam[0]]["methods"]["both"]["low_share"][0][0] < 1
    with PIL.Image.open(name.with_suffix(".png")) as picture:
        assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
        (["--jobs", "-1"], "--jobs -1: give 1 or more"),
        (["--train_file", "a.parquet"], "give both or neither"),
        (["--train_file", "gone.parquet", "--test_file", "gone.parquet"], "gone.parquet"),
    ],
)
def test_bad_input_is_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        direction_and_length.main(["--output_dir", str(tmp_path), *flags])
    assert sentence in f"{caught.value}{capsys.readouterr().err}"
