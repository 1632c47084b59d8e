# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune an image classifier with the stock Trainer and `--optim nsf` or `--optim lcam`.

With no data and no model named, a small ResNet learns scikit-learn's handwritten digits, without a network:

    python examples/image_classification.py --output_dir out --optim nsf
    python examples/image_classification.py --output_dir out --optim lcam --compare_with adamw_torch
    python examples/image_classification.py --output_dir out --optim nsf --train_file train.parquet \
        --test_file test.parquet --model_name_or_path folder_or_hub_name
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Image
from embedded_data import load_digits_images
from example_data import DataArguments, DataError, LabelledData, load_data
from example_metrics import build_compute_metrics
from example_training import (
    ExampleTrainingArguments,
    LearningRates,
    label_options,
    load_pretrained,
    parse_arguments,
    run,
    train_and_report,
)
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import hf_nsf  # noqa: F401 (registers the optimizers lcam and nsf)

try:
    from transformers import ViTImageProcessorPil
except ImportError:  # older ones, where the class without a suffix needs PIL only
    from transformers import ViTImageProcessor as ViTImageProcessorPil

FROM_SCRATCH = LearningRates(adam_like=3e-3, sgd_like=0.05)
PRETRAINED = LearningRates(adam_like=5e-5, sgd_like=5e-3)


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or local folder of a pretrained model (default: a new small ResNet)."}
    )
    image_size: int = field(default=32, metadata={"help": "Height and width to resize to, for the new small ResNet."})


@dataclass
class ImageDataArguments(DataArguments):
    """Where the images come from. With no data named: scikit-learn's digits."""

    image_column: str | None = field(
        default=None, metadata={"help": "Column of images, bytes or file names (default: image, or img)."}
    )


@dataclass
class ImageTrainingArguments(ExampleTrainingArguments):
    """Training arguments with the defaults of this task."""

    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images of one update."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images of one evaluation step."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep it false: images load on demand."})


def read_image(value: Any, folder: Path) -> PIL.Image.Image:
    """Read an image in RGB.

    Args:
        value: bytes, a file name, a mapping with `bytes` and `path`, or an image.
        folder: where relative file names start.

    Returns:
        The image.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        value = PIL.Image.open(io.BytesIO(value))
    elif isinstance(value, str):
        value = PIL.Image.open(folder / value)
    if not isinstance(value, PIL.Image.Image):
        raise OSError(f"neither bytes, nor a file name, nor an image, but {type(value).__name__}")
    return value.convert("RGB")


def check_images(data: LabelledData, folders: dict[str, Path]) -> None:
    """Read every image once, so that a broken one is found before training.

    Raises:
        DataError: an image cannot be read.
    """
    for name, split in data.splits.items():
        for row, value in enumerate(split[data.input_column]):
            try:
                read_image(value, folders[name])
            except (OSError, SyntaxError, ValueError) as error:
                file = value.get("path") if isinstance(value, dict) else value
                what = f"file {file!r}" if isinstance(file, str) else "value"
                raise DataError(
                    f"The image in row {row} of the {name} split is unreadable ({what}: {type(error).__name__}): "
                    f"column {data.input_column!r} must hold image bytes or names of image files."
                ) from None


def load_images(arguments: ImageDataArguments, processor: Any, seed: int) -> LabelledData:
    """Load and check the data; its splits give `pixel_values` and `labels` on demand."""
    data = load_data(arguments, load_digits_images, arguments.image_column, ("image", "img"), seed)
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    folders = {name: Path(files[name] or files["train"] or ".").parent for name in data.splits}
    for name, split in data.splits.items():
        if isinstance(split.features[data.input_column], Image):
            data.splits[name] = split.cast_column(data.input_column, Image(decode=False))
    check_images(data, folders)
    for name, split in data.splits.items():

        def transform(batch: dict[str, list], folder: Path = folders[name]) -> dict[str, Any]:
            images = [read_image(value, folder) for value in batch[data.input_column]]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": list(pixels), "labels": batch[data.label_column]}

        data.splits[name] = split.with_transform(transform)
    return data


def build_processor(arguments: ModelArguments) -> Any:
    """Build the image processor of the model, one that needs PIL only."""
    if arguments.model_name_or_path is not None:
        return load_pretrained(AutoImageProcessor, arguments.model_name_or_path)
    size = {"height": arguments.image_size, "width": arguments.image_size}
    return ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def build_model(arguments: ModelArguments, label_names: list[str]) -> PreTrainedModel:
    """Load the pretrained model, or make a small ResNet, for the given labels."""
    labels = label_options(label_names)
    if arguments.model_name_or_path is not None:
        name = arguments.model_name_or_path
        return load_pretrained(AutoModelForImageClassification, name, ignore_mismatched_sizes=True, **labels)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", **labels)
    return ResNetForImageClassification(config)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make one batch."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, train and report; returns what stands in metrics.json."""
    model_arguments, data_arguments, training_arguments = parse_arguments(
        (ModelArguments, ImageDataArguments, ImageTrainingArguments), args
    )
    processor = build_processor(model_arguments)
    data = load_images(data_arguments, processor, training_arguments.data_seed or 0)
    return train_and_report(
        lambda: build_model(model_arguments, data.label_names),
        training_arguments,
        FROM_SCRATCH if model_arguments.model_name_or_path is None else PRETRAINED,
        title="Image classification",
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        test_dataset=data.splits.get("test"),
        compute_metrics=build_compute_metrics(data_arguments.metric, len(data.label_names)),
        data_collator=collate,
        processing_class=processor,
    )


if __name__ == "__main__":
    run(main)
