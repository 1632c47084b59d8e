# SPDX-License-Identifier: Apache-2.0
"""The NSF step on a CPU as two compiled loops over all tensors (numba; the extra `fused`), for float32.

The first loop updates m and v and computes the directions u and, for the length of Adam's step, the sums of squares of
`m / d` and u; the second moves the parameters. Tensors go through both in batches that stay in cache. torch's threads
take one chunk after the other, whose sums are added in a fixed order: a step has the same bits with any number of them.
Only this module and `nsf_kernels.py` import numba, and `nsf.py` imports them only for a step that uses them.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import nsf_kernels as kernels
from .nsf_blocked import Scratch, count_step
from .nsf_kernels import holds_at
from .torch_threads import run_here, run_on_threads

__all__ = ["CompiledNSF", "Plan", "holds_at", "is_ready"]
logger = logging.getLogger(__name__)

CHUNK = 1 << 13  # elements of one piece of work
CHUNKS = 1 << 16  # about how many there may be before they are made larger: a plan needs 48 bytes for each
SHARES = 8  # portions of the chunks for each thread: one that is held up takes fewer of them
BATCH = 1 << 19  # elements of tensors that go through both loops together
LINE = 16  # elements of a cache line; each tensor's directions begin at a multiple of it
KEPT = 12 << 20  # elements whose directions are kept (48 MiB); those of what is beyond are computed twice


class Plan:
    """How tensors of given sizes are dealt to chunks and batches."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        chunk = CHUNK
        while sum(sizes) > CHUNKS * chunk:
            chunk *= 2
        counts = [-(-size // chunk) for size in sizes]
        self.owner = np.repeat(np.arange(len(sizes)), counts)
        starts = np.cumsum([0, *counts])
        self.lows = (np.arange(len(self.owner)) - starts[self.owner]) * chunk
        self.highs = np.minimum(self.lows + chunk, np.asarray(sizes, dtype=np.int64)[self.owner])
        batches, self.places, room = [0], np.full(len(self.owner), -1), 0
        self.scratch = 0
        for index, size in enumerate(sizes):
            if room and room + size > BATCH:
                batches.append(int(starts[index]))
                room = 0
            chunks = slice(int(starts[index]), int(starts[index + 1]))
            places = room + self.lows[chunks]
            self.places[chunks] = np.where(room + self.highs[chunks] <= KEPT, places, -1)
            room += -(-size // LINE) * LINE
            self.scratch = min(max(self.scratch, room), KEPT)
        self.batches = np.array([*batches, len(self.owner)])
        self.sums = np.zeros((len(self.owner), 2))


class CompiledNSF:
    """Steps lists of tensors and keeps the plans of the last sizes."""

    def __init__(self, scratch: Scratch) -> None:
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._scratch = scratch

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps, without the scratch."""
        plans = self._plans.values()
        return sum(x.nbytes for plan in plans for x in vars(plan).values() if isinstance(x, np.ndarray))

    def step(
        self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], lr: float, p: float
    ) -> None:
        """Step float32 parameters on the CPU, all contiguous, with the group's options.

        Args:
            params: parameters with gradients.
            states: their states.
            group: where betas, eps, weight_decay, step_scale and maximize stand.
            lr: learning rate.
            p: exponent.
        """
        count_step([state["step"] for state in states])
        work = [(q, q.grad, s["exp_avg"], s["exp_avg_sq"], s["step"]) for q, s in zip(params, states, strict=True)]
        work = [item for item in work if item[0].numel()]
        if not work:
            return
        sizes = tuple(item[0].numel() for item in work)
        plan = self._plans.get(sizes)
        if plan is None:
            if len(self._plans) > 3:  # gradients that come and go
                self._plans.clear()
            plan = self._plans[sizes] = Plan(sizes)
        *tensors, steps = zip(*work, strict=True)
        addresses = np.array([list(map(Tensor.data_ptr, some)) for some in tensors], dtype=np.int64)
        if not addresses.all():
            raise RuntimeError("NSF cannot step a parameter whose memory, or that of its gradient, has been freed.")
        t = np.array([step.item() for step in steps])
        b1, b2 = group["betas"]
        raw = group["step_scale"] == "raw"
        u = self._scratch.take("u", torch.float32, 0 if raw else plan.scratch)
        arrays = {
            **{name: getattr(plan, name) for name in ("owner", "lows", "highs", "places", "sums")},
            **dict(zip(("theta", "g", "m", "v"), addresses, strict=True)),
            "rates": -lr / (1 - b1**t),
            "root_c2s": (1 / np.sqrt(1 - b2**t)).astype(np.float32),
            "power": kernels.power_of(2 * p if raw else 1 - 2 * p),
            "u": u.numpy(),
        }
        numbers = {
            "sign": -1 if group["maximize"] else 1,
            "b1c": 1 - b1,
            "b2": b2,
            "b2c": 1 - b2,
            "eps": group["eps"],
            "kept": 1 - lr * group["weight_decay"],
            "times": {0.0: 1, -0.5: 2}.get(p, 0),
            "at_zero": 0 if p > 0 else 1 if p == 0 else np.inf,
            "at_infinity": np.inf if p > 0 else 1 if p == 0 else 0,
        }
        job = np.zeros(1, dtype=kernels.JOB)
        for name, value in numbers.items():
            job[name] = value
        for name, array in arrays.items():
            job[name] = array.ctypes.data
        job["next_at"] = job.ctypes.data  # of `next`, its first field
        if raw:
            _run(job, 0, len(plan.owner), kernels.raw)
        else:
            for first, last in zip(plan.batches[:-1], plan.batches[1:], strict=True):
                _run(job, first, last, kernels.grafted_first)
                _run(job, first, last, kernels.grafted_totals, run_here)
                _run(job, first, last, kernels.grafted_second)
        for param in tensors[0]:  # a later backward() through the old values must fail, as after any other step
            torch.autograd.graph.increment_version(param)


def _run(job: Any, first: int, last: int, function: Any, run: Any = run_on_threads) -> None:
    """Call a kernel for chunks first to last of a job."""
    job["next"], job["last"] = first, last
    job["run"] = -(-(last - first) // (SHARES * torch.get_num_threads()))
    run(kernels.kernel(function), job.ctypes.data)


@functools.cache
def is_ready(step_scale: str) -> bool:
    """Compile the loops of a step scale, once in a process; False where numba cannot."""
    theta = torch.zeros(1)
    theta.grad = torch.zeros(1)
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    group = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step_scale": step_scale, "maximize": False}
    start = time.perf_counter()
    try:
        CompiledNSF(Scratch()).step([theta], [state], group, lr=0.0, p=0.0)
    except Exception as error:  # whatever numba fails with, the other paths give the same steps
        logger.warning(f"NSF's loops do not compile here ({type(error).__name__}: {error}); other paths are used.")
        return False
    seconds = time.perf_counter() - start
    if seconds > 2:
        logger.warning(
            f"NSF compiled its step for this CPU in {seconds:.0f} s; later runs find it in numba's cache. "
            "fused=False does without."
        )
    return True
