# SPDX-License-Identifier: Apache-2.0
"""A folder with a script that only writes what a Trainer would write, and short ways to compare optimizers with it.

Plans can be carried out without it: a function makes the result of each run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hf_nsf.compare.plan import Plan

# The metric falls with the square of the distance from the best rate in octaves. Bench.set_faults gives single
# optimizers Python code, which is executed instead of writing results.
SCRIPT = """
import json, math, os, signal, subprocess, sys, time
from pathlib import Path
is_file = sys.argv[1].endswith(".json")
given = json.loads(Path(sys.argv[1]).read_text()) if is_file else dict(zip(sys.argv[1::2], sys.argv[2::2]))
optim, seed, rate = given["--optim"], int(given["--seed"]), float(given["--learning_rate"])
work, out, state = Path(sys.argv[0]).parent, Path(given["--output_dir"]), Path(os.environ["HF_NSF_SAVE_STATE"])
with open(work / "starts", "a") as file:
    file.write(f"{optim} {rate:g} {seed} {os.getpid()}\\n")
out.mkdir()  # an error where an earlier try left something
value = 0.9 - 0.01 * math.log2(rate / (4e-4 if optim == "b" else 1e-4)) ** 2 + 0.001 * seed
log = [{"loss": 1.0, "step": 1}, {"eval_accuracy": value, "step": 2}, {"train_runtime": 4.0, "step": 2}]
save = lambda log, path=state: path.write_text(json.dumps({"log_history": log}))
results = lambda text: (out / "all_results.json").write_text(text)
def start_child(**settings):
    code = "import os, time; open(%r, 'a').write(f'{os.getpid()} '); time.sleep(90)" % str(work / "children")
    child = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True, **settings)
    while not (work / "children").exists(): time.sleep(0.02)
    return child
code = json.loads((work / "faults.json").read_text()).get(optim, "save(log)")
exec(code)
"""


class Bench:
    """One folder with the script and a comparison of it."""

    def __init__(self, folder: Path, **faults: str) -> None:
        self.folder, self.script, self.out = folder, folder / "script.py", folder / "cmp"
        self.script.write_text(SCRIPT)
        self.set_faults(**faults)

    def set_faults(self, **faults: str) -> None:
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def arguments(self, *options: str, script: tuple[str, ...] = ()) -> list[str]:
        ours = ["--output_dir", str(self.out), "--metric", "eval_accuracy"]
        ours += ["--launcher", f"{sys.executable} -S"]  # starts at once
        return [*ours, *options, "--", str(self.script), *script]

    def one_rate(self, *optims_and_options: str) -> list[str]:
        return self.arguments("--seeds", "1", "--learning_rates", "1", "--optims", *optims_and_options)

    def summary(self) -> dict:
        return json.loads((self.out / "comparison.json").read_text())

    def starts(self) -> list[tuple[str, float, int]]:
        """Optimizer, learning rate and seed of each run that was started."""
        return [(optim, float(rate), int(seed)) for optim, rate, seed, _ in self._lines()]

    def alive(self) -> list[int]:
        """The processes of runs, and of children that noted themselves, that are alive."""
        children = self.folder / "children"
        noted = children.read_text().split() if children.exists() else []
        return [pid for pid in map(int, [*(line[3] for line in self._lines()), *noted]) if alive(pid)]

    def _lines(self) -> list[list[str]]:
        path = self.folder / "starts"
        return [line.rsplit(maxsplit=3) for line in path.read_text().splitlines()] if path.exists() else []

    def popen(self, arguments: list[str], **kwargs) -> subprocess.Popen:
        """The comparison in a process of its own, which Ctrl-C reaches even if this is a job in the background."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        settings["env"] = {"PYTHONPATH": str(Path(__file__).parents[2]), **os.environ}
        settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, "-m", "hf_nsf.compare", *arguments], **settings | kwargs)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def plan_options(*optims: str, **changes) -> argparse.Namespace:
    given = {"metric": "eval_accuracy", "better": "higher", "seeds": 3, "search_seeds": 1, "learning_rates": 3}
    given |= {"max_learning_rates": 9, "factor": 2.0, "adam_lr": 1e-4, "sgd_lr": 0.02, "start_lr": {}}
    return argparse.Namespace(optims=list(optims), **given | changes)


def carry_out(plan: Plan, train) -> Plan:
    for runs in plan.stages():
        for run in runs:
            plan.results.setdefault(run, train(run))
    return plan
