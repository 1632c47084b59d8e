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
    text, printed = (tmp_path / "benchmark.md").read_text(), capsys.readouterr().out
    assert text.startswith("`python examples/benchmark.py --output_dir ") and text.partition("\n\n")[2] in printed
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    full, low = ({row["optimizer"]: row for row in results[f"Steps: tiny, {dtype}"]} for dtype in parts[5:7])
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
