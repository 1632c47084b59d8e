# SPDX-License-Identifier: Apache-2.0
"""The two controllers: what writes the optimizers' momentum and exponent between updates."""

from .loss_phase import LossPhase
from .p_cycle import PCycle, p_schedule

__all__ = ["LossPhase", "PCycle", "p_schedule"]
