# SPDX-License-Identifier: Apache-2.0
"""LCAM as a plain script: torch's SGD whose momentum is set by hand in the loop (arXiv 2309.02130)."""

import torch


def train_by_hand(model, loss_function, epochs, low, high, lr, **sgd_options):
    """Train `model` on `epochs`, a list of lists of batches; return the momentum used and the loss of every update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=high, **sgd_options)
    momenta, losses = [], []
    for batches in epochs:
        running = 0.0
        for i, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            momenta.append(optimizer.param_groups[0]["momentum"])
            optimizer.step()
            losses.append(loss.item())
            running += loss.item()
            average = running / (i + 1)
            for group in optimizer.param_groups:
                group["momentum"] = low if loss.item() < average else high
    return momenta, losses


def sgd_by_formula(theta, grads, momenta, lr, weight_decay=0.0):
    """`buf <- mu buf + (g + lambda theta)`, `theta <- theta - eta buf` for one number."""
    buf = 0.0
    for g, mu in zip(grads, momenta, strict=True):
        buf = mu * buf + (g + weight_decay * theta)
        theta -= lr * buf
    return theta
