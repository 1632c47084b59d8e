# SPDX-License-Identifier: Apache-2.0
"""NSF in Python's own floats, one coordinate at a time, written from METHOD.md and from none of the package's code.

raw: arXiv 2509.04713. adam: the same direction with the length of Adam's step (layer-wise grafting, arXiv 2002.11803).
"""

import math


def power(base, exponent):
    """`base ** exponent` for base >= 0, with 0 ** negative = infinity."""
    return math.inf if base == 0.0 and exponent < 0 else base**exponent


def _moments(grads, beta1, beta2):
    """Yield m_hat and v_hat, two lists over the coordinates, for every update."""
    m, v = [0.0] * len(grads[0]), [0.0] * len(grads[0])
    for t, g in enumerate(grads, start=1):
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g, strict=True)]
        yield [a / (1 - beta1**t) for a in m], [a / (1 - beta2**t) for a in v]


def nsf_raw_reference(theta, grads, p, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """`theta - eta m_hat / (v_hat^p + eps)` after decoupled decay; `p` is a list with one exponent for each update."""
    theta = list(theta)
    for p_t, (m_hat, v_hat) in zip(p, _moments(grads, *betas), strict=True):
        theta = [x * (1 - lr * weight_decay) for x in theta]
        theta = [x - lr * m / (power(v, p_t) + eps) for x, m, v in zip(theta, m_hat, v_hat, strict=True)]
    return theta


def adam_scaled_step(m_hat, v_hat, p, eps):
    """`s u` of METHOD.md for one parameter tensor."""
    d = [math.sqrt(v) + eps for v in v_hat]
    u = [m * power(x, -2 * p) if m else 0.0 for m, x in zip(m_hat, d, strict=True)]
    adam = [m / x if m else 0.0 for m, x in zip(m_hat, d, strict=True)]
    length = math.hypot(*u)
    s = math.hypot(*adam) / length if length else 1.0
    return [s * x for x in u]


def nsf_adam_scaled_reference(theta, grads, p, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """`theta - eta s u` after decoupled decay, for ONE parameter tensor; `p` has one exponent for each update."""
    theta = list(theta)
    for p_t, (m_hat, v_hat) in zip(p, _moments(grads, *betas), strict=True):
        theta = [x * (1 - lr * weight_decay) for x in theta]
        theta = [x - lr * y for x, y in zip(theta, adam_scaled_step(m_hat, v_hat, p_t, eps), strict=True)]
    return theta


def adam_step_length(grads, betas=(0.9, 0.999), eps=1e-8):
    """The 2-norm of Adam's step (without lr) at every update."""
    return [
        math.hypot(*(m / (math.sqrt(v) + eps) if m else 0.0 for m, v in zip(m_hat, v_hat, strict=True)))
        for m_hat, v_hat in _moments(grads, *betas)
    ]


REFERENCES = {"raw": nsf_raw_reference, "adam": nsf_adam_scaled_reference}
