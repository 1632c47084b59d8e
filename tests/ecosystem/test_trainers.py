# SPDX-License-Identifier: Apache-2.0
"""Trainers of other libraries, as they are, with optim="lcam" and optim="nsf": PEFT, TRL, sentence-transformers.

Models and tokenizers are made on the spot; nothing is downloaded.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_nsf

pytestmark = pytest.mark.ecosystem

OPTIMIZERS = {
    "lcam": {"optim": "lcam", "optim_args": "low_loss_momentum=0.8,high_loss_momentum=0.9", "learning_rate": 0.05},
    "nsf": {"optim": "nsf", "optim_args": "p_min=-0.25,p_max=0.5,cycles=2", "learning_rate": 1e-2},
}
NUMBERS = "zero one two three four five six seven eight nine ten eleven".split()
EPOCHS = 4


def common(folder, optimizer, **changes):
    values = {
        "output_dir": str(folder), "num_train_epochs": EPOCHS, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
        "max_grad_norm": 0.0, **OPTIMIZERS[optimizer],
    }  # fmt: skip
    return {**values, **changes}


def tokenizer():
    """One token a word; sentences get marks at both ends."""
    words = ["[PAD]", "[UNK]", "<s>", "</s>", *NUMBERS]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>", mask_token="[UNK]",
    )  # fmt: skip


def sentences(size):
    """Counting upwards from somewhere, some words being wrong, in sentences of different lengths."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(size):
        start, length = torch.randint(0, 6, (1,), generator=generator), torch.randint(4, 7, (1,), generator=generator)
        noise = (torch.rand(int(length), generator=generator) < 0.2) * torch.randint(1, 5, (1,), generator=generator)
        texts.append(" ".join(NUMBERS[(int(start) + k + int(noise[k])) % 12] for k in range(int(length))))
    return texts


def llama():
    set_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    )  # fmt: skip


def check(trainer, optimizer, updates_per_epoch):
    """The loss falls; p is its schedule's, or the momenta follow from the losses logged."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    updates = EPOCHS * updates_per_epoch
    assert len(logs) == updates
    assert isinstance(trainer.optimizer.optimizer, getattr(hf_nsf, optimizer.upper()))
    losses = [entry["loss"] for entry in logs]
    assert sum(losses[-updates_per_epoch:]) < sum(losses[:updates_per_epoch])
    if optimizer == "nsf":
        assert [entry["nsf_p"] for entry in logs] == hf_nsf.p_schedule(
            range(updates), p_min=-0.25, p_max=0.5, cycles=2, total_steps=updates
        )
        return
    momentum, mean = 0.9, None
    for index, entry in enumerate(logs):
        seen = losses[index - index % updates_per_epoch : index + 1]
        assert (entry["lcam_momentum"], entry.get("lcam_loss_mean")) == (momentum, mean), index
        mean = sum(seen) / len(seen)
        momentum = 0.8 if entry["loss"] < mean else 0.9
    assert len({entry["lcam_momentum"] for entry in logs}) == 2


def windows_answer(trainer):
    return trainer.optimizer.optimizer.param_groups[0]["loss_windows_average"]


# 44 rows: 11 batches, or windows of 4, 4 and 3 of them.
ACCUMULATION = pytest.mark.parametrize(("windows", "updates"), [(1, 11), (4, 3)], ids=["plain", "accumulation"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@ACCUMULATION
def test_peft_lora(optimizer, windows, updates, tmp_path):
    peft = pytest.importorskip("peft")
    words = tokenizer()
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    set_seed(4)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    rate = {"lcam": 0.2, "nsf": 1e-2}[optimizer]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**common(tmp_path, optimizer, gradient_accumulation_steps=windows, learning_rate=rate)),
        train_dataset=[{"input_ids": words(text)["input_ids"]} for text in sentences(44)],
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
    )
    trainer.train()
    check(trainer, optimizer, updates)
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)
    if optimizer == "lcam" and windows > 1:
        assert windows_answer(trainer) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@ACCUMULATION
def test_trl_sft(optimizer, windows, updates, tmp_path):
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        model=llama(),
        args=trl.SFTConfig(**common(tmp_path, optimizer, gradient_accumulation_steps=windows), max_length=32),
        train_dataset=Dataset.from_dict({"text": sentences(44)}),
        processing_class=tokenizer(),
    )
    trainer.train()
    check(trainer, optimizer, updates)
    if optimizer == "lcam" and windows > 1:
        assert windows_answer(trainer) == 1
        assert not trainer._metrics["eval"]  # asking for that has left nothing in the trainer's own records


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@ACCUMULATION
def test_sentence_transformers(optimizer, windows, updates, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import losses
    from sentence_transformers import models as parts

    set_seed(3)
    config = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    words = parts.Transformer(str(tmp_path / "bert"), max_seq_length=32)
    model = library.SentenceTransformer(modules=[words, parts.Pooling(32)], device="cpu")
    first = sentences(44)
    second = first[1:] + first[:1]
    alike = [len(set(a.split()) & set(b.split())) / 6 for a, b in zip(first, second, strict=True)]
    rate = {"lcam": 5e-3, "nsf": 1e-2}[optimizer]
    trainer = library.SentenceTransformerTrainer(
        model=model,
        args=library.SentenceTransformerTrainingArguments(
            **common(tmp_path, optimizer, gradient_accumulation_steps=windows, learning_rate=rate)
        ),
        train_dataset=Dataset.from_dict({"sentence1": first, "sentence2": second, "score": alike}),
        loss=losses.CosineSimilarityLoss(model),
    )
    trainer.train()
    check(trainer, optimizer, updates)
    if optimizer == "lcam" and windows > 1:
        assert windows_answer(trainer) == 1  # the Trainer itself averages
