# SPDX-License-Identifier: Apache-2.0
"""`optim_args` is read strictly, by the constructors' signatures; an error is one sentence that shows the mistake."""

import inspect

import pytest

import hf_nsf
from hf_nsf.trainer.options import parse_optim_args, readers_of

GOOD = [
    ("lcam", None, {}),
    ("nsf", " \t", {}),
    ("lcam", " low_loss_momentum = 0.95 , nesterov=TRUE", {"low_loss_momentum": 0.95, "nesterov": True}),
    ("lcam", "loss_average=EMA,loss_ema_decay=.9", {"loss_average": "ema", "loss_ema_decay": 0.9}),
    ("nsf", "p=-2.5e-1,foreach=false", {"p": -0.25, "foreach": False}),
    ("nsf", "p_min=-0.25,p_max=+0.5,cycles=8,cycle_shape=square,grafting=none",
     {"p_min": -0.25, "p_max": 0.5, "cycles": 8.0, "cycle_shape": "square", "grafting": "none"}),
    ("nsf", "kahan_sum=false,fused=false", {"kahan_sum": False, "fused": False}),
    ("nsf", "p=None,p_min=null,p_max=0.75", {"p_max": 0.75}),
    ("lcam", "loss_ema_decay=None,foreach=NULL", {}),
    ("nsf", "grafting=None", {"grafting": "none"}),
]  # fmt: skip

BAD = [
    # Keys.
    ("lcam", "low_loss_momentun=0.9", ["low_loss_momentun", "0.9", "did you mean 'low_loss_momentum'"]),
    ("nsf", "p_mni=0", ["p_mni", "did you mean 'p_min'", "cycle_steps"]),
    ("nsf", "p_mni=None", ["p_mni", "did you mean 'p_min'"]),
    ("lcam", "p_min=0.1", ["optim=lcam", "p_min"]),
    ("nsf", "p=0.1,p=0.2", ["twice", "p=0.2"]),
    ("nsf", "p=None,p=0.2", ["twice", "p=0.2"]),
    # Set in TrainingArguments.
    ("nsf", "eps=1e-6", ["eps=1e-6", "set adam_epsilon in TrainingArguments"]),
    ("nsf", "betas=(0.9,0.99)", ["betas", "set adam_beta1 and adam_beta2 in TrainingArguments"]),
    ("lcam", "lr=0.1", ["lr=0.1", "set learning_rate in TrainingArguments"]),
    ("lcam", "weight_decay=0.1", ["set weight_decay in TrainingArguments"]),
    ("nsf", "total_steps=100", ["total_steps=100", "the Trainer sets it"]),
    ("lcam", "maximize=true", ["maximize=true", "minimizes"]),
    ("lcam", "eps=1e-6", ["'eps' (value 1e-6); allowed is"]),
    ("lcam", "kahan_sum=true", ["optim=lcam has no option 'kahan_sum'"]),
    # Form.
    ("nsf", "p", ["'p'", "key=value"]),
    ("nsf", "p=", ["'p='", "key=value"]),
    ("nsf", "=0.5", ["'=0.5'", "key=value"]),
    ("nsf", "p=0.5,", ["'' in 'p=0.5,'", "is a comma missing or extra?"]),
    ("nsf", "p_min=0.1 cycles=8", ["'p_min=0.1 cycles=8'", "is a comma missing"]),
    ("nsf", "p_min=0.1;cycles=8", ["'p_min=0.1;cycles=8'", "is a comma missing"]),
    ("nsf", {"p": 0.5}, ["is not a string"]),
    # Types.
    ("nsf", "p=abc", ["p=abc", "finite number"]),
    ("nsf", "p=nan", ["p=nan", "finite number"]),
    ("nsf", "p_max=1e999", ["p_max=1e999", "finite number"]),
    ("nsf", "cycles=1_0", ["cycles=1_0", "finite number"]),
    ("nsf", "cycles=１", ["cycles=１", "finite number"]),
    ("nsf", "p=none", ["p=none", "finite number"]),
    ("nsf", "cycles=true", ["cycles=true", "finite number"]),
    ("lcam", "nesterov=yes", ["nesterov=yes", "true or false"]),
    ("lcam", "nesterov=None", ["nesterov=None", "true or false"]),
    # Ranges and combinations, checked by the constructors.
    ("lcam", "low_loss_momentum=1.0", ["low_loss_momentum=1.0", "[0, 1)"]),
    ("nsf", "p_min=0.6", ["p_min=0.6", "p_max=0.5", "p_min <= p_max"]),
]


@pytest.mark.parametrize(("optim", "text", "options"), GOOD)
def test_good_options(optim, text, options):
    assert parse_optim_args(optim, text) == options


@pytest.mark.parametrize(("optim", "text", "words"), BAD, ids=[str(b[1]) for b in BAD])
def test_bad_options_are_refused_with_one_sentence(optim, text, words):
    with pytest.raises(ValueError) as error:
        parse_optim_args(optim, text)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{}=1", "p={}", "p=1{}=1", "cycle_shape={}", "p=0.5,,{}", "{}"])
def test_long_values_are_truncated(text):
    with pytest.raises(ValueError) as error:
        parse_optim_args("nsf", text.format("x" * 10_000))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("cls", [hf_nsf.LCAM, hf_nsf.NSF])
def test_every_constructor_argument_is_an_option_or_set_elsewhere(cls):
    elsewhere = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "total_steps"}
    assert set(readers_of(cls.__name__.lower())) == inspect.signature(cls).parameters.keys() - elsewhere
