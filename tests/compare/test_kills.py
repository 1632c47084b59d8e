# SPDX-License-Identifier: Apache-2.0
"""Comparisons that are killed at random, with their runs and children, end as undisturbed ones do."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from stand_in import Bench

# A fourth of the runs ignores SIGTERM, a fourth has a child in a session of its own.
RUN = """
if os.getpid() % 4 == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = start_child() if os.getpid() % 4 == 1 else None
time.sleep(0.6)
if child:
    child.kill()
    child.wait()
save(log)
"""
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


def figures(bench):
    """All of comparison.json but the remark that a run was killed after its final results, which count."""
    summary = bench.summary()
    return {**summary, "optimizers": [{**row, "exit_codes": None} for row in summary["optimizers"]]}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_signals_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no picture: it would take half of the time')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    rng = random.Random(0)

    def bench_in(name, code):
        (tmp_path / name).mkdir()
        return Bench(tmp_path / name, a=code, b=code)

    def comparison(bench):
        return bench.popen(bench.arguments("--optims", "a", "b", "--seeds", "2", "--jobs", "3"))

    undisturbed = bench_in("undisturbed", "save(log)")
    assert comparison(undisturbed).communicate() and undisturbed.summary()["optimizers"]
    kills = 0
    while kills < 100:
        bench = bench_in(str(kills), RUN)
        for _ in range(6):
            process = comparison(bench)
            time.sleep(rng.uniform(0.4, 2.5))
            if rng.random() < 0.3 and (runs := bench.alive()):
                os.kill(rng.choice(runs), signal.SIGKILL)
                kills += 1
            number = rng.choice([*SIGNALS, signal.SIGKILL])
            process.send_signal(number)
            kills += 1
            if rng.random() < 0.6:
                time.sleep(rng.choice([0.01, 0.3, 1.1, 1.5]))
                process.send_signal(rng.choice(SIGNALS))
                kills += 1
            _, errors = process.communicate(timeout=60)
            assert "Traceback" not in errors, (bench.folder, errors[-2000:])
            if process.returncode == 130:
                time.sleep(0.1)
                assert not bench.alive(), (bench.folder, number)
        bench.set_faults()
        assert comparison(bench).communicate(timeout=120)
        assert figures(bench) == figures(undisturbed), bench.folder
        assert not bench.alive()
