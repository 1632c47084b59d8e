# SPDX-License-Identifier: Apache-2.0
"""Choice of the implementation that steps a tensor, and the proof that kernels must pass before they are used.

`cpu` (numba) and `gpu` (Triton) offer the same functions as :mod:`hf_nsf.optim.nsf_update`. They are imported when they
are first needed, as numba and Triton may be missing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import nsf_update
from ..nsf_update import Bucket, Row, Scalars

MODULES = {"cpu": "cpu", "cuda": "gpu"}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
PLAIN = (Tensor, torch.nn.Parameter)


class Implementation(NamedTuple):
    """The functions of :mod:`hf_nsf.optim.nsf_update`, or others that make the same steps."""

    update_moments: Callable[[Bucket], None]
    apply_update: Callable[[Bucket], None]
    whole_step: Callable[[Bucket], None]


def _torch_adamw(b: Bucket) -> None:
    """Make the step of torch's fused AdamW, for p = 1/2. It increments the step counters itself."""
    s = b.scalars
    betas: dict[str, Any] = {"beta1": s.beta1, "beta2": s.beta2, "amsgrad": False, "fused": True}
    options: dict[str, Any] = {"lr": s.lr, "weight_decay": s.weight_decay, "eps": s.eps, "maximize": s.maximize}
    adamw(b.params, b.grads, b.exp_avgs, b.exp_avg_sqs, [], b.steps, **betas, **options)


EAGER = Implementation(nsf_update.update_moments, nsf_update.apply_update, nsf_update.whole_step)
REFERENCE = Implementation._make(functools.partial(function, numel=None) for function in EAGER)
TORCH = Implementation(nsf_update.update_moments, nsf_update.apply_update, _torch_adamw)


def choose(group: dict[str, Any], s: Scalars, row: Row) -> Implementation:
    """The fastest implementation that is right for a tensor, or the one that the group asks for.

    Args:
        group: the parameter group.
        s: the step.
        row: parameter, gradient, m, v and, if there is one, the Kahan sum.
    """
    foreach, fused = group["foreach"], group["fused"]
    if not fused and (foreach is False or type(row[0]) not in PLAIN):
        return REFERENCE
    if foreach or fused is False:
        return EAGER
    param, grad, *states = row
    why = "they take tensors without gaps in memory, a gradient of their dtype, and gradient and state of their layout"
    if grad.dtype == param.dtype and same_dense_layout(param, grad, *states):
        # torch's kernel divides 0 by 0 with eps = 0.
        if s.p == 0.5 and s.eps > 0 and param.is_cpu and param.dtype in (torch.float32, torch.float64):
            return TORCH
        kernels, why = kernels_for(param.device, param.dtype, len(row) == 5)
        if kernels:
            return kernels
    if fused:
        raise RuntimeError(_no_kernels(param, why))
    return EAGER


def check_fused(param: Tensor) -> None:
    """Raise ValueError if no kernels can step this parameter. One on the meta device is judged when it is stepped."""
    if param.is_meta:
        return
    kernels, why = kernels_for(param.device, param.dtype, param.dtype != torch.float32)
    if kernels is None:
        raise ValueError(_no_kernels(param, why))


def _no_kernels(param: Tensor, why: str) -> str:
    return (
        f"Invalid fused: fused=True with a {param.dtype} parameter of shape {tuple(param.shape)} on {param.device} has "
        f"no kernels: {why}; allowed here: fused=None or False."
    )


def same_dense_layout(first: Tensor, *others: Tensor) -> bool:
    """Whether these tensors of equal shape are plain and of one memory layout without gaps.

    The layout may be any, such as `torch.channels_last`: the step is elementwise. Kernels that walk through memory
    (torch's fused ones on a CPU, ours) read the wrong elements of other tensors without an error.
    """
    if type(first) not in PLAIN:
        return False
    contiguous, device, strided = first.is_contiguous(), first.device, torch.strided
    for other in others:
        if type(other) not in PLAIN or other.layout is not strided or other.device != device:
            return False
        if other.is_contiguous() is not contiguous:
            return False
        if other.is_neg() or other._is_zerotensor():  # its memory holds other numbers, or there is none
            return False
    return contiguous or (_is_dense(first) and all(other.stride() == first.stride() for other in others))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their part of memory, in some order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


@functools.cache
def kernels_for(device: torch.device, dtype: torch.dtype, kahan: bool) -> tuple[Implementation | None, str]:
    """Kernels for a kind of tensor, proved when they are first asked for; or None, and the reason."""
    if dtype not in DTYPES.get(device.type, ()):
        return None, f"there are none for {dtype} on {device.type}"
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        return None, "TRITON_INTERPRET=1 makes Triton slower than the eager functions"
    try:
        module = importlib.import_module(f"{__name__}.{MODULES[device.type]}")
        kernels = Implementation(module.update_moments, module.apply_update, module.whole_step)
        fault = find_fault(kernels, module.CHUNK, device, dtype, kahan)
    except ModuleNotFoundError as error:
        return None, f'{error} (numba for a CPU: pip install "hf_nsf[fused]")'
    except Exception as error:  # of a compiler or a driver: the eager functions need neither
        fault = repr(error)
    if not fault:
        return kernels, ""
    warnings.warn(
        f"NSF's kernels for {dtype} on {device} failed their test and are not used: {fault}. NSF steps with eager "
        "functions, which are slower.",
        stacklevel=2,
    )
    return None, f"they failed their test: {fault}"


def find_fault(kernels: Implementation, chunk: int, device: torch.device, dtype: torch.dtype, kahan: bool) -> str:
    """Make two steps of small tensors with kernels and with the eager functions; describe a difference, "" if none.

    The tensors have no element, one, and more than a chunk, on and off alignment.
    """
    random = torch.Generator("cpu").manual_seed(0)

    def tensors(scale: float, dtype: torch.dtype) -> list[Tensor]:
        sizes = (0, 1, chunk + 5, chunk + 5)
        drawn = [scale * torch.randn(n, generator=random, device="cpu", dtype=torch.float32) for n in sizes]
        *others, last = [tensor.to(device, dtype) for tensor in drawn]
        return [*others, last[1:]]

    ours = []
    for p, grafting in ((0.25, "adam"), (-0.5, "adam"), (0.25, "none"), (0.5, "adam")):
        s = Scalars(p, 0.5, 0.9, 0.999, 1e-8, 0.1, False, grafting, t=1)
        m, v = tensors(0, torch.float32), tensors(0, torch.float32)
        comps = tensors(0, dtype) if kahan else None
        ours.append(Bucket(s, [], tensors(1, dtype), tensors(1, dtype), m, v, comps))
    theirs = copy.deepcopy(ours)
    for t in (1, 2):
        for bucket, other in zip(ours, theirs, strict=True):
            bucket.grads = tensors(1, dtype)
            other.grads = copy.deepcopy(bucket.grads)
            for functions, each in ((kernels, bucket), (EAGER, other)):
                each.scalars = dataclasses.replace(each.scalars, t=t)
                if each.scalars.needs_norms:
                    functions.update_moments(each)
                    functions.apply_update(each)
                else:
                    functions.whole_step(each)
    close = 1e-4 if kahan else max(1e-5, 2 * torch.finfo(dtype).eps)
    for bucket, other in zip(ours, theirs, strict=True):
        for name, bound in (("exp_avgs", 1e-6), ("exp_avg_sqs", 1e-6), ("params", close)):
            for x, y in zip(_values(bucket, name), _values(other, name), strict=True):
                distance, size = (q.norm(torch.inf).item() if len(q) else 0.0 for q in (x - y, y))
                if not distance <= bound * max(size, 1.0):  # true for a NaN
                    s = bucket.scalars
                    return f"{name} of {len(x)} elements differ by {distance:.2g} (p={s.p}, grafting={s.grafting})"
    return ""


def _values(bucket: Bucket, name: str) -> list[Tensor]:
    """Tensors of a bucket in float32; the parameters with their Kahan sums."""
    values = [tensor.float() for tensor in getattr(bucket, name)]
    if name == "params" and bucket.kahan_comps is not None:
        values = [value + comp.float() for value, comp in zip(values, bucket.kahan_comps, strict=True)]
    return values
