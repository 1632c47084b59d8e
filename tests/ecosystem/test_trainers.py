# SPDX-License-Identifier: Apache-2.0
"""Trainers of other libraries, as they are, with both optimizers: PEFT, TRL, sentence-transformers, SetFit.

Models and tokenizers are made on the spot; nothing is downloaded.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from trainer_runs import HIGH, LOW, OPTIMIZERS, Watch, Watched, by_the_rule, train_logs, used
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames

import hf_nsf

# Deprecations are errors in the default run; here they are other libraries'.
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]

NUMBERS = "zero one two three four five six seven eight nine ten eleven".split()
OURS = pytest.mark.parametrize("optimizer", ["lcam", "nsf"])


def common(folder, optimizer, **changes):
    return {
        "output_dir": str(folder), "num_train_epochs": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
        "max_grad_norm": 0.0, **OPTIMIZERS[optimizer], **changes,
    }  # fmt: skip


def watched(cls):
    """A library's Trainer that writes down its losses and updates."""
    return type(cls.__name__, (Watched, cls), {})


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


def preferences(size):
    """Counting upwards is chosen, counting downwards is rejected."""
    texts = [text.split() for text in sentences(size)]
    return {
        "prompt": [" ".join(words[:2]) for words in texts],
        "chosen": [" " + " ".join(words[2:]) for words in texts],
        "rejected": [" " + " ".join(reversed(words[2:])) for words in texts],
    }


def llama(cls=LlamaForCausalLM, **changes):
    set_seed(3)
    return cls(
        LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=3, **changes)
    )  # fmt: skip


def saved_llama(folder):
    """A Llama with a folder, from which DPO and KTO load their reference model."""
    llama().save_pretrained(folder / "llama")
    return LlamaForCausalLM.from_pretrained(folder / "llama")


def check(trainer, optimizer, updates):
    """p follows its schedule, or every momentum follows from the losses; the log has the values used."""
    assert isinstance(trainer.optimizer.optimizer, getattr(hf_nsf, optimizer.upper()))
    logs = train_logs(trainer)
    assert len(logs) == updates
    if optimizer == "nsf":
        expected = hf_nsf.p_schedule(range(updates), p_min=-0.25, p_max=0.5, cycles=2, total_steps=updates)
        assert [entry["nsf_p"] for entry in logs] == expected
        return
    expected, _ = by_the_rule(trainer.events)
    assert used(trainer.events) == [entry["lcam_momentum"] for entry in logs] == expected
    assert set(expected) == {LOW, HIGH}


def check_learning(trainer, part=8):
    losses = [entry["loss"] for entry in train_logs(trainer)]
    assert sum(losses[-part:]) < sum(losses[:part])


# 44 rows: 11 batches, or five windows of 2 of them and one of 1.
ACCUMULATION = pytest.mark.parametrize(("windows", "updates"), [(1, 44), (2, 24)], ids=["plain", "accumulation"])


@OURS
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
    trainer = watched(Trainer)(
        model=peft.get_peft_model(base, config),
        args=TrainingArguments(**common(tmp_path, optimizer, gradient_accumulation_steps=windows)),
        train_dataset=[{"input_ids": words(text)["input_ids"]} for text in sentences(44)],
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
    )
    trainer.train()
    check(trainer, optimizer, updates)
    check_learning(trainer)
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)


@OURS
@ACCUMULATION
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_trl_sft(optimizer, windows, updates, stream, tmp_path):
    """A stream's pass has an odd number of batches: one is carried over to the next pass."""
    trl = pytest.importorskip("trl")
    data = Dataset.from_dict({"text": sentences(44)})
    length = {"max_steps": updates} if stream else {}
    trainer = watched(trl.SFTTrainer)(
        model=llama(),
        args=trl.SFTConfig(**common(tmp_path, optimizer, gradient_accumulation_steps=windows, **length), max_length=32),
        train_dataset=data.to_iterable_dataset() if stream else data,
        processing_class=tokenizer(),
    )
    trainer.train()
    check(trainer, optimizer, updates)
    check_learning(trainer)


def dpo(trl, folder, optimizer):
    args = trl.DPOConfig(**common(folder, optimizer, learning_rate=1e-2), max_length=32)
    return trl.DPOTrainer, args, saved_llama(folder), preferences(32), {}


def reward(trl, folder, optimizer):
    args = trl.RewardConfig(**common(folder, optimizer, learning_rate=1e-2), max_length=32)
    return trl.RewardTrainer, args, llama(LlamaForSequenceClassification, num_labels=1), preferences(32), {}


def kto(trl, folder, optimizer):
    pairs = preferences(16)
    data = {
        "prompt": pairs["prompt"] * 2,
        "completion": pairs["chosen"] + pairs["rejected"],
        "label": [True] * 16 + [False] * 16,
    }
    args = trl.KTOConfig(**common(folder, optimizer, learning_rate=1e-2), max_length=32)
    return trl.KTOTrainer, args, saved_llama(folder), data, {}


def grpo(trl, folder, optimizer):
    def many_ones(completions, **kwargs):
        return [float(text.split().count("one")) for text in completions]

    args = trl.GRPOConfig(
        **common(folder, optimizer, learning_rate=1e-2, num_train_epochs=1, max_steps=32),
        num_generations=4, max_completion_length=8,
    )  # fmt: skip
    return trl.GRPOTrainer, args, llama(), {"prompt": preferences(32)["prompt"]}, {"reward_funcs": many_ones}


@OURS
@pytest.mark.parametrize("make", [dpo, reward, kto, grpo])
def test_trl_others(make, optimizer, tmp_path):
    trl = pytest.importorskip("trl")
    cls, args, model, data, extra = make(trl, tmp_path, optimizer)
    trainer = watched(cls)(
        model=model, args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer(), **extra
    )
    trainer.train()
    check(trainer, optimizer, 32)
    if make is not grpo:  # whose loss is no measure
        check_learning(trainer)


def sentence_model(folder):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as parts

    set_seed(3)
    config = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32)  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    words = parts.Transformer(str(folder / "bert"), max_seq_length=32)
    return library.SentenceTransformer(modules=[words, parts.Pooling(32)], device="cpu")


@OURS
@ACCUMULATION
def test_sentence_transformers(optimizer, windows, updates, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import losses

    model = sentence_model(tmp_path)
    first = sentences(44)
    second = first[1:] + first[:1]
    alike = [len(set(a.split()) & set(b.split())) / 6 for a, b in zip(first, second, strict=True)]
    rate = {"lcam": 5e-3, "nsf": 1e-2}[optimizer]
    trainer = watched(library.SentenceTransformerTrainer)(
        model=model,
        args=library.SentenceTransformerTrainingArguments(
            **common(tmp_path, optimizer, gradient_accumulation_steps=windows, learning_rate=rate)
        ),
        train_dataset=Dataset.from_dict({"sentence1": first, "sentence2": second, "score": alike}),
        loss=losses.CosineSimilarityLoss(model),
    )
    trainer.train()
    check(trainer, optimizer, updates)
    check_learning(trainer)


@OURS
def test_setfit(optimizer, tmp_path):
    """SetFit's arguments have no optim, so its inner Trainer gets the name. It logs `embedding_loss`."""
    setfit = pytest.importorskip("setfit")
    texts, labels = preferences(8), [1] * 8 + [0] * 8
    texts = texts["chosen"] + texts["rejected"]
    args = setfit.TrainingArguments(
        output_dir=str(tmp_path), batch_size=8, max_steps=24, body_learning_rate={"lcam": 5e-3, "nsf": 1e-2}[optimizer],
        report_to="none", logging_strategy="steps", logging_steps=1, logging_first_step=True, show_progress_bar=False,
    )  # fmt: skip
    outer = setfit.Trainer(setfit.SetFitModel(sentence_model(tmp_path)), args)
    trainer = outer.st_trainer
    trainer.args.optim = OptimizerNames(optimizer)
    trainer.args.optim_args = OPTIMIZERS[optimizer]["optim_args"]
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    outer.train_embeddings(texts, labels, args=args)
    logs = [entry for entry in trainer.state.log_history if "embedding_loss" in entry]
    assert len(logs) == 24
    if optimizer == "nsf":
        expected = hf_nsf.p_schedule(range(24), p_min=-0.25, p_max=0.5, cycles=2, total_steps=24)
        assert [entry["nsf_p"] for entry in logs] == expected
        return
    losses = iter(logs)
    events = []
    for kind, value in trainer.events:
        events += [("loss", torch.tensor(next(losses)["embedding_loss"]))] if kind == "momentum" else []
        events.append((kind, value))
    expected, _ = by_the_rule(events)
    assert used(events) == [entry["lcam_momentum"] for entry in logs] == expected and set(expected) == {LOW, HIGH}
