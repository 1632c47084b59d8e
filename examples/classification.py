# SPDX-License-Identifier: Apache-2.0
"""What the classification examples share: the user's data, the metric, the training, one sentence for bad input."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import ClassLabel, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetsError
from embedded_data import SPLIT_SEED, SPLITS
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

import hf_nsf  # noqa: F401 (registers the optimizers lcam and nsf)

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


class PositiveNumbers:
    """Arguments of which all numbers must be above 0."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) in (int, float) and value <= 0:
                raise ValueError(f"--{name} must be above 0, got {value}.")


@dataclass
class DataTrainingArguments(PositiveNumbers):
    """Where the data comes from. With none of these, it is embedded."""

    dataset_name: str | None = HfArg(default=None, help="A data set of the Hub, or a local folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration.")
    train_file: str | None = HfArg(default=None, help="Local .parquet, .csv, .json or .jsonl file.")
    validation_file: str | None = HfArg(default=None, help="Default: a share of the training data.")
    test_file: str | None = HfArg(default=None, help="Default: no test.")
    input_column: str | None = HfArg(default=None, help="Default: text or sentence; image or img.")
    label_column: str | None = HfArg(default=None, help="Default: label or labels.")
    validation_share: float = HfArg(default=0.15, help="Of the training data, where no split is there.")
    max_train_samples: int | None = HfArg(default=None, help="Train on a random part of this size.")
    max_eval_samples: int | None = HfArg(default=None, help="Likewise for validation and test.")


def load_splits(
    arguments: DataTrainingArguments, embedded: Callable[[], DatasetDict], *usual: str
) -> tuple[DatasetDict, dict[str, Any]]:
    """Load and check the data; where the arguments name none, `embedded` makes it.

    Returns:
        Splits train, validation and perhaps test, with the columns `labels` and, for inputs, the first of the `usual`;
        and what a model's configuration holds of the labels.
    """
    files = {split: file for split in SPLITS if (file := getattr(arguments, f"{split}_file")) is not None}
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
        splits = embedded()
    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {', '.join(splits)}.")

    columns = splits["train"].column_names
    for new, names in (
        (usual[0], [arguments.input_column] if arguments.input_column else usual),
        ("labels", [arguments.label_column] if arguments.label_column else ("label", "labels")),
    ):
        old = next((name for name in names if name in columns), None)
        if old is None:
            raise ValueError(f"No column {' or '.join(names)}: the columns are {', '.join(columns)}.")
        splits = splits if old == new else splits.rename_column(old, new)
    splits = splits.select_columns([usual[0], "labels"])
    if not isinstance(splits["train"].features["labels"], ClassLabel):
        values = splits["train"].unique("labels")
        if not all(isinstance(value, int | str) for value in values) or len(values) < 2:
            raise ValueError(f"Labels must be at least two different numbers or strings, found {values[:5]}.")
        label = ClassLabel(names=[str(value) for value in sorted(values)])
        splits = splits.cast_column("labels", Value("string")).cast_column("labels", label)
    if "test" in splits and splits["test"].unique("labels") == [-1]:  # hidden, as in GLUE
        del splits["test"]
    if "validation" not in splits:
        if arguments.validation_share >= 1:
            raise ValueError(f"--validation_share must be below 1, got {arguments.validation_share}.")
        parts = splits["train"].train_test_split(arguments.validation_share, seed=SPLIT_SEED)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    splits = DatasetDict({name: splits[name] for name in SPLITS if name in splits})
    for name, split in splits.items():
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        if limit is not None:
            splits[name] = split.shuffle(seed=SPLIT_SEED).select(range(min(limit, len(split))))
    names = splits["train"].features["labels"].names
    return splits, {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the script with one sentence where arguments or data are wrong."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, DatasetsError) as error:  # Arrow has casts not implemented
        # A DatasetsError says only that something went wrong.
        cause = error.__cause__ if isinstance(error, DatasetsError) else None
        sys.exit(f"error: {' '.join(str(cause or error).split())}")


class AccuracyAndF1(evaluate.Metric):
    """Share of right predictions, and the mean of the classes' F1 scores."""

    def _info(self) -> evaluate.MetricInfo:
        columns = Features({"predictions": Value("int32"), "references": Value("int32")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=columns)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        macro_f1 = f1_score(references, predictions, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(references, predictions)), "macro_f1": float(macro_f1)}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What a Trainer reports after each evaluation."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    metric = AccuracyAndF1(keep_in_memory=True)  # no file that runs beside each other could share
    return metric.compute(predictions=logits.argmax(-1), references=prediction.label_ids)


def default_learning_rate(rates: dict[str, tuple[float, float]], optim: str, model_arguments: Any) -> float:
    """Pick the rate of the optimizer's family, "sgd" or "adam", for a new model or for a pretrained one."""
    family = "sgd" if "sgd" in optim or optim == "lcam" else "adam"
    return rates[family][model_arguments.model_name_or_path is not None]


def train(
    args: list[str] | None,
    model_arguments: type,
    prepare: Callable[[Any, DataTrainingArguments], tuple[Any, dict[str, Any], Any]],
    build_model: Callable[[Any, dict[str, Any], Any], Any],
    rates: dict[str, tuple[float, float]],
    **defaults: Any,
) -> None:
    """Parse the arguments, train, evaluate and save.

    `prepare` returns splits ready for training, the labels, and a tokenizer or an image processor; `build_model` gets
    the last two. `rates` are those of `default_learning_rate`, the `defaults` of TrainingArguments.
    """
    with one_sentence():
        parser = HfArgumentParser((model_arguments, DataTrainingArguments, TrainingArguments))
        parser.set_defaults(
            learning_rate=None,  # one that suits optimizer and model
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=5.0,
            dataloader_pin_memory=torch.cuda.is_available(),
            **defaults,
        )
        model, data, training = parser.parse_args_into_dataclasses(args)
        splits, labels, processor = prepare(model, data)
        if training.learning_rate is None:
            training.learning_rate = default_learning_rate(rates, training.optim.value, model)
        set_seed(training.seed)
        trainer = Trainer(
            model=build_model(model, labels, processor),
            args=training,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=compute_metrics,
            processing_class=processor,
        )

    trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    results = {"train": trained.metrics, "eval": trainer.evaluate()}
    if "test" in splits:
        results["test"] = trainer.evaluate(splits["test"], metric_key_prefix="test")
    for name, metrics in results.items():
        trainer.log_metrics(name, metrics)
        trainer.save_metrics(name, metrics)
