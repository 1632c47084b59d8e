# SPDX-License-Identifier: Apache-2.0
r"""A fair comparison of optimizers over runs of any script that trains with Hugging Face's Trainer.

    python -m hf_nsf.compare --output_dir cmp --optims adamw_torch_fused nsf "nsf:p_min=-0.25" lcam sgd:momentum=0.9 \
        --metric eval_accuracy --seeds 5 -- run_glue.py --model_name_or_path ... --eval_strategy epoch

After `--` stands the script (or `-m module`) with its arguments, without --optim, --optim_args, --learning_rate, --seed
and --output_dir: these are set by the comparison. Every run is a process of its own with a folder
OUTPUT_DIR/runs/NAME: log.txt, result.json, trainer_state.json, and in output/ what the script saves (its own
--save_strategy no keeps that small). The same command again goes on where it was stopped. With more seeds, rates or
optimizers, or another metric, finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

SEARCH = """\
Learning rate: every optimizer is tried at the same number of rates ({learning_rates}), each {factor:g} times the one
before, around a start of its own kind ({sgd_lr:g} for sgd and lcam, {adam_lr:g} for all others, or --start_lr). As long
as any optimizer's best rate is the first or last of its grid, every grid grows by one rate at its better end, up to
{max_learning_rates} rates. Best is the best mean of the final {metric}, {better} being better, over {search_seeds}
seed(s) that are not used again."""
NO_SEARCH = """\
Learning rate: one for each optimizer, {sgd_lr:g} for sgd and lcam, {adam_lr:g} for all others, or --start_lr."""
RESULT = """\
Result: every optimizer at its best rate with the same {seeds} seed(s). Mean and standard error over the seeds;
differences to the first optimizer are taken seed by seed. Runs that failed or diverged (a loss or {metric} that is not
finite at the end) are counted, and left out of means and differences."""
COST = """\
Cost to target: updates and seconds until an evaluation reaches the first optimizer's final mean, averaged over the runs
that reach it. It is as fine as the script's own evaluations (--eval_strategy); seconds are the share of train_runtime,
evaluations included, and mean little with --jobs above 1."""
OURS = {"--optim", "--optim_args", "--learning_rate", "--seed", "--output_dir"}


@dataclass(frozen=True)
class Run:
    """One training run: an optimizer with its options ("nsf:p_min=-0.25"), a learning rate and a seed."""

    optim: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{re.sub(r'[^-+.=,0-9A-Za-z]', '_', self.optim)}-lr{self.learning_rate:g}-seed{self.seed}"


class Comparison:
    """Does the runs that the protocol asks for, unless their results are there already, and sums them up."""

    def __init__(self, options: argparse.Namespace, script: list[str]) -> None:
        self.options, self.script = options, script
        self.folder = Path(options.output_dir).resolve()
        self.results: dict[Run, dict[str, Any]] = {}
        self.children: set[int] = set()
        self.lock, self.stopping = threading.Lock(), False
        self.bar = tqdm(disable=True)
        # The result has the seeds 1, 2, ...; one rate for each optimizer needs no search.
        self.seeds = range(1, options.seeds + 1)
        self.search_seeds = range(1001, 1001 + options.search_seeds * (options.learning_rates > 1))
        low = -((options.learning_rates - 1) // 2)
        steps = range(low, low + options.learning_rates)
        self.grids = {o: [_round(self.start(o) * options.factor**k) for k in steps] for o in options.optims}

    def start(self, optim: str) -> float:
        """The learning rate that an optimizer's grid is laid around."""
        name, given = optim.partition(":")[0], self.options.start_lr
        kind = self.options.sgd_lr if name == "lcam" or "sgd" in name else self.options.adam_lr
        return float(given.get(optim, given.get(name, kind)))

    def command(self, run: Run) -> list[str]:
        """The command line of a run."""
        launcher = shlex.split(self.options.launcher or "") or [sys.executable, "-m", "hf_nsf"]
        optim, _, optim_args = run.optim.partition(":")
        ours = ["--optim", optim, *(["--optim_args", optim_args] if optim_args else [])]
        ours += ["--learning_rate", f"{run.learning_rate:g}", "--seed", str(run.seed)]
        return [*launcher, *self.script, *ours, "--output_dir", str(self.folder / "runs" / run.name / "output")]

    def finished(self, run: Run) -> bool:
        """Whether the result of a run is there. Failed ones have none on disk: the next call tries them again."""
        if run not in self.results:
            with contextlib.suppress(FileNotFoundError):
                self.results[run] = _read(self.folder / "runs" / run.name / "result.json")
        return run in self.results

    def execute(self, run: Run) -> None:
        """Do one run to its end and keep its result, in a folder without remains of an earlier try."""
        folder = self.folder / "runs" / run.name
        _end_left_behind(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state, started = folder / "trainer_state.json", time.time()
        environment = {**os.environ, "HF_NSF_SAVE_STATE": str(state)}  # PhaseCallback reads it
        with open(folder / "log.txt", "wb") as log, self.lock:
            if self.stopping:
                return
            # The run itself notes its number: so none is without, whenever this process is killed.
            noted = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "pid")]
            process = subprocess.Popen(
                [*noted, *self.command(run)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # its whole group can be ended then
            )
            self.children.add(process.pid)
        code = process.wait()
        self.children.discard(process.pid)
        (folder / "pid").unlink(missing_ok=True)
        states = [path for path in (state, folder / "output" / state.name) if path.exists()]
        metrics = folder / "output" / "all_results.json"
        result: dict[str, Any] = {"seconds": time.time() - started}
        if code:
            result["failed"] = f"exit code {code}"
        elif not states and not metrics.exists():
            result["failed"] = "neither a trainer_state.json nor an all_results.json"
        else:
            result["log_history"] = _read(states[0])["log_history"] if states else []
            result["all_results"] = _read(metrics) if metrics.exists() else {}
            _write(folder / "result.json", json.dumps(result))
        self.results[run] = result

    def run_all(self, runs: list[Run]) -> None:
        """Do all runs that have no result yet, `--jobs` at a time."""
        todo = [run for run in runs if not self.finished(run)]
        self.bar.initial += len(runs) - len(todo)  # the time left is judged by the runs of this call alone
        self.bar.n += len(runs) - len(todo)
        self.bar.refresh()
        with ThreadPoolExecutor(self.options.jobs) as pool:
            try:
                futures = {pool.submit(self.execute, run): run for run in todo}
                for future in as_completed(futures):
                    future.result()
                    self.bar.update()
                    self.report(futures[future])
            except BaseException:
                with self.lock:
                    self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                _end(self.children)
                raise

    def report(self, run: Run) -> None:
        """One line about a run, and the end of its log if it failed."""
        result, value, log = self.results[run], self.value(run), self.folder / "runs" / run.name / "log.txt"
        text = f"{self.options.metric} {value:.4g}" if math.isfinite(value) else "DIVERGED"
        if "failed" in result:
            lines = log.read_text("utf-8", errors="replace").splitlines()[-10:]
            text = "\n    ".join([f"FAILED, {result['failed']}. {log} ends with", *lines])
        self.bar.write(f"{_label(run)}, seed {run.seed}, {result['seconds']:.0f} s: {text}")

    def value(self, run: Run) -> float:
        """The final metric of a run; nan if it failed or diverged."""
        result, metric = self.results[run], self.options.metric
        if "failed" in result:
            return math.nan
        last = {key: value for entry in result["log_history"] for key, value in entry.items()}
        last.update(result["all_results"])  # what a script calls its results counts more than its last log
        if metric not in last:
            known = [key for key in last if key.startswith(("eval", "test", "predict"))] or list(last)
            raise SystemExit(f"--metric {metric} is not among what {run.name} reports: {', '.join(sorted(known))}.")
        ends = [last[key] for key in (metric, "loss", "train_loss", "eval_loss") if key in last]
        return float(last[metric]) if all(map(math.isfinite, ends)) else math.nan

    def search_runs(self, optim: str, rate: float) -> list[Run]:
        """The runs that judge a rate."""
        return [Run(optim, rate, seed) for seed in self.search_seeds]

    def means(self, optim: str) -> list[float]:
        """The metric at each rate of the grid, nan where a run failed or diverged."""
        return [statistics.fmean(map(self.value, self.search_runs(optim, rate))) for rate in self.grids[optim]]

    def merits(self, optim: str) -> list[float]:
        """The same, turned so that more is better."""
        sign = -1 if self.options.lower_is_better else 1
        return [sign * mean if math.isfinite(mean) else -math.inf for mean in self.means(optim)]

    def best(self, optim: str) -> int:
        """Index of the best rate: of equal ones that farthest from the grid's ends; the lowest where all diverged."""
        merits = self.merits(optim) if self.search_seeds else [0.0]
        good = [k for k, merit in enumerate(merits) if merit == max(merits) > -math.inf]
        return max(good, key=lambda k: min(k, len(merits) - 1 - k), default=0)

    def on_edge(self, optim: str) -> bool:
        """Whether a better rate may lie beyond the grid."""
        return bool(self.search_seeds) and self.best(optim) in (0, len(self.grids[optim]) - 1)

    def search(self) -> None:
        """Try the rates, and more of them as long as an optimizer's best one is on an edge."""
        while True:
            size = max(map(len, self.grids.values()), default=0)
            runs = [run for k in range(size) for o in self.grids for run in self.search_runs(o, self.grids[o][k])]
            self.run_all([run for run in runs if run not in self.results])
            for optim in list(self.grids):  # a wrong name or option must not let all other grids grow
                if all("failed" in self.results[run] for run in runs if run.optim == optim):
                    del self.grids[optim]
                    self.bar.total -= len(self.seeds)
                    self.bar.write(f"{optim}: all runs failed, so it is left out. If only for its rates: --start_lr.")
            edges = [optim for optim in self.grids if self.on_edge(optim)]
            if not edges or size >= self.options.max_learning_rates:
                return
            self.bar.write(f"One more rate for each, the best being on the edge for {', '.join(edges)}.")
            self.bar.total += len(self.grids) * len(self.search_seeds)
            for optim, grid in self.grids.items():
                merits, factor = self.merits(optim), self.options.factor
                up = merits[-1] > merits[0]
                self.grids[optim] = [*grid, _round(grid[-1] * factor)] if up else [_round(grid[0] / factor), *grid]

    def final_runs(self) -> list[Run]:
        """The runs of the result, one seed after the other."""
        rates = {optim: grid[self.best(optim)] for optim, grid in self.grids.items()}
        return [Run(optim, rate, seed) for seed in self.seeds for optim, rate in rates.items()]

    def count(self) -> int:
        """The number of runs, as the grids are now."""
        return sum(len(grid) * len(self.search_seeds) + len(self.seeds) for grid in self.grids.values())

    def run(self) -> dict[str, Any]:
        """The whole comparison, and its summary."""
        with tqdm(total=self.count(), unit="run", smoothing=0, dynamic_ncols=True) as self.bar:
            if self.search_seeds:
                self.search()
            self.run_all(self.final_runs())
        return self.summary()

    def cost(self, run: Run, target: float) -> tuple[int, float] | None:
        """Updates and seconds (nan if unknown) until a run reached the target; None if it did not."""
        metric, end = self.options.metric, self.value(run)
        history = self.results[run]["log_history"] if math.isfinite(end) else []
        steps = history[-1]["step"] if history else 0
        runtimes = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
        evaluations = [(entry["step"], entry[metric]) for entry in history if metric in entry]
        for step, reached in [*evaluations, (steps, end)] if steps else []:
            if reached <= target if self.options.lower_is_better else reached >= target:
                return step, runtimes[-1] * step / steps if runtimes else math.nan
        return None

    def summary(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        values = {o: {r: self.value(r) for r in self.final_runs() if r.optim == o} for o in self.options.optims}
        first = [*values.values()][0]
        target = _mean(first.values())[0]
        rows = []
        for optim, mine in values.items():
            # Runs of one seed stand at the same place of both; the first optimizer has no difference to itself.
            pairs = zip(mine.values(), () if mine is first else first.values(), strict=False)
            costs = [cost for run in mine if target is not None and (cost := self.cost(run, target))]
            row: dict[str, Any] = {"optim": optim, "learning_rate": next((run.learning_rate for run in mine), None)}
            row["mean"], row["error"] = _mean(mine.values())
            row["difference"], row["difference_error"] = _mean(one - other for one, other in pairs)
            row["updates_to_target"] = _mean(updates for updates, _ in costs)[0]
            row["seconds_to_target"] = _mean(seconds for _, seconds in costs)[0]
            row |= {"reached": len(costs), "runs": len(mine), "lost": sum(map(math.isnan, mine.values()))}
            row["values"] = {run.seed: _or_none(value) for run, value in mine.items()}
            searched = optim in self.grids and bool(self.search_seeds)
            row["rate_on_edge"] = searched and self.on_edge(optim)
            means = zip(self.grids[optim], self.means(optim), strict=True) if searched else ()
            row["search"] = {f"{rate:g}": _or_none(mean) for rate, mean in means}
            rows.append(row)
        return {"metric": self.options.metric, "target": target, "optimizers": rows}

    def picture(self, path: Path) -> str | None:
        """Draw the runs of the result, or say why not."""
        runs = [run for run in self.final_runs() if math.isfinite(self.value(run))]
        try:
            from hf_nsf.plots import plot_runs

            figure = plot_runs(*(self.results[r]["log_history"] for r in runs), labels=[_label(r) for r in runs])
        except (ImportError, ValueError) as error:  # no matplotlib, or nothing to draw
            return f"No picture: {error}"
        figure.savefig(path)
        return None


def _round(rate: float) -> float:
    return float(f"{rate:.4g}")  # as it stands on the command line and in the folder's name


def _label(run: Run) -> str:
    return f"{run.optim}, lr {run.learning_rate:g}"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no nan


def _mean(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error over the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    error = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else None
    return (statistics.fmean(finite) if finite else None), error


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _end(groups: Iterable[int]) -> None:
    """End process groups: politely first, since launchers then end what they started, after 10 s by force."""
    left = set(groups)
    for number in (signal.SIGTERM.value, signal.SIGKILL.value):
        until = time.monotonic() + 10
        while left and time.monotonic() < until:
            for group in list(left):
                try:
                    os.killpg(group, number)
                except OSError:
                    left.discard(group)
            number = 0  # from now on: is it still there?
            time.sleep(0.05)


def _end_left_behind(folder: Path) -> None:
    """End a run whose comparison was killed, if it still writes into this folder (where /proc tells)."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / "pid").read_text("utf-8"))
        if os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes():  # numbers of processes are used again
            _end([pid])


def _protocol(options: argparse.Namespace) -> str:
    """What is done, in full."""
    values = {**vars(options), "better": "lower" if options.lower_is_better else "higher"}
    parts = (SEARCH if options.learning_rates > 1 else NO_SEARCH, RESULT, COST)
    texts = (f"{k}. {' '.join(part.split())}".format(**values) for k, part in enumerate(parts, 1))
    return "\n".join(textwrap.fill(text, 100, subsequent_indent="   ") for text in texts)


def _figure(value: float | None, error: float | None = None, form: str = ".4g") -> str:
    text = "–" if value is None else f"{round(value, 12):{form}}"  # a sum of equal differences is not always 0
    return text if error is None else f"{text} ± {error:.2g}"


def table(summary: dict[str, Any]) -> str:
    """The summary as a table in Markdown."""
    rows, metric = summary["optimizers"], summary["metric"]
    first = rows[0]["optim"]
    lines = [["optimizer", "learning rate", metric, f"difference to {first}", "updates to target", "seconds to target"]]
    lines[0] += ["reached it", "failed or diverged"]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        rate = _figure(row["learning_rate"], form="g") + (" (edge)" if row["rate_on_edge"] else "")
        line = [f"`{row['optim']}`", rate, _figure(row["mean"], row["error"])]
        line += [_figure(row["difference"], row["difference_error"], "+.3g"), _figure(row["updates_to_target"])]
        line += [_figure(row["seconds_to_target"]), f"{row['reached']} of {row['runs']}"]
        lines.append([*line, f"{row['lost']} of {row['runs']}" if row["runs"] else "all of the search"])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text += f"\n\nTarget: {metric} {_figure(summary['target'])}, the final mean of `{first}`.  "
    for row in rows if any(row["search"] for row in rows) else ():
        found = ", ".join(f"{_figure(mean)} at {rate}" for rate, mean in row["search"].items())
        text += f"\nSearch of `{row['optim']}`: {found or 'failed'}.  "
    return text + "\n"


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def _count(text: str) -> int:
    _positive(text)
    return int(text)


def _named_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.rpartition("=")  # the name may hold one itself: nsf:p_min=0=1e-4
    if not name:
        raise argparse.ArgumentTypeError(f"{text} is not of the form OPTIMIZER=RATE")
    return name, _positive(rate)


def parser() -> argparse.ArgumentParser:
    """The comparison's own options, those before `--`."""
    made = argparse.ArgumentParser(
        prog="python -m hf_nsf.compare",
        usage="%(prog)s --output_dir DIR --optims NAME[:OPTIONS] ... [options] -- SCRIPT [its arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--output_dir", required=True, help="for the runs, comparison.json, comparison.md and comparison.png")
    add("--optims", required=True, nargs="+", help='values of --optim, with --optim_args after a colon: "nsf:p_min=0"')
    add("--metric", default="eval_loss", help="as in the script's logs (%(default)s)")
    add("--lower_is_better", action="store_true", default=None, help="default if the metric's name ends in loss")
    add("--higher_is_better", dest="lower_is_better", action="store_false", help="default if it does not")
    add("--seeds", type=_count, default=5, help="of the result (%(default)s)")
    add("--search_seeds", type=_count, default=1, help="of the search for a learning rate (%(default)s)")
    add("--learning_rates", type=_count, default=3, help="to begin with; 1: no search (%(default)s)")
    add("--max_learning_rates", type=_count, default=9, help="how many there may be in the end (%(default)s)")
    add("--factor", type=_positive, default=2.0, help="between neighbouring rates (%(default)s)")
    add("--adam_lr", type=_positive, default=1e-4, help="where the rates start, for all but sgd and lcam (%(default)s)")
    add("--sgd_lr", type=_positive, default=0.02, help="where they start for sgd and lcam (%(default)s)")
    add("--start_lr", type=_named_rate, nargs="+", default=[], metavar="OPTIMIZER=RATE", help="for single optimizers")
    add("--launcher", help='what starts the script (python -m hf_nsf), e.g. "torchrun --nproc_per_node 2 -m hf_nsf"')
    add("--jobs", type=_count, default=1, help="runs at a time; torchrun then needs --standalone (%(default)s)")
    add("--dry_run", action="store_true", help="print the plan and the number of runs")
    defaults = made.parse_args(["--output_dir=", "--optims", "", "--lower_is_better"])
    made.epilog = "The protocol, here with the defaults:\n" + _protocol(defaults)
    return made


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The comparison's options, and the script with its arguments. Errors end the program with one sentence."""
    made = parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    options, script = made.parse_args(argv[:cut]), argv[cut + 1 :]
    options.start_lr = dict(options.start_lr)
    options.max_learning_rates = max(options.max_learning_rates, options.learning_rates)
    if options.lower_is_better is None:
        options.lower_is_better = options.metric.endswith("loss")
    ours = [text for text in script if text.partition("=")[0].replace("-", "_").replace("__", "--", 1) in OURS]
    unknown = set(options.start_lr) - set(options.optims) - {optim.partition(":")[0] for optim in options.optims}
    if not script:
        made.error("the script and its arguments are missing: they stand after --")
    if script[0].endswith(".py") and not Path(script[0]).is_file():
        made.error(f"there is no script {script[0]}")
    if options.launcher and not shutil.which(shlex.split(options.launcher)[0]):
        made.error(f"there is no program for --launcher {options.launcher}")
    if ours:
        made.error(f"leave {' and '.join(ours)} out of the script's arguments: the comparison sets it")
    if len({Run(optim, 0, 0).name for optim in options.optims}) < len(options.optims):
        made.error("two of --optims are the same")
    if unknown:
        made.error(f"--start_lr names {', '.join(sorted(unknown))}, which is not among --optims")
    if options.factor <= 1:
        made.error("--factor must be above 1")
    return options, script


def _take(folder: Path, command: dict[str, Any]) -> Any:
    """Take the folder for this process and this command, or say why not; the lock lasts as long as what is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"Another comparison is at work in {folder}.") from None
    known = folder / "command.json"
    before = _read(known) if known.exists() else command
    if before != command:
        text = f"{before['launcher'] or 'python -m hf_nsf'} {shlex.join(before['script'])}"
        raise SystemExit(f"{folder} holds runs of another command, {text}: take another --output_dir, or remove it.")
    _write(known, json.dumps(command))
    return lock


def main(argv: list[str] | None = None) -> int:
    """Compare as the command line says, and return the exit code."""
    options, script = parse(sys.argv[1:] if argv is None else argv)
    comparison = Comparison(options, script)
    folder, protocol = comparison.folder, _protocol(options)
    print(protocol)
    if options.dry_run:
        for optim, grid in comparison.grids.items():
            print(f"{optim}: learning rates {', '.join(f'{rate:g}' for rate in grid)}")
        more = (options.max_learning_rates - options.learning_rates) * len(comparison.search_seeds)
        print(f"{comparison.count()} runs, up to {comparison.count() + more * len(options.optims)}, such as")
        print(shlex.join(comparison.command(Run(options.optims[0], comparison.grids[options.optims[0]][0], 1))))
        return 0
    with _take(folder, {"launcher": options.launcher, "script": script}):
        try:
            summary = comparison.run()
        except KeyboardInterrupt:
            print("Stopped. Finished runs are kept: the same command goes on.", file=sys.stderr)
            return 130
    _write(folder / "comparison.json", json.dumps({**summary, "protocol": protocol}, indent=1, allow_nan=False))
    _write(folder / "comparison.md", f"{table(summary)}\n{protocol}\n")
    reason = comparison.picture(folder / "comparison.png")
    print(f"\n{table(summary)}\nWritten to {folder}: comparison.json, comparison.md, {reason or 'comparison.png'}")
    failed = sum("failed" in result for result in comparison.results.values())
    if failed:
        print(f"{failed} runs failed; the same command tries them again.")
    return 1 if summary["target"] is None else 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
