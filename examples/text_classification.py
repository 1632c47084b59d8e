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

from dataclasses import dataclass
from typing import Any

import torch
from classification import DataTrainingArguments, PositiveNumbers, load_splits, train
from embedded_data import load_docstring_sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.hf_argparser import HfArg

SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
# Weights start at the scale of their inputs; ModernBERT's own 0.02 suits layers of some 2,500 units. Embeddings are
# normalised before use, so a small scale lets them turn fast, which helps SGD with the many rare tokens.
HIDDEN_SIZE, EMBEDDING_STD = 64, 0.02
LEARNING_RATES = {"sgd": (0.2, 0.03), "adam": (4e-3, 1e-4)}  # for a new model and for a pretrained one


@dataclass
class ModelArguments(PositiveNumbers):
    """Which model to train."""

    model_name_or_path: str | None = HfArg(default=None, help="Hub name or folder (default: a new small ModernBERT).")
    vocabulary_size: int = HfArg(default=2000, help="Of a new model's tokenizer.")
    max_length: int = HfArg(default=64, help="Texts are cut to this many tokens.")


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


def prepare(model_arguments: ModelArguments, data_arguments: DataTrainingArguments) -> tuple[Any, Any, Any]:
    """Load all but the model: the splits as tokens, the labels, and the tokenizer."""
    splits, labels = load_splits(data_arguments, load_docstring_sentences, "text", "sentence")
    for name, split in splits.items():
        if not all(isinstance(text, str) for text in split["text"]):
            raise ValueError(f"The texts of the {name} split must be strings; some are not, or are missing.")
    if model_arguments.model_name_or_path is None:
        tokenizer = train_tokenizer(splits["train"]["text"][:], model_arguments.vocabulary_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch["text"], truncation=True, max_length=model_arguments.max_length)

    return splits.map(tokenize, batched=True, remove_columns=["text"]), labels, tokenizer


def build_model(arguments: ModelArguments, labels: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    """Load the pretrained model, or make a small ModernBERT, for the given labels."""
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


def main(args: list[str] | None = None) -> None:
    """Train on texts."""
    defaults = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "num_train_epochs": 3.0}
    train(args, ModelArguments, prepare, build_model, LEARNING_RATES, **defaults)


if __name__ == "__main__":
    main()
