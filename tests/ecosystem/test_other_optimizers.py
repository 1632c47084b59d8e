# SPDX-License-Identifier: Apache-2.0
"""NSF beside others' optimizers: Padam, which is its raw formula with p fixed, and the benchmark's candidates."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from problems import drive, make_parameters, relative_error

from hf_nsf import NSF

pytestmark = pytest.mark.ecosystem
B2 = 0.999


@pytest.mark.parametrize("p", [0.125, 0.25, 0.5])
def test_raw_nsf_is_padam(p):
    padam = pytest.importorskip("pytorch_optimizer").PAdam
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    options = {"lr": 1e-2, "betas": (0.9, B2), "weight_decay": 0.0, "eps": 1e-30}
    nsf, other = NSF(ours, p=p, step_scale="raw", **options), padam(theirs, partial=p, **options)
    for t in range(1, 51):
        # It divides v by its bias to the power 1/2, whatever p is.
        nsf.param_groups[0]["lr"] = 1e-2 * (1 - B2**t) ** (0.5 - p)
        drive(nsf, ours, steps=t, skip=t - 1)
        drive(other, theirs, steps=t, skip=t - 1)
    assert relative_error(ours, theirs) < 1e-12


def test_the_benchmark_measures_those_that_are_installed(monkeypatch):
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("optimi")
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.setattr(sys, "path", [str(examples), *sys.path])
    spec = importlib.util.spec_from_file_location("benchmark", examples / "benchmark.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    names = ["PAdam", "optimi Adam"]
    rows = benchmark.measure(benchmark.SHAPES["tiny"](), names, "cpu", repeats=2)
    assert [row["candidate"] for row in rows] == [*benchmark.BASELINES, *names] and all(row["ms"] > 0 for row in rows)
