# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune an image classifier with Hugging Face's Trainer and `--optim nsf` or `--optim lcam`.

By default a small wide ResNet learns scikit-learn's handwritten digits, without a network:

    python examples/image_classification.py --output_dir out --optim nsf
    python examples/image_classification.py --output_dir out --optim lcam --train_file train.parquet \
        --architecture wrn-28-10 --augment true --learning_rate 0.1 --weight_decay 5e-4
    python examples/image_classification.py --output_dir out --optim nsf --dataset_name beans \
        --model_name_or_path google/vit-base-patch16-224-in21k

On CIFAR-10 the second has the network, learning rate and weight decay of LCAM's paper. Images of a new model are
decoded once and kept in memory; with a pretrained one they load on demand.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from classification import DataTrainingArguments, PositiveNumbers, load_splits, train
from datasets import Image
from embedded_data import load_digits_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.modeling_outputs import ImageClassifierOutput


@dataclass
class ModelArguments(PositiveNumbers):
    """Which model to train."""

    model_name_or_path: str | None = HfArg(default=None, help="Hub name or folder (default: a new wide ResNet).")
    architecture: str = HfArg(default="wrn-10-2", help="Of a new model: wrn-DEPTH-WIDTH, such as wrn-28-10.")
    image_size: int | None = HfArg(default=None, help="For a new model (default: the first image's).")
    augment: bool = HfArg(default=False, help="For a new model: random flips and crops.")


LEARNING_RATES = {"sgd": (0.05, 5e-3), "adam": (3e-3, 5e-5)}  # for a new model and for a pretrained one


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
    count, _, height, width = images.shape
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    rows, columns = torch.randint(2 * margin + 1, (count,)), torch.randint(2 * margin + 1, (count,))
    crops = pad(images, [margin] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view of all
    return crops[torch.arange(count), :, rows, columns]


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
    """The network of arXiv 1605.07146 for small images, of a configuration with a depth and a width w.

    It has three stages with 16 w, 32 w and 64 w channels, of (depth - 4) / 6 blocks each.
    """

    config_class = PreTrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PreTrainedConfig) -> None:
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


def build_model(arguments: ModelArguments, labels: dict[str, Any], processor: Any = None) -> PreTrainedModel:
    """Load the pretrained model, or make a new wide ResNet, for the given labels."""
    if arguments.model_name_or_path is not None:
        name = arguments.model_name_or_path
        return AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    found = re.fullmatch(r"wrn-(\d+)-(\d+)", arguments.architecture)
    if not found or int(found[1]) % 6 != 4 or int(found[1]) < 10 or int(found[2]) < 1:
        raise ValueError(f"architecture={arguments.architecture}: give wrn-DEPTH-WIDTH with DEPTH 10, 16, 22, 28, ...")
    return WideResNet(PreTrainedConfig(depth=int(found[1]), width=int(found[2]), **labels))


def prepare(model_arguments: ModelArguments, data_arguments: DataTrainingArguments) -> tuple[dict[str, Any], Any, Any]:
    """Load all but the model: the splits ready for training, the labels, and an image processor if any."""
    splits, labels = load_splits(data_arguments, load_digits_images, "image", "img")
    splits = splits.cast_column("image", Image(mode="RGB"))
    if model_arguments.model_name_or_path is None:
        size = None if model_arguments.image_size is None else (model_arguments.image_size,) * 2
        data = {}
        for name, split in splits.items():
            data[name] = ImagesInMemory(split, size, augment=name == "train" and model_arguments.augment)
            size = data["train"].size
        return data, labels, None
    processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path)

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        pixels = processor(batch["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    return {name: split.with_transform(transform) for name, split in splits.items()}, labels, processor


def main(args: list[str] | None = None) -> None:
    """Train on images."""
    defaults = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 256, "num_train_epochs": 10.0}
    train(args, ModelArguments, prepare, build_model, LEARNING_RATES, remove_unused_columns=False, **defaults)


if __name__ == "__main__":
    main()
