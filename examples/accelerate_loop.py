# SPDX-License-Identifier: Apache-2.0
"""Train an image classifier in a loop of one's own with Accelerate, without a Trainer.

Data and model are those of image_classification.py, by default scikit-learn's digits and a small wide ResNet:

    python examples/accelerate_loop.py --output_dir out --optim nsf
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --output_dir out --optim lcam --mixed_precision bf16
    accelerate launch examples/accelerate_loop.py --output_dir out --checkpointing_steps 9 --resume_from_checkpoint last

NSF needs nothing but its constructor, LCAM a `LossPhase` that gets the loss of each update. The optimizer's state dict
holds all state of both: a resumed run ends with the bits of a whole one, unless the data set draws random numbers.
"""

import itertools
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from classification import DataTrainingArguments, compute_metrics, default_learning_rate, one_sentence
from image_classification import LEARNING_RATES, ModelArguments, build_model, prepare
from torch.utils.data import DataLoader
from transformers import EvalPrediction, HfArgumentParser, get_linear_schedule_with_warmup
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint

from hf_nsf import LCAM, NSF, LossPhase
from hf_nsf.trainer.options import parse_optim_args


@dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = HfArg(help="Folder of the checkpoints, the final model and metrics.json.")
    optim: Literal["nsf", "lcam"] = HfArg(default="nsf", help="The optimizer.")
    optim_args: str | None = HfArg(default=None, help="Its options, e.g. p_min=-0.25,cycles=4.")
    learning_rate: float | None = HfArg(default=None, help="Default: one that suits the optimizer.")
    weight_decay: float = HfArg(default=0.0, help="Decoupled for nsf, L2 for lcam.")
    num_train_epochs: int = HfArg(default=10, help="Passes over the training data.")
    batch_size: int = HfArg(default=64, help="Images of one micro-batch, of all processes together.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Micro-batches of one update.")
    mixed_precision: Literal["no", "bf16", "fp16"] = HfArg(default="no", help="As in Accelerate.")
    checkpointing_steps: int | None = HfArg(default=None, help="Save a checkpoint every so many updates.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="A checkpoint's folder, or last.")
    seed: int = HfArg(default=42, help="Of the new weights, the order of the images and the dropout.")


def save_checkpoint(accelerator: Accelerator, output: Path, log: list[dict[str, float]]) -> None:
    """Save everything; the folder gets its name when it is complete, so that nobody resumes from a killed save."""
    partial, final = output / "partial-checkpoint", output / f"checkpoint-{len(log)}"
    accelerator.save_state(str(partial))  # overwrites what a killed save has left
    accelerator.wait_for_everyone()  # each process has written the state of its own random numbers
    if accelerator.is_main_process:
        (partial / "log.json").write_text(json.dumps(log), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def load_checkpoint(accelerator: Accelerator, arguments: LoopArguments) -> list[dict[str, float]]:
    """Load the checkpoint that the arguments name, if any; return the log of the updates made so far."""
    folder = arguments.resume_from_checkpoint
    if folder == "last":
        folder = broadcast_object_list([get_last_checkpoint(arguments.output_dir)])[0]  # the main process decides
    accelerator.print("Starting anew" if folder is None else f"Resuming from {folder}")
    if folder is None:
        return []
    accelerator.load_state(folder)  # raises for another optimizer's state
    return json.loads(Path(folder, "log.json").read_text(encoding="utf-8"))


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, loader: DataLoader) -> dict[str, float]:
    """Return the metrics over a whole split, the same ones on every process."""
    model.eval()
    # Unlike gather, gather_for_metrics drops the rows that were repeated to fill the last batch.
    pairs = [accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])) for batch in loader]
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
    return compute_metrics(EvalPrediction(logits.float().numpy(), labels.numpy()))


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, train and report; returns what stands in metrics.json."""
    with one_sentence():
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, LoopArguments))
        model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses(args)
        # All processes share each batch; the order of the images follows from the seed and the epoch alone.
        data = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=arguments.seed)
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else torchrun's processes without GPUs are single ones
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            dataloader_config=data,
        )
        if arguments.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would use float32
            raise ValueError("mixed_precision=fp16 needs a GPU: allowed are no and bf16.")
        for name in ("gradient_accumulation_steps", "num_train_epochs", "checkpointing_steps"):
            if (count := getattr(arguments, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} is not allowed: give 1 or more.")
        accumulation = accelerator.gradient_accumulation_steps  # the launcher's, where its configuration has them
        options = parse_optim_args(arguments.optim, arguments.optim_args, accelerator.device)
        output = Path(arguments.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        splits, labels, processor = prepare(model_arguments, data_arguments)
        set_seed(arguments.seed)
        model = build_model(model_arguments, labels)
        set_seed(arguments.seed, device_specific=True)  # all start from the same weights, but drop out others
        loaders = {}
        for name, split in splits.items():
            # Without a generator of its own, a loader draws from torch's in each pass; a resumed run makes one more.
            loader = DataLoader(split, arguments.batch_size, shuffle=name == "train", generator=torch.Generator())
            loaders[name] = accelerator.prepare(loader)
        train_loader = loaders.pop("train")
        updates = arguments.num_train_epochs * math.ceil(len(train_loader) / accumulation)
        if arguments.learning_rate is None:
            arguments.learning_rate = default_learning_rate(LEARNING_RATES, arguments.optim, model_arguments)
        options |= {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
        if arguments.optim == "nsf":
            optimizer, phase = NSF(model.parameters(), total_steps=updates, **options), None
        else:
            optimizer = LCAM(model.parameters(), **options)
            phase = LossPhase(optimizer)
        scheduler = get_linear_schedule_with_warmup(optimizer, round(0.1 * updates), updates)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        log = load_checkpoint(accelerator, arguments)

    first_epoch, done = (log[-1]["epoch"], log[-1]["batches"]) if log else (1, 0)
    for epoch in range(first_epoch, arguments.num_train_epochs + 1):
        model.train()
        train_loader.set_epoch(epoch)
        if phase is not None and done == 0:
            phase.start_epoch()
        # accelerate 1.7 cannot skip all batches.
        loader = iter(skip_first_batches(train_loader, done) if done < len(train_loader) else ())
        while batches := list(itertools.islice(loader, accumulation)):  # those of one update
            losses = []
            for batch in batches:
                # The processes average their gradients once an update, with the last micro-batch.
                with nullcontext() if batch is batches[-1] else accelerator.no_sync(model):
                    loss = model(**batch).loss
                    # accelerate divides by the accumulation steps, but the last update of an epoch may have fewer.
                    accelerator.backward(loss * accumulation / len(batches))
                losses.append(loss.detach())
            loss = torch.stack(losses).mean()  # of the update, on this process
            optimizer.step()
            skipped = accelerator.optimizer_step_was_skipped  # an fp16 overflow: there was no update
            group = optimizer.param_groups[0]
            done += len(batches)
            entry = {"epoch": epoch, "batches": done, "lr": group["lr"]}
            if phase is not None:
                entry["momentum"] = group["momentum"]
                # A loss of fewer micro-batches than usual compares badly with the others.
                phase.step(loss, skipped or len(batches) < min(accumulation, len(train_loader)))
            elif not skipped:
                entry["p"] = optimizer.optimizer.last_p  # accelerate's wrapper holds ours
            log.append({**entry, "loss": accelerator.reduce(loss, "mean").item()})
            scheduler.step()
            optimizer.zero_grad()
            if arguments.checkpointing_steps and len(log) % arguments.checkpointing_steps == 0:
                save_checkpoint(accelerator, output, log)
        done = 0
        metrics = {**log[-1], **evaluate(accelerator, model, loaders["validation"])}
        accelerator.print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    report = {"optimizer": arguments.optim, "processes": accelerator.num_processes, "updates": len(log)}
    for name, loader in loaders.items():
        report |= {f"{name}_{key}": value for key, value in evaluate(accelerator, model, loader).items()}
    accelerator.print("  ".join(f"{key} {value}" for key, value in report.items()))
    report["log"] = log
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output, state_dict=weights)
        if processor is not None:
            processor.save_pretrained(output)
        (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    accelerator.end_training()
    return report


if __name__ == "__main__":
    main()
