# SPDX-License-Identifier: Apache-2.0
"""Train an image classifier in a bare Accelerate loop, without a Trainer, with NSF or LCAM driven by hand.

Data and model are those of image_classification.py, by default scikit-learn's digits and a small new ResNet:

    python examples/accelerate_loop.py --output_dir out --optim nsf
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --output_dir out --optim lcam --mixed_precision bf16
    accelerate launch examples/accelerate_loop.py --output_dir out --checkpointing_steps 50 \
        --resume_from_checkpoint last

A resumed run ends with the bits of an uninterrupted one, as long as the data set itself draws no random numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import image_classification as images
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from example_data import DataError
from example_metrics import build_compute_metrics
from example_training import parse_arguments, run
from torch.utils.data import DataLoader
from transformers import EvalPrediction, get_linear_schedule_with_warmup

from hf_nsf import LCAM, NSF, LossPhase, PCycle

WARMUP_SHARE = 0.1
CHOICES = {"optim": ("nsf", "lcam"), "mixed_precision": ("no", "bf16", "fp16")}
COUNTS = ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "checkpointing_steps")


@dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = field(metadata={"help": "Folder of the checkpoints, the final model and metrics.json."})
    optim: str = field(default="nsf", metadata={"help": "nsf or lcam."})
    learning_rate: float | None = field(default=None, metadata={"help": "Default: one that suits the optimizer."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled for nsf, L2 for lcam."})
    p_min: float = field(default=0.25, metadata={"help": "nsf: lowest exponent."})
    p_max: float = field(default=0.5, metadata={"help": "nsf: highest exponent, that of the first update."})
    cycles: float = field(default=16, metadata={"help": "nsf: cycles of the exponent over the whole training."})
    low_loss_momentum: float = field(default=0.9, metadata={"help": "lcam: momentum after a loss below its mean."})
    high_loss_momentum: float = field(default=0.95, metadata={"help": "lcam: momentum after any other loss."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the training data."})
    batch_size: int = field(default=64, metadata={"help": "Images of one micro-batch, of all processes together."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of one update."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16, fp16 (default: accelerate's own)."})
    checkpointing_steps: int | None = field(default=None, metadata={"help": "Save a checkpoint every so many updates."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's folder, or last."})
    seed: int = field(default=42, metadata={"help": "Of the new weights, the order of the images and the dropout."})

    def __post_init__(self) -> None:
        """Refuse wrong values; parse_arguments makes a sentence of every ValueError, also of the library's own."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown: allowed are {', '.join(allowed)}.")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed: give 1 or more.")
        build_controller(build_optimizer([torch.zeros(1)], self, 1.0), self, updates=1)


@dataclass
class Progress:
    """Where a training stands; together with what `save_state` keeps, all that another process needs to go on."""

    optim: str
    epoch: int = 0
    batches: int = 0  # of this epoch
    log: list[dict[str, float]] = field(default_factory=list)  # one entry an update
    epochs: list[dict[str, float]] = field(default_factory=list)  # one entry an epoch


def build_accelerator(arguments: LoopArguments) -> Accelerator:
    """Build the Accelerator, which splits each batch among the processes, however many the launcher started."""
    # Whatever their number, they make the same updates, and the scheduler makes one step an update (otherwise as many
    # as there are processes). The seedable sampler's order follows from the seed and the epoch alone.
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=arguments.seed)
    # Without cpu=True accelerate takes torchrun's processes on a machine without GPUs for single ones.
    cpu = not getattr(torch, "accelerator", torch.cuda).is_available()
    precision, accumulation = arguments.mixed_precision, arguments.gradient_accumulation_steps
    options = {"mixed_precision": precision, "gradient_accumulation_steps": accumulation, "dataloader_config": loading}
    accelerator = Accelerator(cpu=cpu, **options)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would use float32
        raise DataError("mixed_precision='fp16' needs a GPU: allowed are no, bf16.")
    processes, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if processes != launched:
        raise DataError(f"{launched} processes were launched, but accelerate sees {processes}: launch one.")
    if arguments.batch_size % processes:
        raise DataError(f"batch_size={arguments.batch_size} is no multiple of the {processes} processes.")
    return accelerator


def build_optimizer(params: Any, arguments: LoopArguments, default_rate: float) -> NSF | LCAM:
    """Build the optimizer, which only reads its exponent or momentum."""
    rate = default_rate if arguments.learning_rate is None else arguments.learning_rate
    if arguments.optim == "nsf":
        return NSF(params, lr=rate, weight_decay=arguments.weight_decay)
    low, high = arguments.low_loss_momentum, arguments.high_loss_momentum
    return LCAM(params, lr=rate, weight_decay=arguments.weight_decay, low_loss_momentum=low, high_loss_momentum=high)


def build_controller(optimizer: Any, arguments: LoopArguments, updates: int) -> PCycle | LossPhase:
    """Build what writes the exponent or momentum between updates; all its state is in the optimizer's groups."""
    if arguments.optim == "nsf":
        low, high = arguments.p_min, arguments.p_max
        return PCycle(optimizer, p_min=low, p_max=high, cycles=arguments.cycles, total_steps=updates)
    return LossPhase(optimizer, reduce=False)  # the loop averages the loss over the processes itself


def save_checkpoint(accelerator: Accelerator, output: Path, progress: Progress) -> None:
    """Save everything; the folder gets its name when it is complete, so that nobody resumes from a killed save."""
    partial, final = output / "partial-checkpoint", output / f"checkpoint-{len(progress.log)}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # each process has written the state of its own random numbers
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def load_checkpoint(accelerator: Accelerator, arguments: LoopArguments) -> Progress:
    """Load the checkpoint that the arguments name, or begin anew."""
    folder = arguments.resume_from_checkpoint
    if folder == "last":
        names = [path.name for path in Path(arguments.output_dir).glob("checkpoint-*")]
        steps = [int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name)]
        newest = str(Path(arguments.output_dir, f"checkpoint-{max(steps)}")) if steps else None
        folder = broadcast_object_list([newest])[0]  # the main process decides for all
    accelerator.print("Starting anew" if folder is None else f"Resuming from {folder}")
    if folder is None:
        return Progress(arguments.optim)
    file = Path(folder, "progress.json")
    if not file.is_file():
        raise DataError(f"resume_from_checkpoint={folder!r} is no checkpoint of this script: {file} is missing.")
    progress = Progress(**json.loads(file.read_text(encoding="utf-8")))
    if progress.optim != arguments.optim:
        raise DataError(f"The checkpoint {folder!r} is of optim={progress.optim}, this run of optim={arguments.optim}.")
    accelerator.load_state(folder)
    return progress


def evaluate(accelerator: Accelerator, model: Any, loader: DataLoader, compute_metrics: Any) -> dict[str, float]:
    """Return the metrics over a whole split, the same ones on every process."""
    model.eval()
    pairs = []
    with torch.no_grad():
        for batch in loader:
            # Unlike gather, it drops the rows that were repeated to fill the last batch.
            pairs.append(accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])))
    logits, labels = (torch.cat(parts).cpu().numpy() for parts in zip(*pairs, strict=True))
    return compute_metrics(EvalPrediction(logits, labels))


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, train and report; returns what stands in metrics.json."""
    types = (images.ModelArguments, images.ImageDataArguments, LoopArguments)
    model_arguments, data_arguments, arguments = parse_arguments(types, args)
    output, accumulation = Path(arguments.output_dir), arguments.gradient_accumulation_steps
    accelerator = build_accelerator(arguments)
    with accelerator.main_process_first():
        processor = images.build_processor(model_arguments)
        data = images.load_images(data_arguments, processor, arguments.seed)
    compute_metrics = build_compute_metrics(data_arguments.metric, len(data.label_names))

    set_seed(arguments.seed)
    model = images.build_model(model_arguments, data.label_names)
    set_seed(arguments.seed, device_specific=True)  # all processes start from the same weights, but drop out others
    rates = images.FROM_SCRATCH if model_arguments.model_name_or_path is None else images.PRETRAINED
    optimizer = build_optimizer(model.parameters(), arguments, rates.of(arguments.optim))
    # Without a generator of its own, a loader draws from torch's in each pass, and a resumed run makes one pass more.
    options = {"batch_size": arguments.batch_size, "collate_fn": images.collate, "generator": torch.Generator()}
    loaders = {name: DataLoader(split, shuffle=name == "train", **options) for name, split in data.splits.items()}
    batches = len(loaders["train"])
    updates = arguments.num_train_epochs * math.ceil(batches / accumulation)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * updates), updates)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    loaders = {name: accelerator.prepare(loader) for name, loader in loaders.items()}
    progress = load_checkpoint(accelerator, arguments)
    controller = build_controller(optimizer, arguments, updates)

    while progress.epoch < arguments.num_train_epochs:
        model.train()
        loader = loaders["train"]
        loader.set_epoch(progress.epoch)
        if progress.batches > 0:
            loader = skip_first_batches(loader, progress.batches)
        elif isinstance(controller, LossPhase):
            controller.start_epoch()
        losses: list[torch.Tensor] = []
        for batch in loader:
            # accelerate divides by the accumulation steps, but the last update of an epoch may have fewer.
            window = min(accumulation, batches - progress.batches // accumulation * accumulation)
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss * (accumulation / window))
                group = optimizer.param_groups[0]
                used = {key: group[key] for key in ("lr", "p", "momentum") if key in group}
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            progress.batches += 1
            if not accelerator.sync_gradients:
                continue
            # The loss of the whole update: over its micro-batches and over the processes.
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses.clear()
            skipped = accelerator.optimizer_step_was_skipped  # an fp16 overflow: there was no update
            if isinstance(controller, LossPhase):
                controller.step(mean_loss, skipped)
            elif not skipped:
                controller.step()
            progress.log.append({"epoch": progress.epoch + 1, "loss": mean_loss, **used})
            if arguments.checkpointing_steps and len(progress.log) % arguments.checkpointing_steps == 0:
                save_checkpoint(accelerator, output, progress)
        progress.epoch, progress.batches = progress.epoch + 1, 0
        own = [entry["loss"] for entry in progress.log if entry["epoch"] == progress.epoch]
        metrics = evaluate(accelerator, model, loaders["validation"], compute_metrics)
        progress.epochs.append({**progress.log[-1], "loss": sum(own) / len(own), **metrics})
        accelerator.print("  ".join(f"{key} {value:.4g}" for key, value in progress.epochs[-1].items()))

    report = {"optimizer": arguments.optim, "processes": accelerator.num_processes, "updates": len(progress.log)}
    for name, loader in loaders.items():
        metrics = evaluate(accelerator, model, loader, compute_metrics) if name != "train" else {}
        report.update({f"{name}_{key}": value for key, value in metrics.items()})
    accelerator.print("  ".join(f"{key} {value}" for key, value in report.items()))
    report.update(epochs=progress.epochs, log=progress.log)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output, state_dict=weights)
        processor.save_pretrained(output)
        (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    accelerator.end_training()
    return report


if __name__ == "__main__":
    run(main)
