# SPDX-License-Identifier: Apache-2.0
"""LCAM and NSF for Hugging Face's Trainer: importing this package registers `optim="lcam"` and `optim="nsf"`."""

from .optim import LCAM, NSF, LossPhase, p_schedule
from .trainer import PhaseCallback, register, unregister

__version__ = "0.1.0"
__all__ = ["LCAM", "NSF", "LossPhase", "PhaseCallback", "p_schedule", "register", "unregister"]

register()
