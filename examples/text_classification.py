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

from dataclasses import dataclass, field
from typing import Any

import torch
from embedded_data import DataTrainingArguments, compute_metrics, load_docstring_sentences, load_splits, one_sentence
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
    TrainingArguments,
    set_seed,
)

import hf_nsf  # noqa: F401 (registers the optimizers lcam and nsf)

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


# ---- data


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
    with one_sentence():
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
        parser.set_defaults(
            learning_rate=None,  # one that suits optimizer and model
            num_train_epochs=3.0,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=5.0,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(args)
        splits = load_splits(data_arguments, load_docstring_sentences, "text", "sentence")
        for name, split in splits.items():
            if not all(isinstance(text, str) for text in split["text"]):
                raise ValueError(f"The texts of the {name} split must be strings; some are not, or are missing.")
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
