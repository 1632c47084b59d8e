# SPDX-License-Identifier: Apache-2.0
"""A rank of `torchrun`: LCAM on streams that do not divide, and what stops ranks that differ. Prints one line."""

import gc
import os
import sys

import torch
from trainer_runs import HIGH, LOW, OPTIMIZERS, Stream, WrongLength, by_the_rule, make_trainer, used, windows

RANK = int(os.environ["RANK"])
DDP = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, "max_steps": 24, "gradient_accumulation_steps": 2}


def gathered(value):
    values = [None] * 2
    torch.distributed.all_gather_object(values, value)
    return values


def by_update(events):
    """Of each update: whether an epoch started before it, and the sum of its losses."""
    found, started, losses = [], False, []
    for kind, value in events:
        started = started or kind == "epoch"
        if kind == "loss":
            losses.append(value)
        if kind == "update":
            found.append((started, len(losses), sum(losses)))
            started, losses = False, []
    return found


def check_stream(**run):
    """The same momenta on both ranks, by the rule of the losses' means; an epoch starts when one rank's does."""
    trainer = make_trainer(sys.argv[1], **{**DDP, **run})
    trainer.train()
    first, second = gathered(trainer.events)
    accumulation, events = trainer.args.gradient_accumulation_steps, []
    for (one, count, loss), (other, others, its) in zip(by_update(first), by_update(second), strict=True):
        assert count == others
        losses = [("loss", (loss + its) / 2), *[("loss", torch.tensor(0.0))] * (count - 1)]
        events += [*[("epoch", None)] * (one or other), ("momentum", None), *losses, ("update", accumulation)]
    expected, _ = by_the_rule(events)
    assert used(first) == used(second) == expected and set(expected) == {LOW, HIGH}, (used(first), used(second))
    weights = gathered([q.detach() for q in trainer.model.parameters()])
    assert all(map(torch.equal, *weights))
    return windows(first)


def refusal(**run):
    """What each rank says when their runs differ."""
    trainer = make_trainer(sys.argv[1], **{**DDP, **run})
    try:
        trainer.train()
    except ValueError as error:
        texts = gathered(str(error))
        assert texts[0] == texts[1] and trainer.state.global_step == 0
        return texts[0]
    raise AssertionError(f"{run} was not refused")


def main():
    counts = check_stream(data=Stream(56))  # 7 micro-batches of 8 rows a pass
    assert counts == [2, 2, 2, *([3, 2, 2] * 7)], counts
    # Each rank reads for itself, and one has more rows.
    own = {"accelerator_config": {"dispatch_batches": False}, "gradient_accumulation_steps": 1}
    check_stream(data=Stream(44 + 16 * RANK), **own)
    low = refusal(optim_args=f"low_loss_momentum={(LOW, 0.7)[RANK]}")
    assert "low_loss_momentum" in low and "0.7 on rank 1" in low, low
    other = refusal(optimizer=("lcam", "nsf")[RANK])
    assert "optimizer: LCAM on rank 0, NSF on rank 1" in other, other
    cycle = refusal(**{**OPTIMIZERS["nsf"], "max_steps": 24 + RANK})
    assert "number of updates: 24 on rank 0, 25 on rank 1" in cycle, cycle
    epochs = refusal(data=WrongLength(64 + 32 * RANK), accelerator_config={"dispatch_batches": False})
    assert "updates of an epoch" in epochs, epochs
    print(f"rank {RANK} has passed", flush=True)
    torch.distributed.barrier()
    gc.collect()  # trainers in cycles hold DDP's process group, whose threads would abort the process at its end
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
