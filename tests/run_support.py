# SPDX-License-Identifier: Apache-2.0
"""Run every test behind the README's table of what is supported, and write their results into that table.

    pip install -c tests/constraints.txt -e ".[ecosystem]"
    python tests/run_support.py            # the slow tests and those of the ecosystem too
    python tests/run_support.py --show     # the table, with the results that the README holds
    python tests/run_support.py --junit A.xml B.xml   # the table from what `pytest --junitxml` wrote; later files win

Ends with 1, and leaves the README alone, if a test failed or a claim has no test that ran.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DDP, FSDP = "tests/distributed/test_ddp.py", "tests/sharded/test_trainer_fsdp.py"
# What is claimed, and the tests that show it: files, or single tests of them.
CLAIMS = [
    ("stock Trainer: logs, losses used = losses logged, accumulation, mid-epoch resume",
     ["tests/trainer/test_training.py"]),
    ("names in code, on the command line, in JSON and YAML files; every wrong option refused; `unregister()`",
     ["tests/trainer/test_registration.py", "tests/trainer/test_options.py"]),
    ("Seq2SeqTrainer, `auto_find_batch_size`, optuna over `optim` and `optim_args`",
     ["tests/trainer/test_other_trainers.py"]),
    ("accumulation: whole and short windows, causal models that divide by the items or do not, across processes",
     ["tests/trainer/test_accumulation.py", f"{DDP}::test_short_accumulation_windows_take_part_on_every_rank"]),
    ("`torch_compile` in the Trainer (aot_eager, inductor)", ["tests/trainer/test_compile.py"]),
    ("PEFT LoRA, TRL's SFTTrainer, sentence-transformers' trainer", ["tests/ecosystem/test_trainers.py"]),
    ("a bare Accelerate loop, `examples/accelerate_loop.py`, with exact resume, one and two processes, bf16",
     ["tests/examples/test_accelerate_loop.py"]),
    ("DDP under torchrun and `accelerate launch`, 2 and 4 processes: the same bits on all, the phases of one process",
     [f"{DDP}::test_all_ranks_hold_the_same_bits", f"{DDP}::test_the_phases_are_those_of_one_process",
      f"{DDP}::test_without_the_reduction_ranks_diverge"]),
    ("two numbers reduced in one collective a step (LCAM), none (NSF)", [f"{DDP}::test_lcam_reduces_two_numbers_a_step_and_nsf_nothing"]),
    ("FSDP2 (`fully_shard`), tensor parallelism (`parallelize_module`), DTensor on one and two mesh dimensions, mixed "
     "with plain parameters: the whole tensor's step, one collective a step and dimension (and one for partial "
     "gradients); DCP round trip, also between 2 and 4 processes",
     ["tests/sharded/test_sharded.py", "tests/sharded/test_states.py"]),
    ("the Trainer under FSDP2, 2 and 4 processes: agreement with one, FULL and SHARDED checkpoints resumed bit for bit",
     [FSDP]),
    ("bf16 autocast; bfloat16 parameters", ["tests/precision/test_bf16.py"]),
    ("fp16 steps skipped by a GradScaler (the CPU's)", ["tests/precision/test_fp16.py"]),
    ("a GPU: agreement with float64, no waits of the host, skipped fp16 steps, the Trainer in fp16 and bf16 (skipped "
     "where there is none)", ["tests/precision/test_devices.py"]),
    ("SIGKILL and resume, bit for bit, one and two processes, DDP and FSDP2", ["tests/resume/test_kill.py"]),
    ("unfinished saves, other optimizers' checkpoints, more epochs, `save_only_model`",
     ["tests/resume/test_checkpoints.py"]),
    ("processes with different options, optimizers or numbers of updates; uneven, missing and empty last batches",
     [f"{DDP}::test_different_options_stop_every_rank_with_a_sentence",
      f"{DDP}::test_one_of_ours_beside_another_optimizer_stops_every_rank_with_a_sentence",
      f"{DDP}::test_other_optimizers_are_not_compared",
      f"{DDP}::test_ranks_that_would_wait_for_each_other_are_stopped_with_a_sentence",
      f"{DDP}::test_a_last_batch_that_does_not_reach_every_rank",
      f"{DDP}::test_an_empty_last_batch_on_one_rank_is_decided_alike_on_all",
      f"{DDP}::test_uneven_batches_that_the_trainer_can_do_are_done"]),
    ("a NaN on one process, one that dies",
     [f"{DDP}::test_a_nan_on_one_rank_is_a_nan_for_all",
      f"{DDP}::test_a_rank_that_dies_ends_the_others_and_leaves_the_checkpoint"]),
    ("DeepSpeed, ZeRO 1, 2 and 3, on its CPU accelerator (where accelerate gives all processes the same batches); for "
     "p other than 1/2 the lengths are those of each process's partition, so that NSF's steps differ from DDP's",
     ["tests/ecosystem/test_deepspeed.py"]),
]  # fmt: skip
START, END = "<!-- support: written by tests/run_support.py -->\n", "<!-- end of support -->\n"


def counts(results: list[str]) -> str:
    """How many tests had which result, in words."""
    found = collections.Counter(results)
    return ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "skipped", "failed") if found[kind]) or "not run"


def table(results: dict[str, list[str]]) -> str:
    """Lay out the claims in Markdown with the results of each."""
    lines = ["| what | tests | result |", "|---|---|---|"]
    for what, tests in CLAIMS:
        names = ", ".join(f"`{name}`" for name in tests)
        lines.append(f"| {what} | {names} | {counts([r for name in tests for r in results.get(name, [])])} |")
    return "\n".join(lines) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """The README before, in and after the table."""
    before, rest = text.split(START)
    inside, after = rest.split(END)
    return before + START, inside, END + after


def run(junit: Path) -> None:
    """Run the tests of all claims; pytest writes what became of them to a file."""
    files = sorted({name for _, tests in CLAIMS for name in tests})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or ecosystem or not slow", f"--junitxml={junit}"]
    subprocess.run([*command, "--timeout=1800", *files], cwd=ROOT, check=False)


def read(*junits: Path) -> dict[str, list[str]]:
    """Results by claimed name from pytest's files; where a test stands in several, the last one counts."""
    last: dict[tuple[str, str], str] = {}
    for junit in junits:
        for case in ElementTree.parse(junit).iter("testcase"):
            kinds = {child.tag for child in case}
            result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            last[case.get("classname", "").replace(".", "/") + ".py", case.get("name", "")] = result
    found: dict[str, list[str]] = collections.defaultdict(list)
    for (file, name), result in last.items():
        found[file].append(result)
        found[f"{file}::{name.partition('[')[0]}"].append(result)
    return found


def main() -> int:
    """Parse the arguments, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="Only show the README's table.")
    parser.add_argument("--junit", nargs="+", type=Path, help="Run nothing; read these.")
    options = parser.parse_args()
    before, inside, after = parts(README.read_text(encoding="utf-8"))
    if options.show:
        print(inside, end="")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.junit is None:
            run(Path(folder, "junit.xml"))
        results = read(*(options.junit or [Path(folder, "junit.xml")]))
    made = table(results)
    print(made)
    failed = any("failed" in some for some in results.values())
    if failed or any("passed" not in results.get(name, []) for _, tests in CLAIMS for name in tests):
        print("Not every claim holds: the README stays as it is.", file=sys.stderr)
        return 1
    README.write_text(before + made + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
