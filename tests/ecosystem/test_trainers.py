# SPDX-License-Identifier: Apache-2.0
"""Trainers of other libraries, as they are, with both optimizers: PEFT, TRL, sentence-transformers, SetFit.

Models and tokenizers are made on the spot; nothing is downloaded.
"""

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from trainer_runs import HIGH, LOW, OPTIMIZERS, Watch, Watched, by_the_rule, check, check_learning, make_trainer, used
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from transformers.training_args import OptimizerNames

import hf_nsf

# Deprecations are errors in the default run; here they are other libraries'.
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]

NUMBERS = "zero one two three four five six seven eight nine ten eleven".split()
OURS = pytest.mark.parametrize("optimizer", ["lcam", "nsf"])


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


def sft(folder, stream=False):
    """A stream's pass has an odd number of batches: one is carried over to the next pass."""
    trl = pytest.importorskip("trl")
    data = Dataset.from_dict({"text": sentences(44)})
    data = data.to_iterable_dataset() if stream else data
    return {"cls": trl.SFTTrainer, "kind": trl.SFTConfig, "data": data, "model": llama()}


def dpo(folder):
    trl = pytest.importorskip("trl")
    return {"cls": trl.DPOTrainer, "kind": trl.DPOConfig, "data": preferences(44), "model": saved_llama(folder)}


def reward(folder):
    trl = pytest.importorskip("trl")
    model = llama(LlamaForSequenceClassification, num_labels=1)
    return {"cls": trl.RewardTrainer, "kind": trl.RewardConfig, "data": preferences(32), "model": model}


def kto(folder):
    trl = pytest.importorskip("trl")
    pairs = preferences(22)
    completions, labels = pairs["chosen"] + pairs["rejected"], [True] * 22 + [False] * 22
    data = {"prompt": pairs["prompt"] * 2, "completion": completions, "label": labels}
    return {"cls": trl.KTOTrainer, "kind": trl.KTOConfig, "data": data, "model": saved_llama(folder)}


def grpo(folder):
    trl = pytest.importorskip("trl")

    def many_ones(completions, **kwargs):
        return [float(text.split().count("one")) for text in completions]

    options = {"num_generations": 4, "max_completion_length": 8, "max_steps": 44, "max_length": None}
    data = {"prompt": preferences(32)["prompt"]}
    extra = {"reward_funcs": many_ones}
    return {"cls": trl.GRPOTrainer, "kind": trl.GRPOConfig, "data": data, "model": llama(), "extra": extra, **options}


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


def sentence_transformers(folder):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import losses

    model, first = sentence_model(folder), sentences(44)
    second = first[1:] + first[:1]
    alike = [len(set(a.split()) & set(b.split())) / 6 for a, b in zip(first, second, strict=True)]
    return {
        "cls": library.SentenceTransformerTrainer, "kind": library.SentenceTransformerTrainingArguments,
        "data": {"sentence1": first, "sentence2": second, "score": alike}, "model": model, "max_length": None,
        "extra": {"processing_class": None, "loss": losses.CosineSimilarityLoss(model)},
    }  # fmt: skip


def train(folder, optimizer, windows, updates, cls, model, data, extra=None, **changes):
    """44 rows: 11 batches, or five windows of 2 of them and one of 1; four epochs."""
    changes = {"max_length": 32, "num_train_epochs": 4, "lr_scheduler_type": "linear", **changes}
    changes = {key: value for key, value in changes.items() if value is not None}
    trainer = make_trainer(
        folder, optimizer, cls=type(cls.__name__, (Watched, cls), {}), model=lambda dropout: model,
        data=Dataset.from_dict(data) if isinstance(data, dict) else data,
        extra={"processing_class": tokenizer(), **(extra or {})}, gradient_accumulation_steps=windows, **changes,
    )  # fmt: skip
    trainer.train()
    check(trainer, optimizer, updates)
    return trainer


def lora(folder):
    peft = pytest.importorskip("peft")
    words, modules = tokenizer(), ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    return {
        "cls": Trainer, "data": [{"input_ids": words(text)["input_ids"]} for text in sentences(44)],
        "model": peft.get_peft_model(llama(), config), "max_length": None,
        "extra": {"data_collator": DataCollatorForLanguageModeling(words, mlm=False)},
    }  # fmt: skip


LOWER = {"learning_rate": 1e-2}
CASES = {
    "sft": (sft, 1, {}), "sft, accumulation": (sft, 2, {}),
    "sft, stream": (functools.partial(sft, stream=True), 1, {"max_steps": 44}),
    "sft, stream, accumulation": (functools.partial(sft, stream=True), 2, {"max_steps": 24}),
    "dpo": (dpo, 1, LOWER), "reward": (reward, 1, LOWER), "kto": (kto, 1, LOWER), "grpo": (grpo, 1, LOWER),
    "peft's lora": (lora, 1, {}), "peft's lora, accumulation": (lora, 2, {}),
    "sentence-transformers": (sentence_transformers, 1, {"learning_rate": 5e-3}),
    "sentence-transformers, accumulation": (sentence_transformers, 2, {"learning_rate": 5e-3}),
}  # fmt: skip


@OURS
@pytest.mark.parametrize("case", CASES)
def test_trainers_of_other_libraries(case, optimizer, tmp_path):
    make, windows, changes = CASES[case]
    updates = 32 if make is reward else {1: 44, 2: 24}[windows]
    trainer = train(tmp_path, optimizer, windows, updates, **make(tmp_path), **changes)
    if make is not grpo:  # whose loss is no measure
        check_learning(trainer)
    if make is lora:
        after = trainer.model.get_base_model().state_dict()
        kept = {name.replace(".base_layer", ""): value for name, value in after.items()}
        assert all(torch.equal(kept[name], value) for name, value in llama().state_dict().items())
        assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)


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
