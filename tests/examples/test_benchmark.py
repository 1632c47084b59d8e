# SPDX-License-Identifier: Apache-2.0
"""examples/benchmark.py runs and counts what it says. No times are asserted."""

import json
import math

import benchmark
import pytest


@pytest.mark.parametrize(("name", "millions"), [("minilm", 22.713), ("llama", 218.112), ("small", 1)])
def test_models_have_their_number_of_parameters(name, millions):
    assert sum(map(math.prod, benchmark.SHAPES[name]())) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_steps_and_memory_of_every_candidate(tmp_path, capsys):
    parts = ["--parts", "steps", "--shapes", "tiny", "--dtypes", "float32", "bfloat16", "--repeats", "2"]
    benchmark.main(["--output_dir", str(tmp_path), "--device", "cpu", *parts])
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "benchmark.md").read_text().strip()
    full = {row["optimizer"] for row in results["Steps: tiny, float32"]}
    low = {row["optimizer"] for row in results["Steps: tiny, bfloat16"]}
    assert full == set(benchmark.CANDIDATES) and full - low == {"SGD fused", "LCAM fused"}
    for row in results["Steps: tiny, float32"]:
        assert row["ms"] > 0 and row["first, s"] > 0 and row["optimizer"] in printed
    (base,) = [row for row in results["Steps: tiny, float32"] if row["optimizer"] == "AdamW fused"]
    assert base["/ AdamW fused"] == 1
    state, peak = "bytes of state a parameter", "MiB beyond the state"
    rows = {row["optimizer"]: row for row in results["Steps: tiny, float32"]}
    assert rows["NSF p=0.1"][state] == pytest.approx(8, abs=0.01)
    assert rows["LCAM"][state] == pytest.approx(4, abs=0.01)
    # The reference holds whole temporaries of the largest tensor, 60,000 float32; fused AdamW holds none.
    assert rows["NSF reference p=0.1"][peak] > 60_000 * 4 / 2**20 > rows["AdamW fused"][peak]
    low_rows = {row["optimizer"]: row for row in results["Steps: tiny, bfloat16"]}
    assert low_rows["NSF p=0.1"][state] == pytest.approx(10, abs=0.01)  # moments in float32, a Kahan sum


@pytest.mark.slow
def test_training():
    rows = benchmark.training("cpu", rounds=2, updates=3, batch=2, hidden=24)
    assert [row["optim"] for row in rows] == list(benchmark.TRAININGS)
    assert rows[0]["ratio"] == 1 and all(row["samples/s"] > 0 for row in rows)
