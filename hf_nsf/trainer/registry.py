# SPDX-License-Identifier: Apache-2.0
"""All that changes transformers, or reaches into what is private there, stands here; :func:`unregister` undoes it.

transformers has no public hook for an optimizer's name or for the loss of an update, so we add two members to its enum
`OptimizerNames`, two entries to its table of handlers, one default callback, and a wrapper of the public
`Trainer.train`, which for its duration has a LossListener stand before the trainer's own methods.
"""

from __future__ import annotations

import functools
from typing import Any

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
from .loss_listener import LossListener
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
        last, broken = last_whole_checkpoint(trainer.args.output_dir)
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
        # A second one, of the user, would count every update twice: the last added is the one to stay.
        ours: list[Any] = [c for c in self.callback_handler.callbacks if _is_ours(c)]
        for other in ours[:-1]:
            self.remove_callback(other)
        callback = ours[-1] if ours else None
        if callback is None:
            if optim in _HANDLERS:
                logger.warning(
                    f"optim={optim} without its SpectralCallback: momentum and p stay constant. "
                    "Put it back with trainer.add_callback(hf_nsf.SpectralCallback)."
                )
            return train(self, resume_from_checkpoint, *args, **kwargs)
        with LossListener(self, callback).listening():
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
