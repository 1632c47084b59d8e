# SPDX-License-Identifier: Apache-2.0
"""Everything that reaches into transformers stands here, and :func:`unregister` takes it back.

transformers has no public hook for an optimizer's name or for the loss of an update, so we add two members to its enum
`OptimizerNames`, two entries to its table of handlers, one default callback, and a wrapper of the public
`Trainer.train`, which for its duration listens to what the trainer's own `training_step` and `compute_loss` return.
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
import transformers
from transformers import Trainer, TrainerCallback
from transformers import trainer as host_trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..optim import LCAM, NSF
from .agreement import check_same_run
from .callback import SpectralCallback, unwrap_optimizer
from .checkpoints import last_whole_checkpoint, optimizer_of_checkpoint
from .options import first_p, parse_optim_args

try:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
except ImportError:
    raise ImportError(
        f"hf_nsf works with transformers 5.2.0 and newer, found {transformers.__version__}: "
        "pip install --upgrade transformers"
    ) from None

logger = logging.get_logger(__name__)
_enum: Any = OptimizerNames  # the type checker knows nothing of an enum's private tables
_trainer: Any = Trainer


def _lcam_handler(context: Any) -> tuple[type[LCAM], dict[str, Any]]:
    of_optimizer, _ = parse_optim_args("lcam", context.args.optim_args)
    return LCAM, {**context.optimizer_kwargs, "weight_decay": context.args.weight_decay, **of_optimizer}


def _nsf_handler(context: Any) -> tuple[type[NSF], dict[str, Any]]:
    of_optimizer, of_cycle = parse_optim_args("nsf", context.args.optim_args)
    common = {**context.optimizer_kwargs, **context.adam_kwargs, "weight_decay": context.args.weight_decay}
    return NSF, {**common, "p": first_p(of_cycle), **of_optimizer}


_HANDLERS = {"lcam": _lcam_handler, "nsf": _nsf_handler}


def optimizer_name(value: str) -> OptimizerNames:
    """The enum's member of that value. Pickled members name this function, so that unpickling imports hf_nsf."""
    return OptimizerNames(value)


def _add_name(value: str) -> None:
    """Give the enum a real member: iteration, lookup, argparse's choices, pickle and JSON then work by themselves."""
    if value in _enum._value2member_map_:
        return
    name = value.upper()
    member: Any = str.__new__(_enum, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = _enum
    member._sort_order_ = len(_enum._member_names_)
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (value,))
    _enum._member_names_.append(name)
    _enum._member_map_[name] = member
    _enum._value2member_map_[value] = member
    if hasattr(_enum, "_hashable_values_"):  # newer Pythons: `in` looks here
        _enum._hashable_values_.append(value)
    type.__setattr__(_enum, name, member)


def _remove_name(value: str) -> None:
    if _enum._value2member_map_.pop(value, None) is None:
        return
    name = value.upper()
    _enum._member_names_.remove(name)
    del _enum._member_map_[name]
    if hasattr(_enum, "_hashable_values_"):
        _enum._hashable_values_.remove(value)
    type.__delattr__(_enum, name)


def _is_ours(callback: type[TrainerCallback] | TrainerCallback) -> bool:
    # By name: importlib.reload makes a second class of the same one.
    cls = callback if isinstance(callback, type) else type(callback)
    return any(base.__name__ == "SpectralCallback" for base in cls.__mro__)


def _optimizer_of_run(trainer: Trainer) -> str:
    """Name of the optimizer of a run: "lcam" or "nsf" however it was given, else a class or what `args.optim` says."""
    made: Any = unwrap_optimizer(trainer.optimizer)
    given = getattr(trainer, "optimizer_cls_and_kwargs", None)
    cls = type(made) if made is not None else given[0] if given else None
    for base, name in ((LCAM, "lcam"), (NSF, "nsf")):
        if isinstance(cls, type) and issubclass(cls, base):
            return name
    if cls is not None:
        return cls.__name__
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))


def _checked_checkpoint(trainer: Trainer, checkpoint: Any) -> Any:
    """The checkpoint to resume from: a whole one where the run asks for the last, and one of the same optimizer."""
    ours = _optimizer_of_run(trainer)
    if checkpoint is True and ours in _HANDLERS and trainer.args.output_dir:
        last, broken = last_whole_checkpoint(trainer.args.output_dir, trainer.args.world_size)
        if broken and last:
            logger.warning(f"The save of {', '.join(broken)} did not come to its end: resuming from {last}.")
        checkpoint = last or checkpoint  # without any, the Trainer says so itself
    folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
    if isinstance(folder, str):
        theirs = optimizer_of_checkpoint(folder)
        if theirs is not None and (theirs in _HANDLERS or ours in _HANDLERS) and theirs != ours:
            raise ValueError(
                f"{folder} holds the optimizer state of {theirs} and this run trains with {ours}: resume with the same "
                "optimizer, or start a new run from the checkpoint's weights."
            )
    return checkpoint


def _trains_together(trainer: Trainer) -> bool:
    """Whether this Trainer's process trains the same model as others, rather than one of its own beside them."""
    return trainer.args.world_size > 1 or bool(getattr(trainer, "is_deepspeed_enabled", False))


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


class _Listener:
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


def _listening(train: Any) -> Any:
    """`Trainer.train` with its losses handed to our callback."""

    @functools.wraps(train)
    def wrapper(self: Trainer, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        options: dict[str, Any] = {}
        problem: Exception | None = None
        try:
            if optim in _HANDLERS:  # here too, since the host's own parser fails on some texts with a bare error
                of_optimizer, of_controller = parse_optim_args(optim, self.args.optim_args)
                options = {**of_optimizer, **of_controller}
            if resume_from_checkpoint:
                resume_from_checkpoint = _checked_checkpoint(self, resume_from_checkpoint)
        except Exception as error:
            problem = error
        if _trains_together(self):
            name = _optimizer_of_run(self)
            check_same_run(name, name in _HANDLERS, options, problem)
        elif problem is not None:
            raise problem
        callback: Any = next((c for c in self.callback_handler.callbacks if _is_ours(c)), None)
        if callback is None:
            if optim in _HANDLERS:
                logger.warning(
                    f"optim={optim} without its SpectralCallback: momentum and p stay constant. "
                    "Put it back with trainer.add_callback(hf_nsf.SpectralCallback)."
                )
            return train(self, resume_from_checkpoint, *args, **kwargs)
        with _Listener(self, callback).listening():
            return train(self, resume_from_checkpoint, *args, **kwargs)

    wrapper._hf_nsf = True  # type: ignore[attr-defined]
    return wrapper


def register() -> None:
    """Make `optim="lcam"` and `optim="nsf"` known to transformers. Doing it again changes nothing."""
    for value, handler in _HANDLERS.items():
        _add_name(value)
        _OPTIMIZER_HANDLERS[OptimizerNames(value)] = handler
    host_trainer.DEFAULT_CALLBACKS[:] = [c for c in host_trainer.DEFAULT_CALLBACKS if not _is_ours(c)]
    host_trainer.DEFAULT_CALLBACKS.append(SpectralCallback)  # type: ignore[arg-type]
    if not hasattr(Trainer.train, "_hf_nsf"):
        _trainer.train = _listening(Trainer.train)


def unregister() -> None:
    """Restore transformers as it was before :func:`register`."""
    for value in _HANDLERS:
        _OPTIMIZER_HANDLERS.pop(value, None)
        _remove_name(value)
    host_trainer.DEFAULT_CALLBACKS[:] = [c for c in host_trainer.DEFAULT_CALLBACKS if not _is_ours(c)]
    if hasattr(Trainer.train, "_hf_nsf"):
        _trainer.train = _trainer.train.__wrapped__
