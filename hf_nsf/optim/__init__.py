# SPDX-License-Identifier: Apache-2.0
"""The two optimizers, and the rules that set the momentum and the exponent. Needs torch only."""

from .lcam import LCAM
from .loss_phase import LossPhase
from .nsf import NSF
from .p_cycle import p_schedule

__all__ = ["LCAM", "NSF", "LossPhase", "p_schedule"]
