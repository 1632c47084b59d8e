# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune an image classifier with Hugging Face's Trainer and `--optim nsf` or `--optim lcam`.

By default a small wide ResNet learns scikit-learn's handwritten digits, without a network:

    python examples/image_classification.py --output_dir out --optim nsf
    python examples/image_classification.py --output_dir out --optim lcam --train_file train.parquet \
        --test_file test.parquet --architecture wrn-28-10 --augment true
    python examples/image_classification.py --output_dir out --optim nsf --dataset_name beans \
        --model_name_or_path google/vit-base-patch16-224-in21k

With a pretrained model, images load on demand; for a new one they are decoded once and kept in memory.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from embedded_data import compute_metrics, load_digits_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers import TrainingArguments as HfTrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import hf_nsf  # noqa: F401 (registers the optimizers lcam and nsf)

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a pretrained model (default: a new wide ResNet)."}
    )
    architecture: str = field(
        default="wrn-10-2", metadata={"help": "Of the new model: wrn-DEPTH-WIDTH, e.g. wrn-10-1 (ResNet-8), wrn-28-10."}
    )


@dataclass
class DataTrainingArguments:
    """Where the images come from. With none of these: scikit-learn's digits."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Local .parquet, .csv, .json or .jsonl file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a share of the training data."})
    test_file: str | None = field(default=None, metadata={"help": "Default: no test."})
    image_column: str | None = field(default=None, metadata={"help": "Default: image or img."})
    label_column: str | None = field(default=None, metadata={"help": "Default: label or labels."})
    validation_share: float = field(default=0.15, metadata={"help": "Of the training data, where no split is there."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for validation and test."})
    image_size: int | None = field(default=None, metadata={"help": "For a new model (default: the first image's)."})
    augment: bool = field(default=False, metadata={"help": "For a new model: random flips and crops."})


@dataclass
class TrainingArguments(HfTrainingArguments):
    """The Trainer's arguments, with defaults for this task."""

    learning_rate: float | None = field(default=None, metadata={"help": "Default: one that suits optimizer and model."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images of one update on one device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images of one evaluation step."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates, or a share below 1, of rising rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints. The end is always saved."})
    logging_steps: float = field(default=10, metadata={"help": "Log the training loss every so many updates."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory for a GPU."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep it false: images load on demand."})


# ---- data


def load_splits(arguments: DataTrainingArguments) -> DatasetDict:
    """Load train, validation and perhaps test, with columns `image` and `labels`; a ValueError says what is wrong."""
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    files = {split: file for split, file in files.items() if file is not None}
    if arguments.dataset_name is not None and files:
        raise ValueError("Give either --dataset_name or local files, not both.")
    if arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    elif files:
        formats = {FORMATS.get(Path(file).suffix, "") for file in files.values()}
        if "train" not in files or len(formats) > 1 or "" in formats:
            raise ValueError(f"Local files must have one format ({', '.join(FORMATS)}) and include a --train_file.")
        splits = load_dataset(formats.pop(), data_files=files)
    else:
        splits = load_digits_images()
    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {', '.join(splits)}.")

    columns = splits["train"].column_names
    for new, wanted, usual in (
        ("image", arguments.image_column, ("image", "img")),
        ("labels", arguments.label_column, ("label", "labels")),
    ):
        old = next((name for name in ([wanted] if wanted else usual) if name in columns), None)
        if old is None:
            raise ValueError(f"No column {wanted or ' or '.join(usual)}: the columns are {', '.join(columns)}.")
        splits = splits if old == new else splits.rename_column(old, new)
    splits = splits.select_columns(["image", "labels"]).cast_column("image", Image(mode="RGB"))
    if not isinstance(splits["train"].features["labels"], ClassLabel):
        values = splits["train"].unique("labels")
        if not all(isinstance(value, int | str) for value in values) or len(values) < 2:
            raise ValueError(f"Labels must be at least two different numbers or strings, found {values[:5]}.")
        names = ClassLabel(names=[str(value) for value in sorted(values)])
        splits = splits.cast_column("labels", Value("string")).cast_column("labels", names)

    if "validation" not in splits:
        parts = splits["train"].train_test_split(arguments.validation_share, seed=0)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    splits = DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})
    for name, split in splits.items():
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        if limit is not None and limit < 1:
            raise ValueError(f"A limit of {limit} samples leaves the {name} split empty: give 1 or more.")
        if limit is not None:
            splits[name] = split.shuffle(seed=0).select(range(min(limit, len(split))))
    return splits


class ImagesInMemory(torch.utils.data.Dataset):
    """Images of one size as bytes, made into normalised tensors, and on demand varied, a batch at a time."""

    def __init__(self, split: Any, size: tuple[int, int] | None, augment: bool = False) -> None:
        """Decode all images of a split and bring them to one size, by default that of the first."""
        pixels: list[Tensor] = []
        try:
            for image in split["image"]:
                size = size or image.size
                image = image if image.size == size else image.resize(size)
                pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        except (OSError, SyntaxError) as error:  # what PIL raises
            raise ValueError(f"The image in row {len(pixels)} cannot be read: {error}.") from None
        self.size = size
        self.images = torch.stack(pixels)
        self.labels = torch.tensor(split["labels"][:])
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:  # what a DataLoader asks for
        images = self.images[indices]
        if self.augment:
            images = flip_and_crop(images)
        images = images.float() / 127.5 - 1
        return [{"pixel_values": x, "labels": y} for x, y in zip(images, self.labels[indices], strict=True)]


def flip_and_crop(images: Tensor, margin: int = 4) -> Tensor:
    """Mirror half of the images (count, channels, height, width) and shift each by up to `margin` pixels."""
    count, channels, height, width = images.shape
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    images = pad(images, [margin] * 4)
    rows = (torch.randint(2 * margin + 1, (count, 1)) + torch.arange(height)).view(count, 1, height, 1)
    columns = (torch.randint(2 * margin + 1, (count, 1)) + torch.arange(width)).view(count, 1, 1, width)
    return images[torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]


# ---- model


class WideResNetConfig(PreTrainedConfig):
    """Configuration of :class:`WideResNet`."""

    model_type = "wide-resnet"

    def __init__(self, depth: int = 10, width: int = 1, **options: Any) -> None:
        self.depth, self.width = depth, width
        super().__init__(**options)


class Block(nn.Module):
    """Two convolutions, each behind a normalisation and a ReLU, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(relu(self.norm2(self.conv1(out))))


class WideResNet(PreTrainedModel):
    """The network of arXiv 1605.07146 for small images: 16 w, 32 w and 64 w channels, (depth - 4) / 6 blocks each."""

    config_class = WideResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        channels, layers = 16, [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
        for stage in range(3):
            for block in range((config.depth - 4) // 6):
                outputs = 16 * 2**stage * config.width
                layers.append(Block(channels, outputs, stride=2 if stage > 0 and block == 0 else 1))
                channels = outputs
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits and, with labels, the loss."""
        logits = self.head(self.body(pixel_values))
        return ImageClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def build_model(arguments: ModelArguments, label_names: list[str]) -> PreTrainedModel:
    """Load the pretrained model, or make a new wide ResNet, for the given labels."""
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: k for k, name in enumerate(label_names)}}
    if arguments.model_name_or_path is not None:
        name = arguments.model_name_or_path
        return AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    found = re.fullmatch(r"wrn-(\d+)-(\d+)", arguments.architecture)
    if not found or int(found[1]) % 6 != 4 or int(found[1]) < 10 or int(found[2]) < 1:
        raise ValueError(f"architecture={arguments.architecture}: give wrn-DEPTH-WIDTH with DEPTH 10, 16, 22, 28, ...")
    return WideResNet(WideResNetConfig(depth=int(found[1]), width=int(found[2]), **labels))


def prepare(model_arguments: ModelArguments, data_arguments: DataTrainingArguments) -> tuple[dict[str, Any], Any, Any]:
    """Load all but the model: the splits ready for training, the names of the labels, and an image processor if any."""
    splits = load_splits(data_arguments)
    names = splits["train"].features["labels"].names
    if model_arguments.model_name_or_path is None:
        size = None if data_arguments.image_size is None else (data_arguments.image_size,) * 2
        data = {}
        for name, split in splits.items():
            data[name] = ImagesInMemory(split, size, augment=name == "train" and data_arguments.augment)
            size = data["train"].size
        return data, names, None
    processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path)

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        pixels = processor(batch["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    return {name: split.with_transform(transform) for name, split in splits.items()}, names, processor


def default_learning_rate(optim: str, pretrained: bool) -> float:
    """A rate that suits the family of the optimizer."""
    if "sgd" in optim or optim == "lcam":
        return 5e-3 if pretrained else 0.05
    return 5e-5 if pretrained else 3e-3


def main(args: list[str] | None = None) -> None:
    """Parse the arguments, train, evaluate and save; wrong arguments or data end it with one sentence."""
    try:
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(args)
        datasets, label_names, processor = prepare(model_arguments, data_arguments)
        if training_arguments.learning_rate is None:
            pretrained = model_arguments.model_name_or_path is not None
            training_arguments.learning_rate = default_learning_rate(training_arguments.optim.value, pretrained)
        set_seed(training_arguments.seed)
        trainer = Trainer(
            model=build_model(model_arguments, label_names),
            args=training_arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            compute_metrics=compute_metrics,
            processing_class=processor,
        )
    except (ValueError, OSError, NotImplementedError, DatasetsError) as error:
        if isinstance(error, DatasetsError):  # says only that something went wrong
            error = error.__cause__ or error
        sys.exit(f"error: {' '.join(str(error).split())}")

    trained = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    results = {"train": trained.metrics, "eval": trainer.evaluate()}
    if "test" in datasets:
        results["test"] = trainer.evaluate(datasets["test"], metric_key_prefix="test")
    for name, metrics in results.items():
        trainer.log_metrics(name, metrics)
        trainer.save_metrics(name, metrics)


if __name__ == "__main__":
    main()
