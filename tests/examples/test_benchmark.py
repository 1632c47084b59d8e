# SPDX-License-Identifier: Apache-2.0
"""examples/benchmark.py runs, counts what it says, and knows the models' shapes. No times are asserted."""

import importlib.util
import json
import math
import weakref
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

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
    benchmark.main(
        [
            "--quick",
            "--output_dir",
            str(tmp_path),
            "--device",
            "cpu",
            "--parts",
            "steps",
            "--candidates",
            "[!N]*",
            "*p=0.1",
        ]
    )
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    ((title, rows),) = saved["results"].items()
    by_name = {row["candidate"]: row for row in rows}
    printed = capsys.readouterr().out
    chosen = {name for name in benchmark.candidates() if "NSF" not in name or "p=0.1" in name}
    assert set(by_name) == chosen and all(name in printed for name in by_name)
    assert len(rows) == len(by_name)
    assert 8 <= by_name["NSF p=0.1"]["state_bytes_per_parameter"] < 8.01
    assert 4 <= by_name["LCAM"]["state_bytes_per_parameter"] < 4.01
    # The readable path makes whole temporaries of the largest tensor, 60,000 float32; fused AdamW makes none.
    assert by_name["NSF loop p=0.1"]["extra_mib"] > 60_000 * 4 / 2**20 > by_name["AdamW fused"]["extra_mib"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    # The floor is that of the fastest pass over memory in this run, and the tiny tensors' directions fit any cache.
    fastest = 1e9 * max(saved["memory_gb_per_s"][title].values())
    assert by_name["NSF p=0.1"]["floor_ms"] == pytest.approx(1e3 * 28 * 64_160 / fastest)
    assert [by_name[name]["bytes_per_parameter"] for name in ("SGD loop", "AdamW loop", "NSF p=0.1")] == [20, 28, 36]
    assert {row["host_syncs"] for row in rows} == {None}
    for name in benchmark.BASELINES:
        assert by_name[name][f"per {name}"] == 1
    assert by_name["AdamW foreach"]["per AdamW foreach"] == 1
    assert {"torch", "numpy", "numba", "transformers", "accelerate", "hf_nsf"} <= set(saved["machine"])
    assert saved["machine"]["dtype"] == "torch.float32"


def test_candidates_cover_every_path_exponent_and_scale():
    names = set(benchmark.candidates("cpu"))
    paths = ["", " blocked", " foreach", " loop"] + [" fused"] * (importlib.util.find_spec("numba") is not None)
    assert names >= {
        f"NSF{path}{scale} p={p}" for path in paths for scale in ("", " raw") for p in (0.5, 0.25, 0.1, 0.0, -0.25)
    }
    assert names >= {f"LCAM{path}" for path in ("", " fused", " foreach", " loop")}
    assert names >= {f"{kind} {path}" for kind in ("AdamW", "SGD") for path in ("fused", "foreach", "loop")}
    assert not any("fused" in name or "blocked" in name for name in benchmark.candidates("cuda") if "NSF" in name)


def test_patterns_choose_candidates(tmp_path, capsys):
    quick = ["--quick", "--output_dir", str(tmp_path), "--device", "cpu", "--parts", "steps", "--candidates"]
    benchmark.main([*quick, "LCAM l*", "NSF loop raw p=*25"])
    (rows,) = json.loads((tmp_path / "benchmark.json").read_text())["results"].values()
    chosen = ["LCAM loop", "NSF loop raw p=0.25", "NSF loop raw p=-0.25"]
    assert [row["candidate"] for row in rows if row["candidate"] not in benchmark.BASELINES] == chosen
    with pytest.raises(SystemExit):
        benchmark.main([*quick, "LCAM*", "none such*"])
    assert "'none such*': none matches" in capsys.readouterr().err


def test_subsets_fit_in_memory_with_the_baselines_in_each():
    known, baselines = benchmark.candidates(), list(benchmark.BASELINES)
    for name in ("minilm", "llama"):
        parameters = sum(map(math.prod, benchmark.SHAPES[name]()))
        dealt = benchmark.subsets(known, known, parameters, baselines)
        assert all(subset[:2] == baselines for subset in dealt)
        assert [x for subset in dealt for x in subset[2:]] == [x for x in known if x not in baselines]
        for subset in dealt:
            assert parameters * (8 + sum(known[x].state for x in subset)) <= 8 * 2**30
    assert {len(subset) for subset in benchmark.subsets(known, known, 10**10, baselines)} == {3}
    assert benchmark.subsets(baselines, known, 10**6, baselines) == [baselines]


def test_states_are_freed_between_subsets():
    alive, most = weakref.WeakSet(), [0]

    def count(optimizer, args, kwargs):
        alive.add(optimizer)
        most[0] = max(most[0], len(alive))

    hook = register_optimizer_step_pre_hook(count)
    names = ["LCAM loop", "NSF p=0.1", "NSF loop p=0.1"]
    try:
        rows = benchmark.measure([(10,)], names, "cpu", 2, memory=0)
    finally:
        hook.remove()
    assert [row["candidate"] for row in rows] == [*benchmark.BASELINES, *names] and most == [3]


def test_only_directions_beyond_the_cache_are_counted():
    known = benchmark.candidates()
    shapes = [(100, 10), (10,)]
    assert benchmark.least_bytes(known["NSF p=0.1"], shapes, cache=400) == 36 * 1010 - 8 * (100 + 10)
    assert benchmark.least_bytes(known["NSF p=0.1"], shapes, cache=math.inf) == 28 * 1010
    assert benchmark.least_bytes(known["LCAM"], shapes, cache=400) == 20 * 1010


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
    assert set(saved["compile_s"]) == {"adam", "raw"}
    for seconds in saved["compile_s"].values():
        assert seconds["without numba's cache"] > seconds["with it"] > 0
    assert [row["optim"] for row in saved["training"]] == ["adamw_torch_fused", "nsf", "lcam"]
    for row in saved["training"]:
        assert row["samples_per_s"] > 0 and row["timed_updates"] == 4 and len(row["ratios"]) == 2
        low, high = row["ratio_quartiles"]
        assert min(row["ratios"]) <= low <= row["ratio"] <= high <= max(row["ratios"])
    assert saved["training"][0]["ratios"] == [1, 1]


def test_flatness_is_largest_over_smallest_beyond_a_size():
    rows = [{"candidate": "a", "x": x, "ns_per_parameter": y} for x, y in ((1, 9.0), (10, 2.0), (100, 3.0))]
    assert benchmark.flatness(rows) == {"a": 4.5} and benchmark.flatness(rows, 10) == {"a": 1.5}


@pytest.mark.slow
def test_quick_scaling(tmp_path):
    benchmark.main(["--quick", "--parts", "scaling", "--output_dir", str(tmp_path), "--device", "cpu"])
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    names = {"AdamW fused", "LCAM", "NSF p=0.5", "NSF p=0.1", "NSF raw p=0.1"}
    assert saved["flatness"].keys() == saved["scaling"].keys() and len(saved["scaling"]) == 2  # one size is allowed
    for kind, rows in saved["scaling"].items():
        assert set(saved["flatness"][kind]) == {row["candidate"] for row in rows} == names
        if kind.startswith("tensors"):
            assert {row["x"] for row in rows} == {10, 100, 1000, 5000}


@pytest.mark.parametrize(
    ("name", "few"), [("repeats", "1"), ("rounds", "1"), ("updates", "1"), ("most_parameters", "999")]
)
def test_too_few_are_refused(tmp_path, capsys, name, few):
    with pytest.raises(SystemExit):
        benchmark.main(["--output_dir", str(tmp_path), f"--{name}", few])
    assert f"--{name} {few}: at least" in capsys.readouterr().err
