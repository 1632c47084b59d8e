# SPDX-License-Identifier: Apache-2.0
"""Loading an optimizer's state: check that it fits; float32 states keep their dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Options of several optimizers: FSDP2 adds the options of the optimizer that saved a full checkpoint to ours.
_OPTIONS = {"grafting", "low_loss_momentum", "betas", "amsgrad", "dampening"}


def saved_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield each parameter and its entry in a state dict with the same groups."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(saved, params, strict=False):  # torch checks that the numbers of parameters agree
        state = state_dict["state"].get(index)
        if isinstance(state, dict):
            yield param, state


def load_state(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    key: str,
    names: tuple[str, ...],
    load: Callable[[Any], None],
    keep_dtype: bool = True,
) -> None:
    """Check that a state dict was saved by the same kind of optimizer, then load it by torch's `load`.

    Only the groups of this kind of optimizer have the option `key`. The states in `names` have their parameter's shape;
    `keep_dtype` keeps their dtype for low-precision parameters, where torch would cast them. The check runs after the
    user's pre-hooks, and the dtypes are restored before the user's post-hooks.

    Raises:
        ValueError: another optimizer saved the state, or the parameters had other shapes.
    """
    seen: dict[str, Any] = {}

    def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
        seen.update(state_dict)
        kind = type(optimizer).__name__
        others = _OPTIONS - optimizer.defaults.keys()
        if any(key not in group or others & group.keys() for group in state_dict["param_groups"]):
            raise ValueError(
                f"Invalid state for {kind}: it was saved by another optimizer, by the options in its groups; resume "
                f"with the optimizer that saved it, or start {kind} anew from the saved weights."
            )
        for param, state in saved_states(optimizer, state_dict):
            for name in names:
                value = state.get(name)
                if isinstance(value, Tensor) and value.shape != param.shape:
                    raise ValueError(
                        f"Invalid state for {kind}: {name} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(param.shape)}; allowed is the state of a model of the same shapes."
                    )

    def restore(optimizer: Optimizer) -> None:
        for param, state in saved_states(optimizer, seen):
            for name in names if keep_dtype and param.dtype in LOW_PRECISION else ():
                if isinstance(state.get(name), Tensor) and state[name].dtype != param.dtype:
                    value = state[name].detach().to(device=param.device, copy=True)
                    optimizer.state[param][name] = value

    hooks = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        load(state_dict)
    finally:
        for hook in hooks:
            hook.remove()
