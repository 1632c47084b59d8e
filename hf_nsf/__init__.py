# SPDX-License-Identifier: Apache-2.0
"""LCAM and NSF for Hugging Face's Trainer: importing this package registers `optim="lcam"` and `optim="nsf"`."""

import sys

__version__ = "0.1.0"
__all__ = ["LCAM", "NSF", "LossPhase", "PhaseCallback", "p_schedule", "register", "unregister"]

# `python -m hf_nsf` and its like import this package first, and need no transformers, whose import takes seconds.
# Python's argv[0] is "-m" until it has found the module.
_MODULE = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else None
if _MODULE not in ("hf_nsf", "hf_nsf.plots", "hf_nsf.compare"):
    from .optim import LCAM, NSF, LossPhase, p_schedule
    from .trainer import PhaseCallback, register, unregister

    register()
