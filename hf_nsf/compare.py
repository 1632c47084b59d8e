# SPDX-License-Identifier: Apache-2.0
r"""A fair comparison of optimizers over runs of any script that trains with Hugging Face's Trainer.

    python -m hf_nsf.compare --output_dir cmp --optims adamw_torch_fused nsf "nsf:p_min=-0.25" lcam sgd:momentum=0.9 \
        --metric eval_accuracy --seeds 5 -- run_glue.py --model_name_or_path ... --eval_strategy epoch

After `--` stands the script (or `-m module`) with its arguments, without --optim, --optim_args, --learning_rate, --seed
and --output_dir: these are set by the comparison. Every run is a process with a folder OUTPUT_DIR/runs/NAME: log.txt,
result.json, trainer_state.json, and in output/ what the script saves (its own --save_strategy no keeps that small).
The same command again goes on where it was stopped. With more seeds, rates or optimizers, or another metric, finished
runs are not repeated.
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
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any, NamedTuple

import psutil
from tqdm import tqdm

PROTOCOL = """\
1. Learning rate: every optimizer is tried at the same number of rates ({learning_rates}), each {factor:g} times the one
   before, around {sgd_lr:g} for sgd and lcam, {adam_lr:g} for others, or --start_lr. While the best rate of any
   optimizer is the first or last of its grid, every grid grows by one rate at its better end, up to
   {max_learning_rates} rates. Best is the best mean of the final {metric}, {better} being better, over
   {search_seeds} seed(s) that are not used again. With one rate there is no search.
2. Result: every optimizer at its best rate with the same {seeds} seed(s), mean and standard error. Differences to the
   first optimizer are taken seed by seed. Runs that failed or diverged (a loss or {metric} that is not
   finite at the end) are counted, and left out of means and differences.
3. Cost to target: updates and seconds until an evaluation reaches the first optimizer's final mean, averaged over the
   runs that reach it. It is as fine as the script's own evaluations (--eval_strategy); seconds are the share of
   train_runtime, evaluations included, and mean little with --jobs above 1."""
OURS = {"--optim", "--optim_args", "--learning_rate", "--seed", "--output_dir"}
STATE = "trainer_state.json"
SAVE_STATE = "HF_NSF_SAVE_STATE"  # PhaseCallback saves the Trainer's state where this environment variable says


class Run(NamedTuple):
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
        self.folder = Path(options.output_dir).resolve() / "runs"
        self.results: dict[Run, dict[str, Any]] = {}
        self.sign = -1 if options.better == "lower" else 1
        self.bar = tqdm(disable=True)
        # The result has the seeds 1, 2, ...; one rate for each optimizer needs no search.
        self.seeds = range(1, options.seeds + 1)
        self.search_seeds = range(1001, 1001 + options.search_seeds * (options.learning_rates > 1))
        self.grids: dict[str, list[float]] = {}
        for optim in options.optims:
            name, low = optim.partition(":")[0], (options.learning_rates - 1) // 2
            kind = options.sgd_lr if name == "lcam" or "sgd" in name else options.adam_lr
            start = options.start_lr.get(optim, options.start_lr.get(name, kind))
            self.grids[optim] = [_round(start * options.factor ** (k - low)) for k in range(options.learning_rates)]

    def command(self, run: Run) -> list[str]:
        """The command line of a run."""
        launcher = shlex.split(self.options.launcher or "") or [sys.executable, "-m", "hf_nsf"]
        optim, _, optim_args = run.optim.partition(":")
        ours = ["--optim", optim, *(["--optim_args", optim_args] if optim_args else [])]
        ours += ["--learning_rate", f"{run.learning_rate:g}", "--seed", str(run.seed)]
        return [*launcher, *self.script, *ours, "--output_dir", str(self.folder / run.name / "output")]

    def launch(self, run: Run) -> Popen[bytes]:
        """Start a run in a folder without remains of an earlier try."""
        folder = self.folder / run.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = {**os.environ, SAVE_STATE: str(folder / STATE)}
        with open(folder / "log.txt", "wb") as log:
            # In a session of its own, Ctrl-C does not reach it: the comparison ends its runs.
            return Popen(
                self.command(run), stdin=DEVNULL, stdout=log, stderr=STDOUT, env=environment, start_new_session=True
            )

    def finish(self, run: Run, code: int, seconds: float) -> None:
        """Keep and report the result of a run. Failed ones have none on disk: the next call tries them again."""
        folder = self.folder / run.name
        files = [folder / "output" / "all_results.json", folder / "output" / STATE, folder / STATE]
        found = {file.name: json.loads(file.read_text("utf-8")) for file in files if file.exists() and not code}
        result: dict[str, Any] = {"seconds": seconds}
        self.results[run] = result
        if found:
            result["log_history"] = found[STATE]["log_history"] if STATE in found else []
            result["all_results"] = found.get("all_results.json", {})
            _write(folder / "result.json", json.dumps(result))
            value = self.value(run)
            text = f"{self.options.metric} {value:.4g}" if math.isfinite(value) else "DIVERGED"
        else:
            result["failed"] = f"exit code {code}" if code else "neither a trainer_state.json nor an all_results.json"
            lines = (folder / "log.txt").read_text("utf-8", errors="replace").splitlines()[-10:]
            text = "\n    ".join([f"FAILED, {result['failed']}. {folder}/log.txt ends with", *lines])
        self.bar.write(f"{run.optim}, lr {run.learning_rate:g}, seed {run.seed}, {seconds:.0f} s: {text}")

    def run_all(self, runs: list[Run]) -> None:
        """Do all runs that have no result yet, `--jobs` at a time."""
        new = {run: self.folder / run.name / "result.json" for run in runs if run not in self.results}
        self.results |= {run: json.loads(file.read_text("utf-8")) for run, file in new.items() if file.exists()}
        todo = [run for run in new if run not in self.results]
        self.bar.initial += len(new) - len(todo)  # the time left is judged by the runs of this call alone
        self.bar.update(len(new) - len(todo))
        running: dict[Run, tuple[Popen[bytes], float]] = {}
        while todo or running:
            while todo and len(running) < self.options.jobs:
                run = todo.pop(0)
                running[run] = self.launch(run), time.time()
            time.sleep(0.05)
            for run, (process, started) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[run]
                    self.bar.update()
                    self.finish(run, code, time.time() - started)

    def value(self, run: Run) -> float:
        """The final metric of a run; nan if it failed or diverged."""
        result, metric = self.results[run], self.options.metric
        if "failed" in result:
            return math.nan
        # What a script calls its results counts more than its last log.
        last = {key: value for entry in [*result["log_history"], result["all_results"]] for key, value in entry.items()}
        if metric not in last:
            known = [key for key in last if key.startswith(("eval", "test", "predict"))] or list(last)
            raise SystemExit(f"--metric {metric} is not among what {run.name} reports: {', '.join(sorted(known))}.")
        ends = [last[key] for key in (metric, "loss", "train_loss", "eval_loss") if key in last]
        return float(last[metric]) if all(map(math.isfinite, ends)) else math.nan

    def merits(self, optim: str) -> dict[float, float]:
        """Mean metric at each rate searched, turned so that more is better; -inf where a run failed or diverged."""
        rates = self.grids.get(optim, []) if self.search_seeds else []
        means = [statistics.fmean(self.value(Run(optim, rate, seed)) for seed in self.search_seeds) for rate in rates]
        return {r: self.sign * m if math.isfinite(m) else -math.inf for r, m in zip(rates, means, strict=True)}

    def best(self, optim: str) -> tuple[float, bool]:
        """The best rate (of equals the farthest from the ends, the lowest if all diverged); whether it is an end."""
        rates, merits = self.grids[optim], self.merits(optim)
        good = [k for k, merit in enumerate(merits.values()) if merit == max(merits.values()) > -math.inf]
        best = max(good, key=lambda k: min(k, len(rates) - 1 - k), default=0)
        return rates[best], bool(merits) and best in (0, len(rates) - 1)

    def search(self) -> None:
        """Try the rates, and more of them as long as an optimizer's best one is on an edge."""
        while True:
            grids = self.grids.items()
            self.run_all([Run(optim, rate, seed) for optim, g in grids for rate in g for seed in self.search_seeds])
            for optim in list(self.grids):  # a wrong name or option must not let all other grids grow
                if all("failed" in result for run, result in self.results.items() if run.optim == optim):
                    del self.grids[optim]
                    self.bar.total -= len(self.seeds)
                    self.bar.write(f"{optim}: all runs failed, so it is left out. If only for its rates: --start_lr.")
            edges = [optim for optim in self.grids if self.best(optim)[1]]
            if not edges or len(self.grids[edges[0]]) >= self.options.max_learning_rates:
                return
            self.bar.write(f"One more rate for each, the best being on the edge for {', '.join(edges)}.")
            self.bar.total += len(self.grids) * len(self.search_seeds)
            for optim, grid in self.grids.items():
                merits, factor = self.merits(optim), self.options.factor
                up = merits[grid[-1]] > merits[grid[0]]
                self.grids[optim] = [*grid, _round(grid[-1] * factor)] if up else [_round(grid[0] / factor), *grid]

    def final_runs(self) -> list[Run]:
        """The runs of the result, one seed after the other."""
        rates = {optim: self.best(optim)[0] for optim in self.grids}
        return [Run(optim, rate, seed) for seed in self.seeds for optim, rate in rates.items()]

    def count(self, rates: int) -> int:
        """The number of runs with grids of that size."""
        return len(self.grids) * (rates * len(self.search_seeds) + len(self.seeds))

    def run(self) -> dict[str, Any]:
        """The whole comparison, and its summary."""
        total = self.count(self.options.learning_rates)
        with tqdm(total=total, unit="run", smoothing=0, dynamic_ncols=True) as self.bar:
            if self.search_seeds:
                self.search()
            self.run_all(self.final_runs())
        return self.summary()

    def cost(self, run: Run, target: float) -> tuple[int, float] | None:
        """Updates and seconds (nan if unknown) until a run reached the target; None if it did not."""
        metric, end = self.options.metric, self.value(run)
        history = self.results[run]["log_history"] if math.isfinite(end) else []
        last = {key: value for entry in history for key, value in entry.items()}
        evaluations = [(entry["step"], entry[metric]) for entry in history if metric in entry]
        for step, reached in [*evaluations, (last["step"], end)] if last.get("step") else []:
            if self.sign * reached >= self.sign * target:
                return step, last.get("train_runtime", math.nan) * step / last["step"]
        return None

    def summary(self) -> dict[str, Any]:
        """All figures, as in comparison.json: None where there is none."""
        values = {o: {r: self.value(r) for r in self.final_runs() if r.optim == o} for o in self.options.optims}
        first = values[self.options.optims[0]]
        target = _mean(first.values())[0]
        rows = []
        for optim, mine in values.items():
            # Runs of one seed stand at the same place of both; the first optimizer has no difference to itself.
            pairs = zip(mine.values(), () if mine is first else first.values(), strict=False)
            costs = [cost for run in mine if (cost := self.cost(run, target))]
            rate, on_edge = self.best(optim) if optim in self.grids else (None, False)
            row: dict[str, Any] = {"optim": optim, "learning_rate": rate}
            row["mean"], row["error"] = _mean(mine.values())
            row["difference"], row["difference_error"] = _mean(one - other for one, other in pairs)
            row["updates_to_target"] = _mean(updates for updates, _ in costs)[0]
            row["seconds_to_target"] = _mean(seconds for _, seconds in costs)[0]
            row |= {"reached": len(costs), "runs": len(mine), "lost": sum(map(math.isnan, mine.values()))}
            row["values"] = {run.seed: value for run, value in mine.items()}
            row["rate_on_edge"] = on_edge
            row["search"] = {f"{rate:g}": self.sign * merit for rate, merit in self.merits(optim).items()}
            rows.append(row)
        text = json.dumps({"metric": self.options.metric, "target": target, "optimizers": rows})
        return dict(json.loads(text, parse_constant=lambda name: None))  # JSON knows no nan

    def picture(self, path: Path) -> str | None:
        """Draw the runs of the result, or say why not."""
        runs = [run for run in self.final_runs() if math.isfinite(self.value(run))]
        labels = [f"{run.optim}, lr {run.learning_rate:g}" for run in runs]
        try:
            from hf_nsf.plots import plot_runs

            plot_runs(*(self.results[run]["log_history"] for run in runs), labels=labels).savefig(path)
        except (ImportError, ValueError) as error:  # no matplotlib, or nothing to draw
            return f"No picture: {error}"
        return None


def _round(rate: float) -> float:
    return float(f"{rate:.4g}")  # as it stands on the command line and in the folder's name


def _mean(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error over the finite values, nan where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    error = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    return statistics.fmean(finite or [math.nan]), error


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _end_runs(folder: Path) -> None:
    """End all processes of unfinished runs, known by their environment: politely first, after 10 s by force."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            state = Path(process.environ().get(SAVE_STATE, ""))
            if folder in state.parents and not state.with_name("result.json").exists():
                process.terminate()
                found.append(process)
    for process in psutil.wait_procs(found, timeout=10)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _figure(value: float | None, error: float | None = None, form: str = ".4g") -> str:
    text = "–" if value is None else f"{round(value, 12):{form}}"  # a sum of equal differences is not always 0
    return text if error is None else f"{text} ± {error:.2g}"


def table(summary: dict[str, Any]) -> str:
    """The summary as a table in Markdown."""
    rows, metric = summary["optimizers"], summary["metric"]
    first = rows[0]["optim"]
    text = f"| optimizer | learning rate | {metric} | difference to {first} | updates to target | seconds to target "
    text += f"| reached it | failed or diverged |\n{'| --- ' * 8}|\n"
    for row in rows:
        cells = [
            f"`{row['optim']}`",
            _figure(row["learning_rate"], form="g") + " (edge)" * row["rate_on_edge"],
            _figure(row["mean"], row["error"]),
            _figure(row["difference"], row["difference_error"], "+.3g"),
            _figure(row["updates_to_target"]),
            _figure(row["seconds_to_target"]),
            f"{row['reached']} of {row['runs']}",
            f"{row['lost']} of {row['runs']}" if row["runs"] else "all of the search",
        ]
        text += f"| {' | '.join(cells)} |\n"
    text += f"\nTarget: {metric} {_figure(summary['target'])}, the final mean of `{first}`.  \n"
    for row in rows if any(row["search"] for row in rows) else ():
        found = ", ".join(f"{_figure(mean)} at {rate}" for rate, mean in row["search"].items())
        text += f"Search of `{row['optim']}`: {found or 'failed'}.  \n"
    return text


def _named_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.rpartition("=")  # the name may hold one itself: nsf:p_min=0=1e-4
    if not name:
        raise argparse.ArgumentTypeError(f"{text} is not of the form OPTIMIZER=RATE")
    return name, float(rate)


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
    better = made.add_mutually_exclusive_group().add_argument
    better("--lower_is_better", dest="better", action="store_const", const="lower", help="default for a ...loss")
    better("--higher_is_better", dest="better", action="store_const", const="higher", help="default for all others")
    add("--seeds", type=int, default=5, help="of the result (%(default)s)")
    add("--search_seeds", type=int, default=1, help="of the search for a learning rate (%(default)s)")
    add("--learning_rates", type=int, default=3, help="to begin with; 1: no search (%(default)s)")
    add("--max_learning_rates", type=int, default=9, help="how many there may be in the end (%(default)s)")
    add("--factor", type=float, default=2.0, help="between neighbouring rates (%(default)s)")
    add("--adam_lr", type=float, default=1e-4, help="where the rates start, for all but sgd and lcam (%(default)s)")
    add("--sgd_lr", type=float, default=0.02, help="where they start for sgd and lcam (%(default)s)")
    add("--start_lr", type=_named_rate, nargs="+", default=[], metavar="OPTIMIZER=RATE", help="for single optimizers")
    add("--launcher", help='what starts the script (python -m hf_nsf), e.g. "torchrun --nproc_per_node 2 -m hf_nsf"')
    add("--jobs", type=int, default=1, help="runs at a time; torchrun then needs --standalone (%(default)s)")
    add("--dry_run", action="store_true", help="print the plan and the number of runs")
    defaults = made.parse_args(["--output_dir=", "--optims", "", "--lower_is_better"])
    made.epilog = "The protocol, here with the defaults:\n" + PROTOCOL.format(**vars(defaults))
    return made


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The comparison's options, and the script with its arguments. Errors end the program with one sentence."""
    made = parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    options, script = made.parse_args(argv[:cut]), argv[cut + 1 :]
    options.start_lr = dict(options.start_lr)
    options.max_learning_rates = max(options.max_learning_rates, options.learning_rates)
    options.better = options.better or ("lower" if options.metric.endswith("loss") else "higher")
    for name, number in {**vars(options), **options.start_lr}.items():
        if type(number) in (int, float) and not 0 < number < math.inf:
            made.error(f"{name}: {number:g} is not above 0")
    if options.factor <= 1:
        made.error("--factor must be above 1")
    if not script:
        made.error("the script and its arguments are missing: they stand after --")
    if script[0].endswith(".py") and not Path(script[0]).is_file():
        made.error(f"there is no script {script[0]}")
    if options.launcher and not shutil.which(shlex.split(options.launcher)[0]):
        made.error(f"there is no program for --launcher {options.launcher}")
    if ours := [text for text in script if text.partition("=")[0].replace("-", "_").replace("__", "--", 1) in OURS]:
        made.error(f"leave {' and '.join(ours)} out of the script's arguments: the comparison sets it")
    if len({Run(optim, 0, 0).name for optim in options.optims}) < len(options.optims):
        made.error("two of --optims are the same")
    if unknown := set(options.start_lr) - set(options.optims) - {optim.partition(":")[0] for optim in options.optims}:
        made.error(f"--start_lr names {', '.join(sorted(unknown))}, which is not among --optims")
    return options, script


def _lock(folder: Path, command: dict[str, Any]) -> Any:
    """Take the folder for this process and this command, or say why not; the lock lasts as long as what is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, known = open(folder / "lock", "w"), folder / "command.json"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"Another comparison is at work in {folder}.") from None
    if known.exists() and (before := json.loads(known.read_text("utf-8"))) != command:
        text = f"{before['launcher'] or 'python -m hf_nsf'} {shlex.join(before['script'])}"
        raise SystemExit(f"{folder} holds runs of another command, {text}: take another --output_dir, or remove it.")
    _write(known, json.dumps(command))
    return lock


def main(argv: list[str] | None = None) -> int:
    """Compare as the command line says, and return the exit code."""
    options, script = parse(sys.argv[1:] if argv is None else argv)
    comparison = Comparison(options, script)
    folder, protocol = Path(options.output_dir).resolve(), PROTOCOL.format(**vars(options))
    print(protocol)
    if options.dry_run:
        for optim, grid in comparison.grids.items():
            print(f"{optim}: learning rates {', '.join(f'{rate:g}' for rate in grid)}")
        least, most = map(comparison.count, (options.learning_rates, options.max_learning_rates))
        print(f"{least} runs, up to {most}, such as")
        print(shlex.join(comparison.command(Run(options.optims[0], comparison.grids[options.optims[0]][0], 1))))
        return 0
    with _lock(folder, {"launcher": options.launcher, "script": script}):
        _end_runs(folder)  # those of a comparison that was killed
        try:
            summary = comparison.run()
        except KeyboardInterrupt:
            print("Stopped. Finished runs are kept: the same command goes on.", file=sys.stderr)
            return 130
        finally:
            _end_runs(folder)
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
