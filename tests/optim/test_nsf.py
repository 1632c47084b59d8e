# SPDX-License-Identifier: Apache-2.0
"""NSF's step as a whole: which implementation makes it, what it takes and refuses, beside what and with which state.

What a step is: test_implementations.py.
"""

import functools
import warnings

import pytest
import torch
from problems import NSF_PATHS, PATHS, drive, identical, make_parameters, needs_numba, relative_error, set_gradients
from torch import nn

from hf_nsf import NSF
from hf_nsf.optim import kernels
from hf_nsf.optim.kernels import EAGER


def parameters(dtype, path):
    """All layouts, but for gaps where kernels are asked for."""
    return make_parameters(dtype, gaps=path != "fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_one_half_the_default_is_torchs_fused_adamw_bit_for_bit(dtype):
    for options in ({}, {"weight_decay": 0.1, "maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-4}):
        results = []
        for make in (functools.partial(NSF, p=0.5), functools.partial(torch.optim.AdamW, fused=True)):
            params = make_parameters(dtype, gaps=False)
            optimizer = make(params, lr=1e-2, **options)
            drive(optimizer, params, 100)
            results.append([*params, *(optimizer.state[q][n] for q in params for n in ("exp_avg", "exp_avg_sq"))])
        assert identical(*results)


@pytest.mark.parametrize("path", NSF_PATHS)
def test_a_parameter_makes_the_step_that_it_makes_alone(path):
    """Whatever stands beside it: other dtypes, sizes, numbers of updates, groups with their own options."""
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float64, torch.float16] if path != "fused" else [])
    own = [
        {"p": 0.5},
        {"p": -0.25, "lr": 1e-3},
        {"p_min": -0.5, "cycle_steps": 17, "maximize": True},
        {"p": 0.1, "grafting": "none", "eps": 0.1},
    ]

    def make():
        params = [q for dtype in dtypes for q in parameters(dtype, path)]
        return params, [{"params": params[index :: len(own)], **options} for index, options in enumerate(own)]

    def step(optimizer, params, only=None):
        generator = torch.Generator().manual_seed(5)
        for t in range(12):
            set_gradients(params, generator)
            for index, q in enumerate(params):
                if t % (1 + index % 3) or only not in (None, index):
                    q.grad = None
            optimizer.step()

    together, groups = make()
    unused = nn.Parameter(torch.ones(2))
    optimizer = NSF([*groups, {"params": [unused]}], **PATHS[path])
    step(optimizer, together)
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    for index in range(len(together)):
        alone, groups = make()
        step(NSF(groups, **PATHS[path]), alone, only=index)
        assert identical(alone[index : index + 1], together[index : index + 1]), index


@pytest.mark.parametrize("path", NSF_PATHS)
def test_tensors_that_are_not_laid_out_as_they_seem(path):
    """Other strides, expanded ones, negated views, tensors without memory: right, or refused."""
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        grads = {
            "other strides": value.t().contiguous().t(),
            "expanded": value[:1].expand(4, 6),
            "negated": torch._neg_view(value),
            "zeros": torch._efficientzerotensor((4, 6), dtype=dtype),
            "gaps": torch.stack([value, value], -1)[..., 0],
            "parameter with gaps": value,
        }
        for name, grad in grads.items():
            for p in (0.5, 0.1):
                beside, ours, plain = [nn.Parameter(torch.ones(4, 6, dtype=dtype)) for _ in range(3)]
                if name == "parameter with gaps":
                    ours = nn.Parameter(torch.ones(4, 12, dtype=dtype)[:, ::2])
                ours.grad, beside.grad, plain.grad = grad, value, torch.zeros(4, 6, dtype=dtype) + grad
                optimizer = NSF([beside, ours], lr=0.1, p=p, **PATHS[path])
                if path == "fused":
                    with pytest.raises(RuntimeError, match=r"fused=True with .* parameter of shape \(4, 6\)"):
                        optimizer.step()
                    assert (ours == 1).all() and (beside == 1).all() and optimizer.state[beside]["step"] == 0
                    continue
                optimizer.step()
                NSF([plain], lr=0.1, p=p, foreach=False).step()
                assert relative_error([ours], [plain]) <= (1e-6 if dtype == torch.float32 else 0), (p, name)


@pytest.mark.parametrize("path", NSF_PATHS)
def test_options_may_be_tensors_and_change_between_steps(path):
    dtype = torch.float32 if path == "fused" else torch.float64
    kinds = [(float, "reference"), (float, path), (torch.tensor, path), (lambda x: torch.tensor([x]), path)]
    results = []
    for kind, chosen in kinds:
        params = parameters(dtype, path)
        optimizer = NSF(params, lr=kind(1e-2), p=kind(0.5), betas=(kind(0.9), kind(0.99)), **PATHS[chosen])
        for index, p in enumerate((0.5, 0.25, 0.5, 0.0, -0.25, 1.0)):
            optimizer.param_groups[0].update(p=kind(p), lr=kind(1e-2 / (index + 1)), betas=(kind(0.5), kind(0.9)))
            drive(optimizer, params, index + 1, skip=index)
            assert optimizer.last_p == pytest.approx(p)
        results.append(params)
    assert all(relative_error(each, results[0]) <= 1e-6 for each in results[1:])  # tensors of numbers are float32
    assert dtype == torch.float32 or relative_error(results[1], results[0]) <= 1e-12


def test_a_state_goes_from_path_to_path():
    whole, switched = (make_parameters(torch.float32, gaps=False) for _ in range(2))
    drive(NSF(whole, p=0.1), whole, 12)
    state = None
    for index, path in enumerate(("default", "reference", "foreach", "default")):
        optimizer = NSF(switched, p=0.1, **PATHS[path])
        if state is not None:
            optimizer.load_state_dict(state)
            optimizer.param_groups[0].update({"foreach": None, "fused": None, **PATHS[path]})
        drive(optimizer, switched, 3 * index + 3, skip=3 * index)
        state = optimizer.state_dict()
    assert relative_error(switched, whole) <= 1e-6


def test_implementations_are_chosen_as_documented(monkeypatch):
    """With every flag, which functions make the step."""
    used = []
    fakes = kernels.Implementation(*(functools.partial(lambda f, b: used.append("kernels") or f(b), f) for f in EAGER))
    monkeypatch.setattr(kernels, "kernels_for", lambda device, dtype, kahan: (fakes, ""))
    table = [
        ({}, torch.float32, 0.1, ["kernels"] * 2), ({}, torch.bfloat16, 0.5, ["kernels"]),
        ({}, torch.float32, 0.5, []), ({"fused": False}, torch.float32, 0.1, []),
        ({"foreach": True}, torch.float32, 0.1, []), ({"foreach": False}, torch.float32, 0.1, []),
        ({"foreach": False, "fused": True}, torch.float32, 0.1, ["kernels"] * 2),
    ]  # fmt: skip
    for flags, dtype, p, wanted in table:
        q = nn.Parameter(torch.ones(3, dtype=dtype))
        drive(NSF([q], p=p, **flags), [q], 1)
        assert used == wanted, (flags, dtype, p)
        used.clear()


def test_a_constant_p_that_leaves_its_range_is_refused():
    q = nn.Parameter(torch.ones(3))
    q.grad = torch.ones(3)
    optimizer = NSF([q], p=1.0)
    optimizer.param_groups[0]["p"] = 1.5
    with pytest.raises(ValueError, match="p=1.5, allowed is a number from -1 to 1"):
        optimizer.step()
    assert torch.equal(q, torch.ones(3)) and not optimizer.state[q].get("step")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64], ids=str)
def test_frozen_parameters_of_other_dtypes_are_left_alone(dtype):
    """Quantized base models keep theirs among model.parameters()."""
    q, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    q.grad = torch.ones(3)
    for options in ({}, {"foreach": True}, {"foreach": False}):
        optimizer = NSF([frozen, q], **options)
        optimizer.step()
        assert frozen not in optimizer.state and torch.equal(frozen, torch.ones(2, dtype=dtype)) and (q < 1).all()


@pytest.mark.parametrize("path", NSF_PATHS)
def test_a_reshaped_parameter_is_refused(path):
    """Its moments, or a gradient, have as many elements in another order."""
    for stale in ("state", "gradient"):
        q = nn.Parameter(torch.ones(2, 8))
        q.grad = torch.ones(2, 8)
        optimizer = NSF([q], p=0.1, **PATHS[path])
        if stale == "state":
            optimizer.step()
        q.data = torch.ones(8, 2)
        if stale == "state":
            q.grad = torch.ones(8, 2)
        with pytest.raises(RuntimeError, match=r"parameter of shape \(8, 2\): its gradient and state"):
            optimizer.step()
        assert torch.equal(q, torch.ones(8, 2))


@needs_numba
def test_meta_parameters_are_judged_when_they_are_stepped():
    q = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = NSF([q], p=0.1, fused=True)
    real = nn.Parameter(torch.ones(3))
    optimizer.param_groups[0]["params"] = [real]
    drive(optimizer, [real], 1)
    assert (real != 1).all()


def test_parameters_that_fsdp1_flattened_are_warned_of_once():
    def make(**options):
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        for q in params:
            q._fsdp_flattened = True  # FSDP1's mark
        return NSF([{"params": [q]} for q in params], **options)

    with pytest.warns(UserWarning, match="flattened or cut by FSDP1") as record:
        make()
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(grafting="none")
        make(p=0.5)


def test_nothing_to_do_and_what_cannot_be_done():
    q = nn.Parameter(torch.ones(3))
    optimizer = NSF([q])
    assert optimizer.step(lambda: 7.0) == 7.0 and not optimizer.state and optimizer.last_p == 0.5
    empty = nn.Parameter(torch.ones(0))
    empty.grad = torch.ones(0)
    optimizer = NSF([empty], p=0.1)
    optimizer.step()
    assert optimizer.state[empty]["step"] == 1
    for dtype, fused in ((torch.complex64, None), (torch.float64, True), (torch.float16, True)):
        with pytest.raises(ValueError, match=str(dtype)):
            NSF([nn.Parameter(torch.ones(2, dtype=dtype))], fused=fused)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        NSF([{"params": [q]}, {"params": embedding.parameters()}]).step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_kahan_sums_small_steps_vanish(dtype):
    """Gradients that do not change sign, and steps far below the rounding of the parameter."""
    results = []
    for kahan_sum in (None, True, False):
        q = nn.Parameter(torch.ones(10, dtype=dtype))
        optimizer = NSF([q], lr=1e-5, p=-0.25, weight_decay=0.0, kahan_sum=kahan_sum)
        for _ in range(200):
            q.grad = torch.full_like(q, 0.1)
            optimizer.step()
        assert ("kahan_comp" in optimizer.state[q]) == (kahan_sum is not False)
        results.append(q.detach().float())
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], torch.ones(10))
    assert (results[0] - (1 - 200e-5)).abs().max() <= torch.finfo(dtype).eps / 2


@needs_numba
def test_same_bits_for_any_thread_count_without_warnings(monkeypatch):
    cpu = pytest.importorskip("hf_nsf.optim.kernels.cpu")
    monkeypatch.setattr(cpu, "CHUNK", 1 << 10)
    monkeypatch.setattr(cpu, "SHARE", 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (300_001, 40_000, 999, 7)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drive(NSF(params, p=0.1), params, 3)
        results.append(params)
    assert identical(results[0], results[1]) and identical(results[0], results[2])
