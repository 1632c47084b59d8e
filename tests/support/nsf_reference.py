# SPDX-License-Identifier: Apache-2.0
"""NSF in Python's own floats, one coordinate at a time; shares no code with the package.

grafting="none": arXiv 2509.04713. grafting="adam": its direction with the length of Adam's step (arXiv 2002.11803).
"""

import math


def power(base, exponent):
    """`base ** exponent` for base >= 0, with 0 ** negative = infinity."""
    return math.inf if base == 0.0 and exponent < 0 else base**exponent


def divide(m, d):
    """`m / d`, and 0 where there has been no gradient and eps = 0."""
    return m / d if d else 0.0


def plain_step(m_hat, v_hat, p, eps):
    """`m_hat / (v_hat^p + eps)`."""
    if p == 0.5:
        return [divide(m, math.sqrt(v) + eps) for m, v in zip(m_hat, v_hat, strict=True)]
    return [divide(m, power(v, p) + eps) for m, v in zip(m_hat, v_hat, strict=True)]


def grafted_step(m_hat, v_hat, p, eps):
    """`u ||a|| / ||u||` of one tensor, with `d = sqrt(v_hat) + eps`, `a = m_hat / d` and `u = a d^(1-2p)`."""
    d = [math.sqrt(v) + eps for v in v_hat]
    a = [divide(m, x) for m, x in zip(m_hat, d, strict=True)]
    u = [x * power(y, 1 - 2 * p) if x else 0.0 for x, y in zip(a, d, strict=True)]
    length = math.hypot(*u)
    return [x * math.hypot(*a) / length for x in u] if length else a


STEPS = {"none": plain_step, "adam": grafted_step}


def nsf_reference(theta, grads, exponents, grafting, *, lr, betas, eps, weight_decay, maximize=False):
    """One tensor, as a list of numbers, after an update for each list of `grads`, with an exponent for each."""
    m, v = [0.0] * len(theta), [0.0] * len(theta)
    b1, b2 = betas
    for t, (g, p) in enumerate(zip(grads, exponents, strict=True), start=1):
        g = [-x for x in g] if maximize else g
        m = [b1 * a + (1 - b1) * x for a, x in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * x * x for a, x in zip(v, g, strict=True)]
        step = STEPS[grafting]([x / (1 - b1**t) for x in m], [x / (1 - b2**t) for x in v], p, eps)
        theta = [(1 - lr * weight_decay) * x - lr * y for x, y in zip(theta, step, strict=True)]
    return theta
