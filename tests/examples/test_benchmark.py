# SPDX-License-Identifier: Apache-2.0
"""examples/benchmark.py runs, counts what it says, and knows the models' shapes. No times are asserted."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "examples" / "benchmark.py"
_SPEC = importlib.util.spec_from_file_location("benchmark", _PATH)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)  # conftest.py lets it import what lies beside it


@pytest.mark.parametrize(
    ("name", "millions"), [("minilm", 22.713), ("wrn", 36.54), ("vit", 86.39), ("llama", 218.112), ("small", 1.0)]
)
def test_models_have_their_number_of_parameters(name, millions):
    assert sum(map(math.prod, benchmark.SHAPES[name]())) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_quick_table(tmp_path, capsys):
    benchmark.main(["--quick", "--output_dir", str(tmp_path), "--device", "cpu", "--parts", "steps"])
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    (rows,) = saved["results"].values()
    by_name = {row["candidate"]: row for row in rows}
    printed = capsys.readouterr().out
    assert set(by_name) == set(benchmark.candidates()) and all(name in printed for name in by_name)
    assert 8 <= by_name["NSF p=0.1"]["state_bytes_per_parameter"] < 8.01
    assert 4 <= by_name["LCAM"]["state_bytes_per_parameter"] < 4.01
    # The readable path makes whole temporaries of the largest tensor, 60,000 float32; fused AdamW makes none.
    assert by_name["NSF loop p=0.1"]["extra_mib"] > 60_000 * 4 / 2**20 > by_name["AdamW fused"]["extra_mib"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.slow
def test_collectives_of_a_step(tmp_path, capsys):
    benchmark.main(["--quick", "--parts", "collectives", "--output_dir", str(tmp_path), "--device", "cpu"])
    rows = json.loads((tmp_path / "benchmark.json").read_text())["collectives"]
    counted = {(row["tensors"], row["candidate"]): row["collectives"] for row in rows}
    assert counted == {
        (kind, name): int(name == "LCAM with its loss" or (kind == "sharded" and name == "NSF p=0.1"))
        for kind in ("whole", "sharded")
        for name in ("AdamW", "NSF p=0.1", "NSF raw p=0.1", "LCAM with its loss")
    }


@pytest.mark.slow
def test_compilation_and_whole_trainings(tmp_path):
    pytest.importorskip("numba")
    benchmark.main(["--quick", "--parts", "compile", "training", "--output_dir", str(tmp_path), "--device", "cpu"])
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert saved["recompilations"] == 0
    assert saved["compile_s"]["empty cache"] > saved["compile_s"]["filled cache"] > 0
    assert [row["optim"] for row in saved["training"]] == ["adamw_torch_fused", "nsf", "lcam"]
    assert all(row["samples_per_s"] > 0 and row["updates"] == 3 for row in saved["training"])


def test_flatness_is_largest_over_smallest_beyond_a_size():
    rows = [{"candidate": "a", "x": x, "ns_per_parameter": y} for x, y in ((1, 9.0), (10, 2.0), (100, 3.0))]
    assert benchmark.flatness(rows) == {"a": 4.5} and benchmark.flatness(rows, 10) == {"a": 1.5}


@pytest.mark.slow
def test_quick_scaling(tmp_path):
    benchmark.main(["--quick", "--parts", "scaling", "--output_dir", str(tmp_path), "--device", "cpu"])
    results = json.loads((tmp_path / "benchmark.json").read_text())["scaling"]
    assert {row["x"] for row in results["tensors"]} == {10, 100, 1000, 5000}


def test_too_few_repeats_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--output_dir", str(tmp_path), "--repeats", "1"])
    assert "--repeats 1" in capsys.readouterr().err
