# SPDX-License-Identifier: Apache-2.0
"""The two optimizers. They only read their momentum and exponent; `hf_nsf.control` writes them."""

from .lcam import LCAM
from .nsf import NSF

__all__ = ["LCAM", "NSF"]
