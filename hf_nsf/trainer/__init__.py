# SPDX-License-Identifier: Apache-2.0
"""The door into Hugging Face's Trainer: names, options, and the callback that drives the controllers."""

from .callback import SpectralCallback
from .registry import register, unregister

__all__ = ["SpectralCallback", "register", "unregister"]
