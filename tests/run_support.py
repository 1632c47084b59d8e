# SPDX-License-Identifier: Apache-2.0
"""Run every test behind the table of what is supported, and write their results into tests/README.md.

    pip install -c tests/constraints.txt -e ".[ecosystem]"
    python tests/run_support.py            # the slow tests and those of the ecosystem too
    python tests/run_support.py --show     # the table, with the results it holds
    python tests/run_support.py --junit A.xml B.xml   # the table from what `pytest --junitxml` wrote; later files win

Ends with 1, and leaves the table alone, if a test failed or one is missing.
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
README = ROOT / "tests" / "README.md"
DDP = "tests/distributed/test_ddp.py"
# What is claimed, and the tests that show it: files, or single tests of them.
CLAIMS = [
    ("stock Trainer: logs, losses used = losses logged, second trainings, schedulers, optimizers of the user's",
     ["tests/trainer/test_runs.py"]),
    ("LCAM's momentum is the rule's in every update: accumulation, streams, wrong lengths, stopped epochs, "
     "replaced optimizers, a copied Trainer", ["tests/trainer/test_decisions.py"]),
    ("resume inside an epoch, with other batches, with more epochs; other optimizers' states refused",
     ["tests/trainer/test_resume.py"]),
    ("SIGKILL and resume, bit for bit, one and two ranks, DDP and FSDP2", ["tests/distributed/test_kill.py"]),
    ("names in code, on the command line, in JSON and YAML files; invalid options refused; `unregister()`",
     ["tests/trainer/test_registration.py", "tests/trainer/test_options.py"]),
    ("scripts and tools that know nothing of hf_nsf: alone, torchrun, `accelerate launch`, child processes, the `trl` "
     "command", ["tests/launcher/test_launcher.py"]),
    ("Seq2SeqTrainer, `auto_find_batch_size`, optuna over `optim` and `optim_args`",
     ["tests/trainer/test_other_trainers.py"]),
    ("`torch_compile` in the Trainer", ["tests/trainer/test_compile.py"]),
    ("PEFT LoRA; TRL's SFT (rows and streams), DPO, Reward, KTO and GRPO trainers; sentence-transformers; SetFit",
     ["tests/ecosystem/test_trainers.py"]),
    ("a bare Accelerate loop, with exact resume", ["tests/examples/test_accelerate_loop.py"]),
    ("DDP under torchrun and `accelerate launch`, 2 and 4 ranks: the same bits on all, the phases of one process; "
     "streams of different lengths, short and empty last batches",
     [f"{DDP}::test_all_ranks_take_part_and_hold_the_same_bits", f"{DDP}::test_training_equals_that_of_one_process",
      f"{DDP}::test_momenta_follow_from_the_mean_of_all_losses",
      f"{DDP}::test_an_empty_last_batch_on_one_rank_is_decided_alike_on_all"]),
    ("two numbers reduced in one collective a step (LCAM), none (NSF), none in other optimizers' runs",
     [f"{DDP}::test_lcam_reduces_two_numbers_a_step_and_nsf_nothing"]),
    ("a NaN on one rank, one that dies",
     [f"{DDP}::test_a_nan_on_one_rank_is_a_nan_for_all",
      f"{DDP}::test_a_rank_that_dies_ends_the_others_and_leaves_the_checkpoint"]),
    ("FSDP2 (`fully_shard`), tensor parallelism, DTensor on one and two mesh dimensions, mixed with plain parameters: "
     "the whole tensor's step, one collective a step; DCP between 2 and 4 ranks",
     ["tests/distributed/test_sharded.py"]),
    ("the Trainer under FSDP2, 2 and 4 ranks, FULL and SHARDED checkpoints",
     ["tests/distributed/test_trainer_fsdp.py"]),
    ("DeepSpeed, ZeRO 1, 2 and 3, on its CPU accelerator (where accelerate gives all ranks the same batches); for p "
     "other than 1/2 the lengths are those of each rank's partition, so that NSF's steps differ from DDP's",
     ["tests/ecosystem/test_deepspeed.py"]),
    ("bf16 autocast; bfloat16 parameters",
     ["tests/trainer/test_bf16.py", "tests/optim/test_nsf.py::test_without_kahan_sums_small_steps_vanish"]),
    ("fp16 steps skipped by a GradScaler change nothing", ["tests/trainer/test_fp16.py"]),
    ("a GPU (skipped where there is none)", ["tests/trainer/test_devices.py"]),
    ("Triton kernels, interpreted on a CPU and compiled for sm_80 and sm_90; numba kernels",
     ["tests/optim/test_implementations.py", "tests/optim/test_kernels.py"]),
]  # fmt: skip
START, END = "<!-- support: written by tests/run_support.py -->\n", "<!-- end of support -->\n"


def counts(results: list[str]) -> str:
    """How many tests had which result, in words."""
    found = collections.Counter(results)
    return ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "skipped", "failed") if found[kind]) or "not run"


def table(results: dict[str, list[str]]) -> str:
    """The claims in Markdown, with the results of each."""
    lines = ["| what | tests | result |", "|---|---|---|"]
    for what, tests in CLAIMS:
        names = ", ".join(f"`{name.removeprefix('tests/')}`" for name in tests)
        lines.append(f"| {what} | {names} | {counts([r for name in tests for r in results.get(name, [])])} |")
    return "\n".join(lines) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """The text before, in and after the table."""
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
    parser.add_argument("--show", action="store_true", help="Only show the table.")
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
    if failed or not all(results.get(name) for _, tests in CLAIMS for name in tests):
        print("Not every claim holds: the table stays as it is.", file=sys.stderr)
        return 1
    README.write_text(before + made + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
