# SPDX-License-Identifier: Apache-2.0
"""Hear the loss of each update from a Trainer's public methods, and find out whether short windows can be compared.

It uses no private name of transformers and stands before the methods of one trainer only while that trains.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from .callback import SpectralCallback

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def _as_in_evaluation(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and random numbers are as before.

    The flags are set one by one: a `train` of the model's own may do more, and frozen layers keep theirs.
    """
    devices = {p.device for p in model.parameters()}
    devices = {device for device in devices if device.type not in ("cpu", "meta", "mps")}
    kind = next(iter(devices)).type if devices else "cpu"
    # Nothing is compiled for this alone (torch 2.4 and 2.5 cannot be told so).
    set_stance = getattr(torch.compiler, "set_stance", None)
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        with (
            torch.no_grad(),
            torch.random.fork_rng([device.index for device in devices], device_type=kind),
            set_stance("force_eager") if set_stance is not None else contextlib.nullcontext(),
        ):
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _copied(value: Any) -> Any:
    """Containers copied to their depth, what they hold not."""
    if not isinstance(value, (dict, list, set, collections.deque)):
        return value
    twin = copy.copy(value)
    if isinstance(twin, (dict, list)):
        for key in list(twin) if isinstance(twin, dict) else range(len(twin)):
            twin[key] = _copied(twin[key])
    return twin


def _stand_in(trainer: Trainer) -> Any:
    """A copy of a trainer to ask instead: what a subclass's `compute_loss` counts, lists or logs is lost with it."""
    twin: Any = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if not name.endswith("dataset"):
            twin.__dict__[name] = _copied(value)
    twin.__dict__["log"] = lambda *args, **kwargs: None
    return twin


class LossListener:
    """Hears what `training_step` and `compute_loss` of one trainer return, and can ask the latter again.

    The sum of an accumulation window's losses is an average, whatever the number of its micro-batches, where the
    Trainer divides by that number, or the loss by the number of items in the window (`num_items_in_batch`). Whether a
    model that is offered the latter uses it cannot be seen from outside, so :meth:`windows_average` tries it: with
    twice the number the loss must be half. For that, the last micro-batch of a window with fewer of them is kept until
    the next one.
    """

    def __init__(self, trainer: Trainer, callback: SpectralCallback) -> None:
        self._trainer: Any = trainer
        self._callback = callback
        self._training_step: Any = trainer.training_step  # bound, the most derived ones
        self._compute_loss: Any = trainer.compute_loss
        self._call: tuple[Any, Any, Any, torch.Tensor] | None = None  # model, inputs, number of items, loss
        self._returned: Any = None
        own = vars(trainer)
        self._own = {name: own[name] for name in ("training_step", "compute_loss") if name in own}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Stand before the trainer's methods, on the instance."""
        training_step, compute_loss = self._training_step, self._compute_loss

        @functools.wraps(training_step)
        def heard_step(*args: Any, **kwargs: Any) -> Any:
            self._call = None
            self._returned = training_step(*args, **kwargs)
            self._callback.observe(self._returned)
            return self._returned

        @functools.wraps(compute_loss)
        def heard_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not (self._callback.compares_losses and self._in_short_window()):
                return compute_loss(model, inputs, *args, **kwargs)
            kept = copy.copy(inputs)  # labels may be taken out of it
            result = compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            items = kwargs["num_items_in_batch"] if "num_items_in_batch" in kwargs else (*args, None, None)[1]
            self._call = model, kept, items, loss.detach().mean().clone()
            return result

        vars(self._trainer).update(training_step=heard_step, compute_loss=heard_loss)
        self._callback.windows_average = self.windows_average
        try:
            yield
        finally:
            for name in ("training_step", "compute_loss"):
                vars(self._trainer).pop(name, None)
            vars(self._trainer).update(self._own)
            self._callback.windows_average = None
            self._call = self._returned = None

    def _in_short_window(self) -> bool:
        usual = self._trainer.args.gradient_accumulation_steps
        return getattr(self._trainer, "current_gradient_accumulation_steps", usual) < usual

    def windows_average(self) -> bool | None:
        """Whether windows of any length have comparable losses; None if this micro-batch cannot tell.

        All processes make the same forward passes here, whatever their losses are.
        """
        trainer, call, returned = self._trainer, self._call, self._returned
        if call is None:  # this training_step has another source of its loss
            return False
        model, _, items, loss = call
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5.19 and newer
        scaled = declared
        if scaled is None:
            scaled = trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and items is not None)
        probed = None
        if scaled and declared is None:
            # Where a sequence is shared out, the inputs are whole only inside training_step.
            if items is None or getattr(trainer.accelerator, "parallelism_config", None) is not None:
                return False
            if isinstance(model, torch.nn.parallel.DistributedDataParallel):
                model = model.module
            try:
                probed = self._loss(model, items), self._loss(model, 2 * items)
            except Exception as error:  # a question must not end a training
                logger.warning(f"A shorter accumulation window takes no part in LCAM's decision: {error!r}")
                return None
        expected = loss if scaled else loss / trainer.current_gradient_accumulation_steps
        if not torch.isfinite(loss):
            return None
        if not torch.allclose(torch.as_tensor(returned).detach().mean().to(expected), expected):
            return False  # this training_step makes another loss of it
        if probed is None:
            return True
        once, twice = probed
        if not (math.isfinite(once) and math.isfinite(twice)) or once == 0:
            return None
        return math.isclose(once, 2 * twice, rel_tol=1e-3)

    def _loss(self, model: Any, items: Any) -> float:
        assert self._call is not None
        inputs = copy.copy(self._call[1])
        twin = _stand_in(self._trainer)
        own = getattr(self._compute_loss, "__self__", None) is self._trainer
        compute_loss = functools.partial(self._compute_loss.__func__, twin) if own else self._compute_loss
        with _as_in_evaluation(model), twin.compute_loss_context_manager():
            return float(compute_loss(model, inputs, num_items_in_batch=items).mean())
