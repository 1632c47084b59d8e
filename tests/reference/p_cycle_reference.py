# SPDX-License-Identifier: Apache-2.0
"""The p-cycle in exact rational arithmetic; only the cosine itself is rounded."""

import math
from fractions import Fraction


def p_reference(k, period, p_min, p_max, shape):
    """P at update index k for a rational period."""
    phi = (Fraction(k) % Fraction(period)) / Fraction(period)
    low, high = Fraction(p_min), Fraction(p_max)
    if shape == "cosine":
        return p_min + (p_max - p_min) * (1 + math.cos(2 * math.pi * float(phi))) / 2
    if shape == "triangular":
        weight = 1 - 2 * phi if phi < Fraction(1, 2) else 2 * phi - 1
    elif shape == "sawtooth":
        weight = 1 - phi
    elif shape == "square":
        weight = 1 if phi < Fraction(1, 2) else 0
    else:
        raise ValueError(shape)
    return float(low + (high - low) * weight)
