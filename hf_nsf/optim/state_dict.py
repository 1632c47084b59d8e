# SPDX-License-Identifier: Apache-2.0
"""Loading an optimizer's state: the check that it fits, and float32 states that keep their dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .kahan import LOW_PRECISION

# Options of one optimizer or another: from a full checkpoint FSDP2 adds those of the optimizer that saved it to ours.
_OPTIONS = {"grafting", "low_loss_momentum", "betas", "amsgrad", "dampening"}


def saved_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Pairs of a parameter and its entry in a state dict of the same groups."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(saved, params, strict=False):  # torch refuses other numbers of them
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
    """Load a state dict of the same kind of optimizer, after checking that it fits.

    The checks see what load_state_dict hooks made of the dict, and post-hooks see the restored dtypes.

    Args:
        optimizer: what loads.
        state_dict: what to load.
        key: an option that stands in the groups of this kind of optimizer only.
        names: states of the shape of their parameter.
        load: torch's `load_state_dict`, bound.
        keep_dtype: keep the dtype of these states for low-precision parameters, where torch casts them.

    Raises:
        ValueError: the state is that of another optimizer, or of parameters of other shapes.
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
