# SPDX-License-Identifier: Apache-2.0
"""States of both optimizers: saved, loaded, copied, refused, and changed by others."""

import copy
import pickle

import pytest
import torch
from problems import CASES, MAKERS, NSF_CASES, PATHS, copies, drive, identical, make_parameters
from torch import nn

from hf_nsf import LossPhase

MOMENTS = {"nsf": ("exp_avg", "exp_avg_sq"), "lcam": ("momentum_buffer",)}


def parameters(dtype=torch.float32):
    return make_parameters(dtype, gaps=False)


def started(name, params, steps=3, **options):
    optimizer = MAKERS[name](params, **options)
    drive(optimizer, params, steps)
    return optimizer


def loaded(name, params, state):
    optimizer = MAKERS[name](params)
    optimizer.load_state_dict(copy.deepcopy(state))
    return optimizer


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_saved_copied_or_pickled_optimizer_continues_exactly(name, path, tmp_path):
    """Moments have NSF's float32 or, as in torch's SGD, the parameters' dtype."""
    for dtype in (torch.float32, torch.bfloat16) if (name, path) != ("lcam", "fused") else (torch.float32,):
        whole = parameters(dtype)
        started(name, whole, 12, **PATHS[path])
        for how in ("saved", "copied", "pickled"):
            params = parameters(dtype)
            first = started(name, params, 6, **PATHS[path])
            if how == "saved":
                torch.save(first.state_dict(), tmp_path / "state.pt")
                second = MAKERS[name](params, lr=7.0)
                second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
                assert second.param_groups[0]["lr"] == 1e-2  # a checkpoint restores options, as in torch
            else:
                second = copy.deepcopy(first) if how == "copied" else pickle.loads(pickle.dumps(first))
                params = second.param_groups[0]["params"]
            drive(second, params, 12, skip=6)
            assert identical(whole, params), (dtype, how)
            expected = torch.float32 if name == "nsf" else dtype
            assert all(second.state[q][moment].dtype == expected for q in params for moment in MOMENTS[name])


def test_the_state_of_another_optimizer_is_refused():
    """With ours added to the options of its groups, too (but SGD has none that LCAM lacks).

    FSDP2 does so with a full checkpoint.
    """
    makers = {**MAKERS, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    for saved, ours in (("adamw", "nsf"), ("sgd", "nsf"), ("lcam", "nsf"), ("sgd", "lcam"), ("nsf", "lcam")):
        theirs = parameters()
        other = makers[saved](theirs)
        drive(other, theirs, 1)
        optimizer = MAKERS[ours](parameters())
        before = copy.deepcopy(optimizer.state_dict())
        mixed = copy.deepcopy(other.state_dict())
        mixed["param_groups"][0] = {**optimizer.defaults, **mixed["param_groups"][0]}
        for state in (other.state_dict(), mixed)[: 1 if (saved, ours) == ("sgd", "lcam") else 2]:
            with pytest.raises(ValueError, match=rf"Invalid state for {ours.upper()}: .* saved by another optimizer"):
                optimizer.load_state_dict(state)
        assert optimizer.state_dict() == before


@pytest.mark.parametrize("name", MAKERS)
def test_states_of_another_shape_are_refused(name):
    """A larger vocabulary, for example."""
    small, large = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(40))
    optimizer = MAKERS[name]([large])
    with pytest.raises(ValueError, match=rf"{MOMENTS[name][0]} of shape \(5,\) for a parameter of shape \(40,\)"):
        optimizer.load_state_dict(started(name, [small]).state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nsf_starts_anew_where_a_state_is_empty_or_incomplete(dtype):
    """A wrapper such as schedule_free's may have put states of its own there before the first step."""
    for left in ((), ("step",), ("exp_avg", "exp_avg_sq"), ("step", "exp_avg")):
        params = parameters(dtype)
        state = copy.deepcopy(started("nsf", params).state_dict())
        kept = copy.deepcopy(state)
        state["state"][0] = {**{name: state["state"][0][name] for name in left}, "z": torch.ones(2)}
        del kept["state"][0]  # as of a parameter that had no gradient yet
        results = []
        for each in (state, kept):
            results.append(copies(params))
            optimizer = loaded("nsf", results[-1], each)
            drive(optimizer, results[-1], 2)
            assert [int(optimizer.state[q]["step"]) for q in results[-1][:2]] == [2, 5]
        assert identical(*results)


COUNTERS = {
    "int": lambda step: int(step), "float": lambda step: float(step), "int64": lambda step: step.long(),
    "float64": lambda step: step.double(), "one element": lambda step: step.reshape(1),
}  # fmt: skip


@pytest.mark.parametrize("kind", COUNTERS)
def test_counters_of_any_kind_are_loaded(kind):
    params = parameters()
    optimizer = started("nsf", params)
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["step"] = COUNTERS[kind](values["step"])
    other = copies(params)
    again = loaded("nsf", other, state)
    drive(optimizer, params, 2)
    drive(again, other, 2)
    assert identical(params, other) and {s["step"].item() for s in again.state.values()} == {5.0}


LATER = {
    "nsf": ("kahan_sum",),
    "lcam": ("nesterov", "maximize", "foreach", "loss_average", "loss_ema_decay", "loss_count", "loss_mean"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_options_that_a_state_lacks_are_the_constructors(name):
    """As in states saved by a version without them."""
    params = parameters()
    state = copy.deepcopy(started(name, params).state_dict())
    for option in LATER[name]:
        del state["param_groups"][0][option]
    optimizer = MAKERS[name](params, **({"kahan_sum": False} if name == "nsf" else {}))
    optimizer.load_state_dict(state)
    assert all(optimizer.param_groups[0][option] == optimizer.defaults[option] for option in LATER[name])
    drive(optimizer, params, 1)
    if name == "lcam":
        LossPhase(optimizer).step(1.0)


@pytest.mark.parametrize("name", MAKERS)
def test_load_state_dict_hooks_take_part(name):
    """A pre-hook may repair shapes and change moments; a post-hook sees the moments as they will be."""
    q, other = (nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)) for _ in range(2))
    state, moment, seen = copy.deepcopy(started(name, [q]).state_dict()), MOMENTS[name][0], []
    expected = state["state"][0][moment] + 1 / 1024
    state["state"][0][moment] = state["state"][0][moment].view(-1, 1)

    def repair(optimizer, state_dict):
        values = state_dict["state"][0]
        return {**state_dict, "state": {0: {**values, moment: values[moment].view(2, 3) + 1 / 1024}}}

    optimizer = MAKERS[name]([other])
    optimizer.register_load_state_dict_pre_hook(repair)
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(own.state[other][moment].clone()))
    optimizer.load_state_dict(state)
    for found in (*seen, optimizer.state[other][moment]):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert len(seen) == 1


@pytest.mark.parametrize("name", MAKERS)
def test_foreign_entries_in_the_state_are_kept(name):
    params = parameters()
    optimizer = started(name, params)
    optimizer.state["of others"] = 5
    other = loaded(name, params, optimizer.state_dict())
    assert other.state["of others"] == 5
    drive(pickle.loads(pickle.dumps(other)), params, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_moments_of_another_dtype_are_loaded(name):
    """NSF's continue in float32, those of torch's optimizers and of cast checkpoints too; LCAM's as in torch's SGD."""
    params = parameters(torch.bfloat16)
    state = copy.deepcopy(started(name, params).state_dict())
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for values in state["state"].values():
            values.update({moment: values[moment].to(dtype) for moment in MOMENTS[name]})
        results.append(copies(params))
        optimizer = loaded(name, results[-1], state)
        drive(optimizer, results[-1], 3)
        expected = torch.float32 if name == "nsf" else torch.bfloat16
        assert all(optimizer.state[q][moment].dtype == expected for q in results[-1] for moment in MOMENTS[name])
    assert identical(*results)


@pytest.mark.parametrize(("name", "path"), NSF_CASES)
def test_a_model_may_change_its_dtype_between_steps(name, path):
    """`model.to(dtype)` changes the parameters' data in place, under their states."""
    dtypes = [torch.bfloat16, torch.float32]
    dtypes += [torch.bfloat16] if path == "fused" else [torch.float16, torch.float32, torch.float64, torch.float32]
    params, exact = parameters(), parameters(torch.float64)
    optimizer, reference = MAKERS[name](params, **PATHS[path]), MAKERS[name](exact, foreach=False)
    for index, dtype in enumerate(dtypes):
        for q in params:
            q.data = q.data.to(dtype)
        for e, q in zip(exact, params, strict=True):
            e.data = q.data.double()
        drive(optimizer, params, index + 1, skip=index)
        drive(reference, exact, index + 1, skip=index)
        for e, q in zip(exact, params, strict=True):
            assert q.dtype == dtype and all(optimizer.state[q][m].dtype.itemsize >= 4 for m in MOMENTS[name])
            torch.testing.assert_close(q.detach().double(), e.detach(), rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_follows_the_default_device(name):
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for device in ("cpu", "meta"):
            results.append(parameters(dtype))
            optimizer = MAKERS[name](results[-1])
            for index in range(3):
                for q, value in zip(results[-1], parameters(dtype), strict=True):
                    q.grad = value.detach() * (index + 1)
                with torch.device(device if index else "cpu"):
                    optimizer.step()
        assert identical(*results)
        with torch.device("meta"):
            again = loaded(name, results[-1], optimizer.state_dict())
            if name == "lcam":
                LossPhase(again).step(1.0)
        for each in (optimizer, again):
            assert all(value.device.type == "cpu" for state in each.state.values() for value in state.values())


@pytest.mark.parametrize(("name", "path"), NSF_CASES)
def test_autograd_sees_that_parameters_have_changed(name, path):
    """A second backward() through the old weights raises; torch's fused kernels alone would let it pass."""
    for dtype in (torch.float32, torch.bfloat16):
        for each in ({"p": 0.5}, {"p": 0.1}, {"p": 0.1, "grafting": "none"}):
            for size in (10, 200_000):
                q = nn.Parameter(torch.ones(size, dtype=dtype))
                loss = (q * q).sum()
                loss.backward(retain_graph=True)
                MAKERS[name]([q], **each, **PATHS[path]).step()
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
