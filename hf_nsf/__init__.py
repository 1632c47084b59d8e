# SPDX-License-Identifier: Apache-2.0
"""LCAM and NSF for Hugging Face's Trainer: importing this package registers `optim="lcam"` and `optim="nsf"`.

The import loads neither torch nor transformers. Public names are loaded on first access, and the optimizers are
registered when transformers' Trainer is imported, or at once if it has been imported already.
"""

import importlib

from . import _watch

__version__ = "0.1.0"
__all__ = ["LCAM", "NSF", "LossPhase", "PhaseCallback", "p_schedule", "register", "unregister"]

TYPE_CHECKING = False  # typing takes milliseconds to import, at every start of Python below the launcher
if TYPE_CHECKING:
    from .optim import LCAM, NSF, LossPhase, p_schedule
    from .trainer.callback import PhaseCallback
    from .trainer.registry import register, unregister
else:
    _TRAINER = {"PhaseCallback": "trainer.callback", "register": "trainer.registry", "unregister": "trainer.registry"}

    def __getattr__(name):
        if name in ("optim", "trainer"):
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_TRAINER.get(name, 'optim')}"), name)

    def __dir__():
        return sorted({*globals(), *__all__})


_watch.start()
