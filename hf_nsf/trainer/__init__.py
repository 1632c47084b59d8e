# SPDX-License-Identifier: Apache-2.0
"""What lets a Trainer use both optimizers by name: the names, their options, and the callback that hears losses."""

from .callback import PhaseCallback
from .registry import register, unregister

__all__ = ["PhaseCallback", "register", "unregister"]
