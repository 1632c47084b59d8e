# SPDX-License-Identifier: Apache-2.0
"""All that changes transformers; :func:`unregister` undoes it.

transformers has no public hook for an optimizer's name or for the loss of an update, so we add two members to its enum
`OptimizerNames`, two entries to its table of handlers, one default callback, and a wrapper of `Trainer.training_step`
that hands the loss to this callback. All are looked up when they are used: modules may have been reloaded.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import transformers
from transformers.utils import logging

from ..optim import LCAM, NSF
from .callback import PhaseCallback, unwrap_optimizer
from .names import add_names, optimizer_name, remove_names
from .options import parse_optim_args

logger = logging.get_logger(__name__)


def _lcam_handler(context: Any) -> tuple[type[LCAM], dict[str, Any]]:
    args = context.args
    options = parse_optim_args("lcam", args.optim_args, args.device)
    return LCAM, {**context.optimizer_kwargs, "weight_decay": args.weight_decay, **options}


def _nsf_handler(context: Any) -> tuple[type[NSF], dict[str, Any]]:
    args = context.args
    options = parse_optim_args("nsf", args.optim_args, args.device)
    return NSF, {**context.optimizer_kwargs, **context.adam_kwargs, "weight_decay": args.weight_decay, **options}


_HANDLERS = {"lcam": _lcam_handler, "nsf": _nsf_handler}


def _host(name: str) -> Any:
    return importlib.import_module(f"transformers.{name}")


def _tables() -> tuple[Any, list[Any], dict[Any, Any]]:
    """The Trainer's module, the enum with the older ones that modules hold after a reload, and the handlers."""
    try:
        modules = [_host(name) for name in ("trainer", "training_args", "trainer_optimizer")]
        return modules[0], [module.OptimizerNames for module in modules], modules[0]._OPTIMIZER_HANDLERS
    except (AttributeError, ModuleNotFoundError):
        raise ImportError(
            f"hf_nsf works with transformers 5.2.0 and newer, found {transformers.__version__}: "
            "pip install --upgrade transformers"
        ) from None


def _without_ours(callbacks: list[Any]) -> list[Any]:
    # By name: importlib.reload makes a second class of the same one.
    return [callback for callback in callbacks if getattr(callback, "__name__", "") != PhaseCallback.__name__]


def _hearing(training_step: Any) -> Any:
    """`Trainer.training_step`, handing its loss to the trainer's PhaseCallback."""

    @functools.wraps(training_step)
    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        callback = PhaseCallback.of(self)
        if callback is not None:
            callback.observe(loss)
        elif isinstance(unwrap_optimizer(self.optimizer), (LCAM, NSF)):
            logger.warning_once(
                "This Trainer has no PhaseCallback: LCAM's momentum stays as it is, and NSF knows no total_steps. "
                "Put it back with trainer.add_callback(hf_nsf.PhaseCallback)."
            )
        return loss

    heard._hf_nsf = heard  # type: ignore[attr-defined]  # the wrapper of another's, with functools.wraps, has it too
    return heard


def register() -> None:
    """Make `optim="lcam"` and `optim="nsf"` known to transformers. Doing it again changes nothing."""
    host, enums, handlers = _tables()
    for enum in enums:
        add_names(enum)
    for value, handler in _HANDLERS.items():
        handlers[optimizer_name(value)] = handler
    host.DEFAULT_CALLBACKS[:] = [*_without_ours(host.DEFAULT_CALLBACKS), PhaseCallback]
    if not hasattr(host.Trainer.training_step, "_hf_nsf"):
        host.Trainer.training_step = _hearing(host.Trainer.training_step)


def unregister() -> None:
    """Restore transformers as it was before :func:`register`."""
    host, enums, handlers = _tables()
    for value in _HANDLERS:
        handlers.pop(value, None)
    for enum in enums:
        remove_names(enum)
    host.DEFAULT_CALLBACKS[:] = _without_ours(host.DEFAULT_CALLBACKS)
    training_step = host.Trainer.training_step
    if vars(training_step).get("_hf_nsf") is training_step:  # else another has wrapped ours, which then stays
        host.Trainer.training_step = training_step.__wrapped__
