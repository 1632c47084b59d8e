# SPDX-License-Identifier: Apache-2.0
"""`optim_args` is read strictly: each mistake ends in one sentence before training starts."""

import pytest

from hf_nsf.trainer.options import parse_optim_args

GOOD = [
    ("lcam", None, {}, {}),
    ("lcam", " low_loss_momentum = 0.95 , nesterov=TRUE", {"low_loss_momentum": 0.95, "nesterov": True}, {}),
    ("lcam", "loss_average=ema,loss_ema_decay=0.9", {}, {"loss_average": "ema", "loss_ema_decay": 0.9}),
    ("nsf", "p=-0.25,foreach=false", {"foreach": False}, {"p": -0.25}),
    ("nsf", "p_min=-0.25,p_max=0.5,cycles=8,cycle_shape=square,step_scale=raw", {"step_scale": "raw"},
     {"p_min": -0.25, "p_max": 0.5, "cycles": 8.0, "cycle_shape": "square"}),
    ("nsf", "cycle_steps=50", {}, {"cycle_steps": 50.0}),
    ("nsf", "kahan=false,fused=false", {"kahan": False, "fused": False}, {}),
    ("lcam", "kahan=true", {"kahan": True}, {}),
]  # fmt: skip

BAD = [
    ("lcam", "low_loss_momentun=0.9", ["low_loss_momentun", "0.9", "did you mean 'low_loss_momentum'"]),
    ("nsf", "p_mni=0", ["p_mni", "did you mean 'p_min'"]),
    ("nsf", "betas=(0.9,0.99)", ["betas", "Allowed"]),
    ("nsf", "p=0.1,p=0.2", ["Repeated", "'p'", "0.2"]),
    ("nsf", "p", ["'p'", "key=value"]),
    ("nsf", "p=", ["'p='", "key=value"]),
    ("nsf", "p=0.5,", ["Empty entry", "comma"]),
    ("nsf", "p=abc", ["p=abc", "finite number"]),
    ("nsf", "p=nan", ["p=nan", "finite number"]),
    ("nsf", "p_max=inf", ["p_max=inf", "finite number"]),
    ("lcam", "nesterov=yes", ["nesterov=yes", "true or false"]),
    ("lcam", "low_loss_momentum=1.0", ["low_loss_momentum=1.0", "[0, 1)"]),
    ("lcam", "high_loss_momentum=-0.1", ["high_loss_momentum=-0.1", "[0, 1)"]),
    ("lcam", "loss_average=mean", ["loss_average='mean'", "epoch, ema"]),
    ("lcam", "loss_ema_decay=0.9", ["loss_ema_decay=0.9", "loss_average=ema"]),
    ("lcam", "loss_average=ema,loss_ema_decay=1.0", ["loss_ema_decay=1.0", "[0, 1)"]),
    ("lcam", "foreach=true,fused=true", ["foreach", "fused"]),
    ("nsf", "p_min=0.6", ["p_min=0.6", "p_max=0.5", "p_min <= p_max"]),
    ("nsf", "cycles=4,cycle_steps=10", ["cycles=4.0", "cycle_steps=10.0"]),
    ("nsf", "cycles=0", ["cycles=0.0", "> 0"]),
    ("nsf", "cycle_steps=-3", ["cycle_steps=-3.0", "> 0"]),
    ("nsf", "p=0.5,cycles=4", ["cycles=4.0", "constant p=0.5"]),
    ("nsf", "p=0.5,cycle_shape=cosine", ["cycle_shape", "constant p"]),
    ("nsf", "cycle_shape=sine", ["cycle_shape='sine'", "cosine, triangular, sawtooth, square"]),
    ("nsf", "step_scale=big", ["step_scale='big'", "adam, raw"]),
    ("nsf", "foreach=true,fused=true", ["fused=True", "at most one"]),
    ("lcam", "kahan=true,fused=true", ["kahan=True", "fused=True", "at most one"]),
    ("nsf", "kahan=1", ["kahan=1", "true or false"]),
]


@pytest.mark.parametrize(("optim", "text", "of_optimizer", "of_controller"), GOOD)
def test_good_options(optim, text, of_optimizer, of_controller):
    assert parse_optim_args(optim, text) == (of_optimizer, of_controller)


@pytest.mark.parametrize(("optim", "text", "words"), BAD, ids=[b[1] for b in BAD])
def test_bad_options_are_refused_with_one_sentence(optim, text, words):
    with pytest.raises(ValueError) as error:
        parse_optim_args(optim, text)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
