# SPDX-License-Identifier: Apache-2.0
"""All changes to transformers; :func:`unregister` undoes them.

transformers has no public hook for an optimizer's name or for the loss of an update, so we add two members to its enum
`OptimizerNames`, two entries to its table of handlers, a default callback that refuses bad options early, and a wrapper
of `Trainer.training_step` that passes the loss to the callback. All are looked up at each call, as modules may have
been reloaded.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import transformers

from ..optim import LCAM, NSF
from .callback import PhaseCallback, find_callback
from .names import add_names, optimizer_name, remove_names
from .options import parse_optim_args
from .save_state import SAVE_STATE, SaveState


def _options(context: Any, optim: str) -> dict[str, Any]:
    args = context.args
    options = parse_optim_args(optim, args.optim_args, args.device)
    return {**context.optimizer_kwargs, "weight_decay": args.weight_decay, **options}


def _lcam_handler(context: Any) -> tuple[type[LCAM], dict[str, Any]]:
    return LCAM, _options(context, "lcam")


def _nsf_handler(context: Any) -> tuple[type[NSF], dict[str, Any]]:
    return NSF, {**context.adam_kwargs, **_options(context, "nsf")}


_HANDLERS = {"lcam": _lcam_handler, "nsf": _nsf_handler}


def _tables() -> tuple[Any, list[Any], dict[Any, Any]]:
    """The Trainer's module, the enum with the older ones that modules hold after a reload, and the handlers."""
    names = ("trainer", "training_args", "trainer_optimizer")
    try:
        modules = [importlib.import_module(f"transformers.{name}") for name in names]
        return modules[0], [module.OptimizerNames for module in modules], modules[0]._OPTIMIZER_HANDLERS
    except (AttributeError, ModuleNotFoundError):
        raise ImportError(
            f"hf_nsf works with transformers 5.2.0 and newer, found {transformers.__version__}: "
            "pip install --upgrade transformers"
        ) from None


def _without_ours(callbacks: list[Any]) -> list[Any]:
    ours = {PhaseCallback.__name__, SaveState.__name__}  # by name: importlib.reload makes a second class
    return [callback for callback in callbacks if getattr(callback, "__name__", "") not in ours]


def _report_loss(training_step: Any) -> Any:
    """Wrap `Trainer.training_step`: add missing callbacks, and pass the loss to the PhaseCallback."""

    @functools.wraps(training_step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get(SAVE_STATE):
            find_callback(self, SaveState, add=True)
        callback = PhaseCallback.from_trainer(self)  # before the step, which may need NSF's total_steps
        before = callback and callback.micro_batches
        loss = training_step(self, *args, **kwargs)
        if callback is not None and callback.micro_batches == before:  # it was not called with this loss within
            callback.observe(loss)
        return loss

    wrapper._hf_nsf = wrapper  # type: ignore[attr-defined]  # functools.wraps copies it to wrappers around ours
    return wrapper


def register() -> None:
    """Make `optim="lcam"` and `optim="nsf"` known to transformers; idempotent."""
    host, enums, handlers = _tables()
    for enum in enums:
        add_names(enum)
    for value, handler in _HANDLERS.items():
        handlers[optimizer_name(value)] = handler
    ours = [PhaseCallback, SaveState] if os.environ.get(SAVE_STATE) else [PhaseCallback]
    host.DEFAULT_CALLBACKS[:] = [*_without_ours(host.DEFAULT_CALLBACKS), *ours]
    if not hasattr(host.Trainer.training_step, "_hf_nsf"):
        host.Trainer.training_step = _report_loss(host.Trainer.training_step)


def unregister() -> None:
    """Restore transformers as it was before :func:`register`."""
    host, enums, handlers = _tables()
    for value in _HANDLERS:
        handlers.pop(value, None)
    for enum in enums:
        remove_names(enum)
    host.DEFAULT_CALLBACKS[:] = _without_ours(host.DEFAULT_CALLBACKS)
    training_step = host.Trainer.training_step
    if vars(training_step).get("_hf_nsf") is training_step:  # otherwise another wrapper is around ours
        host.Trainer.training_step = training_step.__wrapped__
