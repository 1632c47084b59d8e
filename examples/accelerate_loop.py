# SPDX-License-Identifier: Apache-2.0
"""Train an image classifier in a loop of one's own with Accelerate, without a Trainer.

Data and model are those of image_classification.py, by default scikit-learn's digits and a small wide ResNet:

    python examples/accelerate_loop.py --output_dir out --optim nsf
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --output_dir out --optim lcam --mixed_precision bf16
    accelerate launch examples/accelerate_loop.py --output_dir out --checkpointing_steps 50 \
        --resume_from_checkpoint last

NSF needs nothing but its constructor: p follows the number of its steps. LCAM needs a `LossPhase` that hears the loss
of each update. What both know stands in the optimizer's state, so that a resumed run ends with the bits of an
uninterrupted one (unless the data set draws random numbers itself).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from embedded_data import DataTrainingArguments, compute_metrics, one_sentence
from image_classification import ModelArguments, build_model, default_learning_rate, prepare
from torch.utils.data import DataLoader
from transformers import EvalPrediction, HfArgumentParser, default_data_collator, get_linear_schedule_with_warmup

from hf_nsf import LCAM, NSF, LossPhase

WARMUP_SHARE = 0.1


@dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = field(metadata={"help": "Folder of the checkpoints, the final model and metrics.json."})
    optim: Literal["nsf", "lcam"] = field(default="nsf", metadata={"help": "The optimizer."})
    learning_rate: float | None = field(default=None, metadata={"help": "Default: one that suits the optimizer."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled for nsf, L2 for lcam."})
    p_min: float = field(default=0.25, metadata={"help": "nsf: lowest exponent."})
    p_max: float = field(default=0.5, metadata={"help": "nsf: highest exponent, that of the first update."})
    cycles: float | None = field(default=None, metadata={"help": "nsf: cycles of the exponent over the training."})
    low_loss_momentum: float = field(default=0.9, metadata={"help": "lcam: momentum after a loss below its mean."})
    high_loss_momentum: float = field(default=0.95, metadata={"help": "lcam: momentum after any other loss."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the training data."})
    batch_size: int = field(default=64, metadata={"help": "Images of one micro-batch, of all processes together."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of one update."})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "As in Accelerate."})
    checkpointing_steps: int | None = field(default=None, metadata={"help": "Save a checkpoint every so many updates."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's folder, or last."})
    seed: int = field(default=42, metadata={"help": "Of the new weights, the order of the images and the dropout."})

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give 1 or more.")


@dataclass
class Progress:
    """Where a training stands; together with what `save_state` keeps, all that another process needs to go on."""

    epoch: int = 0
    batches: int = 0  # of this epoch
    log: list[dict[str, float]] = field(default_factory=list)  # one entry an update


def build_accelerator(arguments: LoopArguments) -> Accelerator:
    """Build the Accelerator, which splits each batch among the processes, however many the launcher started."""
    # Whatever their number, they make the same updates, and the scheduler makes one step an update (otherwise as many
    # as there are processes). The seedable sampler's order follows from the seed and the epoch alone.
    accelerator = Accelerator(
        # Without cpu=True accelerate takes torchrun's processes on a machine without GPUs for single ones.
        cpu=not getattr(torch, "accelerator", torch.cuda).is_available(),
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=arguments.seed
        ),
    )
    if arguments.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would use float32
        raise ValueError("mixed_precision=fp16 needs a GPU: allowed are no and bf16.")
    if arguments.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size={arguments.batch_size} is no multiple of {accelerator.num_processes} processes.")
    return accelerator


def build_optimizer(params: Any, arguments: LoopArguments, updates: int, pretrained: bool) -> NSF | LCAM:
    """Build the optimizer."""
    rate = arguments.learning_rate
    rate = default_learning_rate(arguments.optim, pretrained) if rate is None else rate
    if arguments.optim == "nsf":
        cycle = {"p_min": arguments.p_min, "p_max": arguments.p_max, "cycles": arguments.cycles}
        return NSF(params, rate, weight_decay=arguments.weight_decay, total_steps=updates, **cycle)
    return LCAM(params, rate, arguments.low_loss_momentum, arguments.high_loss_momentum, arguments.weight_decay)


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
        return Progress()
    file = Path(folder, "progress.json")
    if not file.is_file():
        raise ValueError(f"resume_from_checkpoint={folder} is no checkpoint of this script: {file} is missing.")
    accelerator.load_state(folder)  # the optimizer refuses another one's state
    return Progress(**json.loads(file.read_text(encoding="utf-8")))


def evaluate(accelerator: Accelerator, model: Any, loader: DataLoader) -> dict[str, float]:
    """Return the metrics over a whole split, the same ones on every process."""
    model.eval()
    pairs = []
    with torch.no_grad():
        for batch in loader:
            # Unlike gather, it drops the rows that were repeated to fill the last batch.
            pairs.append(accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])))
    logits, labels = (torch.cat(parts).float().cpu().numpy() for parts in zip(*pairs, strict=True))
    return compute_metrics(EvalPrediction(logits, labels.astype(int)))


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, train and report; returns what stands in metrics.json."""
    with one_sentence():
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, LoopArguments))
        model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses(args)
        output, accumulation = Path(arguments.output_dir), arguments.gradient_accumulation_steps
        accelerator = build_accelerator(arguments)
        with accelerator.main_process_first():
            splits, label_names, processor = prepare(model_arguments, data_arguments)
        set_seed(arguments.seed)
        model = build_model(model_arguments, label_names)
        set_seed(arguments.seed, device_specific=True)  # all start from the same weights, but drop out others
        # Without a generator of its own, a loader draws from torch's in each pass; a resumed run makes one pass more.
        options = {"batch_size": arguments.batch_size, "collate_fn": default_data_collator}
        loaders = {
            name: DataLoader(split, shuffle=name == "train", generator=torch.Generator(), **options)
            for name, split in splits.items()
        }
        batches = len(loaders["train"])
        updates = arguments.num_train_epochs * math.ceil(batches / accumulation)
        pretrained = model_arguments.model_name_or_path is not None
        optimizer = build_optimizer(model.parameters(), arguments, updates, pretrained)
        scheduler = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * updates), updates)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        loaders = {name: accelerator.prepare(loader) for name, loader in loaders.items()}
        progress = load_checkpoint(accelerator, arguments)

    phase = LossPhase(optimizer) if arguments.optim == "lcam" else None
    while progress.epoch < arguments.num_train_epochs:
        model.train()
        loader = loaders["train"]
        loader.set_epoch(progress.epoch)
        if progress.batches > 0:
            loader = skip_first_batches(loader, progress.batches)
        elif phase is not None:
            phase.start_epoch()
        losses: list[torch.Tensor] = []
        for batch in loader:
            # accelerate divides by the accumulation steps, but the last update of an epoch may have fewer.
            window = min(accumulation, batches - progress.batches // accumulation * accumulation)
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss * (accumulation / window))
                group = optimizer.param_groups[0]
                used = {key: group[key] for key in ("lr", "momentum") if key in group}
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            progress.batches += 1
            if not accelerator.sync_gradients:
                continue
            mean_loss = torch.stack(losses).mean()  # of the update, on this process
            losses.clear()
            skipped = accelerator.optimizer_step_was_skipped  # an fp16 overflow: there was no update
            if phase is not None:
                # A loss of fewer micro-batches than usual compares badly with the others.
                phase.step(mean_loss, skipped or window < min(accumulation, batches))
            elif not skipped:
                used["p"] = optimizer.optimizer.last_p  # accelerate's wrapper holds ours
            mean_loss = accelerator.reduce(mean_loss, "mean").item()
            progress.log.append({"epoch": progress.epoch + 1, "loss": mean_loss, **used})
            if arguments.checkpointing_steps and len(progress.log) % arguments.checkpointing_steps == 0:
                save_checkpoint(accelerator, output, progress)
        progress.epoch, progress.batches = progress.epoch + 1, 0
        metrics = {**progress.log[-1], **evaluate(accelerator, model, loaders["validation"])}
        accelerator.print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    report = {"optimizer": arguments.optim, "processes": accelerator.num_processes, "updates": len(progress.log)}
    for name in [name for name in loaders if name != "train"]:
        report |= {f"{name}_{key}": value for key, value in evaluate(accelerator, model, loaders[name]).items()}
    accelerator.print("  ".join(f"{key} {value}" for key, value in report.items()))
    report["log"] = progress.log
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
