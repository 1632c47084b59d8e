# SPDX-License-Identifier: Apache-2.0
"""Parameters, random gradients and one small training problem, shared by the tests."""

import torch
from torch import nn

P_VALUES = (0.5, 0.25, 0.0, -0.25, -0.5, 1.0)
STEP_SCALES = ("adam", "raw")


def make_parameters(dtype=torch.float64, seed=0):
    """Matrix, vector, 0-dim, empty, channels-last, transposed and strided parameters with random values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [draw(5, 7), draw(3), draw(), draw(0), draw(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    tensors += [draw(6, 4).t(), draw(8, 6)[::2, ::3]]
    return [nn.Parameter(t) for t in tensors]


def set_gradients(params, generator, scale=1.0):
    """Give every parameter a random gradient; the same numbers for every dtype."""
    for q in params:
        q.grad = (scale * torch.randn(q.shape, generator=generator, dtype=torch.float64)).to(q.dtype)


def drive(optimizer, params, steps, seed=1, scale=1.0, skip=0):
    """Make updates `skip` to `steps` over the random gradients of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(steps):
        set_gradients(params, generator, scale)
        if index >= skip:
            optimizer.step()
    return params


def relative_error(ours, theirs):
    """Largest relative 2-norm of a difference, over tensors."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        if b.numel():
            worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-300)).item())
    return worst


def identical(ours, theirs):
    """Bit for bit the same, tensor by tensor."""
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True))


def classification_problem(seed, epochs=5, batches=12):
    """A small network and, for each epoch, shuffled mini-batches of a noisy task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * 8, 6, generator=generator)
    y = ((x[:, 0] * x[:, 1] + 0.3 * torch.randn(len(x), generator=generator)) > 0).long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    shuffled = []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).split(8)
        shuffled.append([(x[i], y[i]) for i in order])
    return model, shuffled
