# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune a text classifier with the stock Trainer and `--optim nsf` or `--optim lcam`.

With no data and no model named, a small ModernBERT learns to tell the topic of the sentences in the docstrings of
Python's standard library, without a network:

    python examples/text_classification.py --output_dir out --optim nsf
    python examples/text_classification.py --output_dir out --optim lcam --compare_with adamw_torch
    python examples/text_classification.py --output_dir out --optim nsf --train_file train.csv \
        --test_file test.csv --model_name_or_path folder_or_hub_name
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from embedded_data import load_docstring_sentences
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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import hf_nsf  # noqa: F401 (registers the optimizers lcam and nsf)

# Docstrings: of rates a factor of two apart, five each and six for AdamW, tried with one seed, the two best (three for
# AdamW) were repeated with two more; the best mean on validation stands here. SST-2 with a model of 22.6M parameters:
# the best on validation of three each.
FROM_SCRATCH = LearningRates(adam_like=4e-3, sgd_like=0.2, nsf=4e-3)
PRETRAINED = LearningRates(adam_like=1e-4, sgd_like=3e-2)
# Weights start at the scale of their inputs; ModernBERT's own 0.02 suits layers of some 2,500 units. Each token's
# embedding is normalised before use, so that its scale changes not what the model computes but how fast the embedding
# turns: a small one, fast, which helps SGD with the many rare tokens.
HIDDEN_SIZE = 64
EMBEDDING_STD = 0.02
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or local folder of a pretrained model (default: a new small ModernBERT)."},
    )
    max_length: int = field(default=64, metadata={"help": "Texts are cut to this many tokens."})
    vocabulary_size: int = field(
        default=2000, metadata={"help": "Of the tokenizer that the new small ModernBERT gets."}
    )


@dataclass
class TextDataArguments(DataArguments):
    """Where the texts come from. With no data named: the docstrings of Python's standard library."""

    text_column: str | None = field(default=None, metadata={"help": "Column of texts (default: text, or sentence)."})


@dataclass
class TextTrainingArguments(ExampleTrainingArguments):
    """Training arguments with the defaults of this task."""

    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts of one update."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Texts of one evaluation step."})
    logging_steps: float = field(default=5, metadata={"help": "Log the training loss every so many updates."})


def load_texts(arguments: TextDataArguments, seed: int) -> LabelledData:
    """Load the data and check that all texts are strings.

    Raises:
        DataError: anything about the data is wrong.
    """
    data = load_data(arguments, load_docstring_sentences, arguments.text_column, ("text", "sentence"), seed)
    for name, split in data.splits.items():
        for row, text in enumerate(split[data.input_column]):
            if not isinstance(text, str):
                raise DataError(
                    f"Row {row} of the {name} split holds no text in column {data.input_column!r} but "
                    f"{text!r}: every row must hold a string."
                )
    return data


def build_tokenizer(arguments: ModelArguments, texts: list[str]) -> PreTrainedTokenizerBase:
    """Load the pretrained model's tokenizer, or train a byte-pair tokenizer on the texts."""
    if arguments.model_name_or_path is not None:
        return load_pretrained(AutoTokenizer, arguments.model_name_or_path)
    # Not WordPiece: its trainer breaks ties by hash order, so that two runs of one seed would differ.
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace()])
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocabulary_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    first, last = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **SPECIAL_TOKENS
    )


def build_model(
    arguments: ModelArguments, label_names: list[str], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the pretrained model, or make a small ModernBERT, for the given labels."""
    labels = label_options(label_names)
    if arguments.model_name_or_path is not None:
        name = arguments.model_name_or_path
        return load_pretrained(AutoModelForSequenceClassification, name, ignore_mismatched_sizes=True, **labels)
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


def tokenize(data: LabelledData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Replace the texts of all splits by tokens."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(batch[data.input_column], truncation=True, max_length=max_length)
        return {**tokens, "labels": batch[data.label_column]}

    for name, split in data.splits.items():
        data.splits[name] = split.map(encode, batched=True, remove_columns=split.column_names, desc="Tokenizing")


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, train and report; returns what stands in metrics.json."""
    model_arguments, data_arguments, training_arguments = parse_arguments(
        (ModelArguments, TextDataArguments, TextTrainingArguments), args
    )
    data = load_texts(data_arguments, training_arguments.data_seed or 0)
    tokenizer = build_tokenizer(model_arguments, data.splits["train"][data.input_column][:])
    tokenize(data, tokenizer, model_arguments.max_length)
    return train_and_report(
        lambda: build_model(model_arguments, data.label_names, tokenizer),
        training_arguments,
        FROM_SCRATCH if model_arguments.model_name_or_path is None else PRETRAINED,
        title="Text classification",
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        test_dataset=data.splits.get("test"),
        compute_metrics=build_compute_metrics(data_arguments.metric),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    run(main)
