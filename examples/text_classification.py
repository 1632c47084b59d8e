# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune a text classifier with Hugging Face's Trainer and `--optim nsf` or `--optim lcam`.

By default a small ModernBERT learns to tell the topic of sentences from the docstrings of Python's standard library,
without a network:

    python examples/text_classification.py --output_dir out --optim nsf
    python examples/text_classification.py --output_dir out --optim lcam --train_file train.csv --test_file test.csv \
        --model_name_or_path folder_or_hub_name
    python examples/text_classification.py --output_dir out --optim nsf --dataset_name glue --dataset_config_name sst2 \
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetsError
from embedded_data import compute_metrics, load_docstring_sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from transformers import TrainingArguments as HfTrainingArguments

import hf_nsf  # noqa: F401 (registers the optimizers lcam and nsf)

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
# Weights start at the scale of their inputs; ModernBERT's own 0.02 suits layers of some 2,500 units. Embeddings are
# normalised before use, so a small scale lets them turn fast, which helps SGD with the many rare tokens.
HIDDEN_SIZE, EMBEDDING_STD = 64, 0.02


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a pretrained model (default: a new small ModernBERT)."}
    )
    vocabulary_size: int = field(default=2000, metadata={"help": "Of the new model's tokenizer."})
    max_length: int = field(default=64, metadata={"help": "Texts are cut to this many tokens."})


@dataclass
class DataTrainingArguments:
    """Where the texts come from. With none of these: the docstrings of Python's standard library."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Local .parquet, .csv, .json or .jsonl file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a share of the training data."})
    test_file: str | None = field(default=None, metadata={"help": "Default: no test."})
    text_column: str | None = field(default=None, metadata={"help": "Default: text or sentence."})
    label_column: str | None = field(default=None, metadata={"help": "Default: label or labels."})
    validation_share: float = field(default=0.15, metadata={"help": "Of the training data, where no split is there."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for validation and test."})


@dataclass
class TrainingArguments(HfTrainingArguments):
    """The Trainer's arguments, with defaults for this task."""

    learning_rate: float | None = field(default=None, metadata={"help": "Default: one that suits optimizer and model."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts of one update on one device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Texts of one evaluation step."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates, or a share below 1, of rising rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints. The end is always saved."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory for a GPU."})
    logging_steps: float = field(default=5, metadata={"help": "Log the training loss every so many updates."})


# ---- data


def load_splits(arguments: DataTrainingArguments) -> DatasetDict:
    """Load train, validation and perhaps test, with columns `text` and `labels`; a ValueError says what is wrong."""
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
        splits = load_docstring_sentences()
    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {', '.join(splits)}.")

    columns = splits["train"].column_names
    for new, wanted, usual in (
        ("text", arguments.text_column, ("text", "sentence")),
        ("labels", arguments.label_column, ("label", "labels")),
    ):
        old = next((name for name in ([wanted] if wanted else usual) if name in columns), None)
        if old is None:
            raise ValueError(f"No column {wanted or ' or '.join(usual)}: the columns are {', '.join(columns)}.")
        splits = splits if old == new else splits.rename_column(old, new)
    splits = splits.select_columns(["text", "labels"])
    for name, split in splits.items():
        if not all(isinstance(text, str) for text in split["text"]):
            raise ValueError(f"The texts of the {name} split must be strings; some are not, or are missing.")
    if not isinstance(splits["train"].features["labels"], ClassLabel):
        values = splits["train"].unique("labels")
        if not all(isinstance(value, int | str) for value in values) or len(values) < 2:
            raise ValueError(f"Labels must be at least two different numbers or strings, found {values[:5]}.")
        names = ClassLabel(names=[str(value) for value in sorted(values)])
        splits = splits.cast_column("labels", Value("string")).cast_column("labels", names)
    if "test" in splits and splits["test"].unique("labels") == [-1]:  # as in GLUE
        del splits["test"]

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


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer; WordPiece's trainer breaks ties at random, so that runs of a seed would differ."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace()])
    special = list(SPECIAL_TOKENS.values())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    first, last = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)]
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL_TOKENS)


# ---- model


def build_model(arguments: ModelArguments, label_names: list[str], tokenizer: Any) -> PreTrainedModel:
    """Load the pretrained model, or make a small ModernBERT, for the given labels."""
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: k for k, name in enumerate(label_names)}}
    if arguments.model_name_or_path is not None:
        name = arguments.model_name_or_path
        return AutoModelForSequenceClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=arguments.max_length,
        classifier_pooling="mean",
        embedding_dropout=0.5,
        classifier_dropout=0.5,
        initializer_range=HIDDEN_SIZE**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        **labels,
    )
    model = ModernBertForSequenceClassification(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(EMBEDDING_STD / config.initializer_range)
    return model


def default_learning_rate(optim: str, pretrained: bool) -> float:
    """A rate that suits the family of the optimizer."""
    if "sgd" in optim or optim == "lcam":
        return 0.03 if pretrained else 0.2
    return 1e-4 if pretrained else 4e-3


def main(args: list[str] | None = None) -> None:
    """Parse the arguments, train, evaluate and save; wrong arguments or data end it with one sentence."""
    try:
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(args)
        splits = load_splits(data_arguments)
        pretrained = model_arguments.model_name_or_path
        if pretrained is None:
            tokenizer = train_tokenizer(splits["train"]["text"][:], model_arguments.vocabulary_size)
        else:
            tokenizer = AutoTokenizer.from_pretrained(pretrained)
        if training_arguments.learning_rate is None:
            optim = training_arguments.optim.value
            training_arguments.learning_rate = default_learning_rate(optim, pretrained is not None)

        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            return tokenizer(batch["text"], truncation=True, max_length=model_arguments.max_length)

        label_names = splits["train"].features["labels"].names
        splits = splits.map(tokenize, batched=True, remove_columns=["text"])
        set_seed(training_arguments.seed)
        trainer = Trainer(
            model=build_model(model_arguments, label_names, tokenizer),
            args=training_arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics,
            processing_class=tokenizer,
        )
    except (ValueError, OSError, DatasetsError) as error:
        if isinstance(error, DatasetsError):  # says only that something went wrong
            error = error.__cause__ or error
        sys.exit(f"error: {' '.join(str(error).split())}")

    trained = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    results = {"train": trained.metrics, "eval": trainer.evaluate()}
    if "test" in splits:
        results["test"] = trainer.evaluate(splits["test"], metric_key_prefix="test")
    for name, metrics in results.items():
        trainer.log_metrics(name, metrics)
        trainer.save_metrics(name, metrics)


if __name__ == "__main__":
    main()
