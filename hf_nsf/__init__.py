# SPDX-License-Identifier: Apache-2.0
"""LCAM and NSF for Hugging Face's Trainer: importing this package registers `optim="lcam"` and `optim="nsf"`."""

from .control import LossPhase, PCycle, p_schedule
from .optim import LCAM, NSF
from .trainer import SpectralCallback, register, unregister

__version__ = "0.1.0"
__all__ = ["LCAM", "NSF", "LossPhase", "PCycle", "SpectralCallback", "p_schedule", "register", "unregister"]

register()
