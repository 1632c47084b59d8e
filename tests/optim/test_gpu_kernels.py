# SPDX-License-Identifier: Apache-2.0
"""NSF's Triton kernels against the formula in float64: interpreted on a CPU, compiled without a GPU, and on a GPU.

Triton decides when it is imported whether it interprets, so the cases run in a process of their own, all in one: run as
a script, this file prints what became of each.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback

import pytest
import torch

from hf_nsf.optim import nsf_update
from hf_nsf.optim.nsf_update import Bucket, Scalars

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
PS = (0.5, 0.25, 0.0, -0.25, -0.5, 1.0)
CASES = {}


def case(*rows):
    """Register a function of a device, and of each of these rows, as a case."""

    def register(function):
        for row in rows or ((),):
            name = "-".join([function.__name__, *(str(x).removeprefix("torch.") for x in row)])
            CASES[name] = lambda device, row=row: function(device, *row)
        return function

    return register


def scalars(p=0.25, grafting="adam", t=1, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, maximize=False):
    return Scalars(p, lr, *betas, eps, weight_decay, maximize, grafting, t)


class Lockstep:
    """Tensors that the kernels step, beside what the formula makes of them in float64, one tensor at a time."""

    def __init__(self, device, shapes, dtype=torch.float32, kahan=False, offset=0):
        torch.manual_seed(0)

        def make(fill, dtype):  # with an offset: at addresses that are no multiple of 16
            flat = [fill(offset + torch.Size(shape).numel()).to(dtype).to(device)[offset:] for shape in shapes]
            return [tensor.view(shape) for tensor, shape in zip(flat, shapes, strict=True)]

        self.params, self.grads = make(torch.randn, dtype), make(torch.randn, dtype)
        self.ms, self.vs = make(torch.zeros, torch.float32), make(torch.zeros, torch.float32)
        self.comps = make(torch.zeros, dtype) if kahan else None
        self.expected = [tuple(map(torch.Tensor.double, q)) for q in zip(self.params, self.ms, self.vs, strict=True)]

    def step(self, *numbers):
        """Step the tensors, in as many buckets as there are scalars; by the kernels and by the formula."""
        from hf_nsf.optim.kernels import gpu

        def part(tensors, k):
            return None if tensors is None else tensors[k :: len(numbers)]

        tensors = self.params, self.grads, self.ms, self.vs, self.comps
        buckets = [Bucket(*(part(some, k) for some in tensors), s) for k, s in enumerate(numbers)]
        before = [grad.clone() for grad in self.grads]
        if numbers[0].needs_norms:
            gpu.second_half(buckets, gpu.first_half(buckets))
        else:
            gpu.whole_step(buckets)
        for i, (theta, m, v) in enumerate(self.expected):
            self.expected[i] = formula(numbers[i % len(numbers)], theta, self.grads[i].double(), m, v)
            assert torch.equal(self.grads[i], before[i]) or before[i].isnan().any()

    def thetas(self):
        return [q.double() + (self.comps[i].double() if self.comps else 0) for i, q in enumerate(self.params)]

    def check(self, rtol=1e-6, atol=1e-6):
        for theta, m, v, (*expected,) in zip(self.thetas(), self.ms, self.vs, self.expected, strict=True):
            torch.testing.assert_close(theta, expected[0], rtol=rtol, atol=atol, equal_nan=True)
            for actual, moment in zip((m, v), expected[1:], strict=True):
                scale = moment.abs().max().item() if moment.numel() else 0
                torch.testing.assert_close(actual.double(), moment, rtol=1e-6, atol=1e-6 * scale, equal_nan=True)


def formula(s, theta, g, m, v):
    """One step by METHOD's formula, in the dtype of its tensors."""
    g = -g if s.maximize else g
    m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
    m_hat, v_hat = m / (1 - s.beta1**s.t), v / (1 - s.beta2**s.t)
    d = v_hat**s.p + s.eps if s.grafting == "none" else v_hat.sqrt() + s.eps
    u = torch.where(d == 0, 0.0, m_hat / d)
    if s.grafting == "adam":
        a, u = u, torch.where(d == 0, 0.0, u * d ** (1 - 2 * s.p))
        u = u * (1 if u.norm() == 0 else a.norm() / u.norm())
    return theta * (1 - s.lr * s.weight_decay) - s.lr * u, m, v


# Of bfloat16, a sum of two has 16 or 17 bits. The interpreter drops bits where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-14, torch.float16: 2.0**-19}


@case(*((dtype, grafting) for dtype in TOLERANCE for grafting in ("adam", "none")))
def all_exponents(device, dtype, grafting):
    """Buckets of different numbers in one launch, among their tensors an empty and a 0-dim one."""
    tensors = Lockstep(device, [(5, 7), (), (0,), (19,), (3, 2, 2), (1,)], dtype, kahan=dtype != torch.float32)
    for t in (1, 2):
        tensors.grads = [torch.randn_like(grad) for grad in tensors.grads]
        tensors.step(
            *(
                scalars(p, grafting, t, lr=0.01 + 0.01 * k, betas=(0.3 * k % 1, 0.99), eps=1e-8, maximize=k % 2 == 1)
                for k, p in enumerate(PS)
                if grafting == "none" or p != 0.5
            )
        )
    tensors.check(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@case()
def adamw_at_one_half(device):
    tensors = Lockstep(device, [(5, 7), (3,)])
    like = [torch.nn.Parameter(param.clone()) for param in tensors.params]
    adamw = torch.optim.AdamW(like, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for t in (1, 2, 3):
        tensors.grads = [torch.randn_like(grad) for grad in tensors.grads]
        tensors.step(scalars(0.5, t=t))
        for param, grad in zip(like, tensors.grads, strict=True):
            param.grad = grad
        adamw.step()
    torch.testing.assert_close(tensors.params, [param.detach() for param in like], rtol=3e-7, atol=3e-8)


@case()
def hundred_steps(device):
    """Beside the eager halves, whose decay_factor is a float32 too."""
    tensors = Lockstep(device, [(11,)])
    theta, m, v = (some[0].clone() for some in (tensors.params, tensors.ms, tensors.vs))
    for t in range(1, 101):
        tensors.grads = [torch.randn_like(grad) for grad in tensors.grads]
        s = scalars(0.495 - 0.01 * t, t=t, lr=1e-3)
        tensors.step(s)
        buckets = [Bucket([theta], tensors.grads, [m], [v], None, s)]
        nsf_update.second_half(buckets, nsf_update.first_half(buckets, None), None)
    torch.testing.assert_close(tensors.params[0], theta, rtol=1e-6, atol=1e-6)


@case((0,), (1,))
def many_chunks(device, offset):
    """Tensors of several chunks, whole ones and others, aligned and not."""
    from hf_nsf.optim.kernels import gpu

    for dtype, grafting in ((torch.float32, "adam"), (torch.float16, "none")):
        shapes = [(2 * gpu.CHUNK + 3,), (gpu.CHUNK,), (gpu.CHUNK, 2)]
        tensors = Lockstep(device, shapes, dtype, kahan=dtype != torch.float32, offset=offset)
        tensors.step(scalars(-0.25, grafting))
        tensors.check(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@case()
def bfloat16_without_kahan_sums(device):
    for grafting in ("adam", "none"):
        tensors = Lockstep(device, [(33,)], torch.bfloat16)
        tensors.step(scalars(grafting=grafting))
        tensors.check(rtol=2.0**-7, atol=1e-30)


@case()
def kahan_sums_keep_small_steps(device):
    tensors = Lockstep(device, [(4,)], torch.bfloat16, kahan=True)
    start = [theta.clone() for theta in tensors.thetas()]
    tensors.grads = [torch.ones_like(grad) for grad in tensors.grads]
    for t in range(1, 9):
        tensors.step(scalars(t=t, lr=1e-4, weight_decay=0.0))  # under half a unit in the last place
    for theta, before in zip(tensors.thetas(), start, strict=True):
        torch.testing.assert_close(theta, before - 8e-4, rtol=0, atol=2e-4)


@case(*((p,) for p in PS))
def scale_of_gradients(device, p):
    """From v_hat = 1e-24 to 1e24: with eps = 0 the step is that of the gradients in their own scale."""
    tensors = Lockstep(device, [(12,)] * 3)
    gradient = tensors.grads[0]
    tensors.params = [torch.zeros_like(gradient) for _ in range(3)]
    tensors.expected = [(gradient.double() * 0,) * 3] * 3
    tensors.grads = [gradient * c for c in (1e-12, 1.0, 1e12)]
    tensors.step(scalars(p, eps=0.0, lr=1.0))
    tensors.check(rtol=2e-5, atol=0)
    for param in tensors.params:
        torch.testing.assert_close(param, tensors.params[1], rtol=3e-5, atol=0)


@case()
def huge_gradients_stay_finite(device):
    """A step is no NaN where v overflows."""
    for grafting in ("adam", "none"):
        tensors = Lockstep(device, [(4,)])
        tensors.grads[0].copy_(torch.tensor([1e20, 1.0, -1.0, 1e18]))
        tensors.step(scalars(0.25, grafting))
        assert tensors.params[0].isfinite().all()


@case((1e-8,), (0.0,))
def zero_gradients(device, eps):
    """They move nothing, in all coordinates or in some, and make no NaN."""
    for grafting in ("adam", "none"):
        for p in (-0.5, 0.0, 1e-46, 1e-40, 0.25, 1.0):
            tensors = Lockstep(device, [(6,), (6,)])
            tensors.grads[0].zero_()
            tensors.grads[1][2:4] = 0.0
            before = [param.clone() for param in tensors.params]
            tensors.step(scalars(p, grafting, eps=eps, weight_decay=0.0))
            assert torch.equal(tensors.params[0], before[0])
            assert torch.equal(tensors.params[1][2:4], before[1][2:4])
            assert (tensors.params[1] != before[1]).sum() == 4
            assert tensors.params[1].isfinite().all()


@case((float("nan"),), (float("inf"),))
def not_a_number(device, value):
    """It spoils the whole step of its tensor if that is grafted, its coordinate else, and no other tensor's."""
    for grafting, spoiled in (("adam", 6), ("none", 1)):
        tensors = Lockstep(device, [(6,), (6,)])
        tensors.grads[0][1] = value
        tensors.step(scalars(-0.25, grafting))
        assert (~tensors.params[0].isfinite()).sum() == spoiled
        torch.testing.assert_close(tensors.params[1].double(), tensors.expected[1][0], rtol=1e-6, atol=1e-6)


@case()
def same_bits_twice(device):
    from hf_nsf.optim.kernels import gpu

    results = []
    for _ in range(2):
        tensors = Lockstep(device, [(3 * gpu.CHUNK + 1,), (7,)])
        tensors.step(scalars(-0.5))
        results.append(tensors.params)
    assert all(map(torch.equal, *results))


@case()
def launches(device):
    """Three a grafted step and one without grafting, whatever the number of tensors and of groups."""
    from hf_nsf.optim.kernels import gpu

    kernels, counts = (gpu._step, gpu._add_up), []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            counts.append(grid)
            return self.kernel[grid]

    try:
        gpu._step, gpu._add_up = map(Counted, kernels)
        for shapes, groups in (([(2,)], 1), ([(2,)] * 8, 4)):
            for grafting, number in (("adam", 3), ("none", 1)):
                counts.clear()
                Lockstep(device, shapes).step(*[scalars(0.1 * k, grafting) for k in range(groups)])
                assert len(counts) == number
        counts.clear()
        Lockstep(device, [(0,)]).step(scalars())
        assert len(counts) <= 1
    finally:
        gpu._step, gpu._add_up = kernels


@case()
def reduced_sums(device):
    """The second half takes the sums as it gets them, in a tensor of their own too, as all-reduced ones are."""
    from hf_nsf.optim.kernels import gpu

    for copy in (False, True):
        tensors = Lockstep(device, [(9,), (4,)])
        start = [theta.clone() for theta in tensors.thetas()]
        s = scalars(0.0, weight_decay=0.0, lr=1.0)
        bucket = [Bucket(tensors.params, tensors.grads, tensors.ms, tensors.vs, None, s)]
        sums = gpu.first_half(bucket)
        assert sums.shape == (2, 2) and sums.dtype == torch.float64
        sums[:, 0] *= 4  # twice the length
        gpu.second_half(bucket, sums.clone() if copy else sums)
        for theta, before, grad in zip(tensors.thetas(), start, tensors.grads, strict=True):
            expected, *_ = formula(s, torch.zeros_like(theta), grad.double(), torch.zeros_like(theta), 0 * theta)
            torch.testing.assert_close(theta - before, 2 * expected, rtol=1e-5, atol=1e-6)


@case()
def freed_memory(device):
    from hf_nsf.optim.kernels import gpu

    tensors = Lockstep(device, [(4,), (4,)])
    tensors.grads[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        gpu.whole_step([Bucket(tensors.params, tensors.grads, tensors.ms, tensors.vs, None, scalars(0.5))])


def _worker(mode, **environment):
    process = subprocess.run(
        [sys.executable, __file__, mode],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    return _worker("interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreted, name):
    assert not interpreted[name], interpreted[name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    CASES[name]("cuda")


@pytest.fixture(scope="module")
def compiled():
    return _worker("compile")


# Counted in the compiled code of whole chunks: what it reads and writes of a parameter, its gradient and its states.
BYTES = {
    ("float32", False): {"first": 20, "second": 16, "whole": 28},
    ("bfloat16", True): {"first": 18, "second": 16, "whole": 26},
}
OTHER_BYTES = {
    ("bfloat16", False): {"second": 12, "whole": 22},
    ("float16", True): {"first": 18, "second": 16, "whole": 26},
    ("float16", False): {"second": 12, "whole": 22},
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype, kahan", BYTES)
def test_cubins_and_bytes_a_parameter(compiled, capability, dtype, kahan):
    for work, count in BYTES[dtype, kahan].items():
        assert compiled[f"{work}-{dtype}-{kahan}-{capability}"] == count
    assert f"add-{capability}" in compiled


@pytest.mark.slow
def test_cubins_of_other_dtypes():
    compiled = _worker("compile others")
    for (dtype, kahan), counts in OTHER_BYTES.items():
        for work, count in counts.items():
            assert all(compiled[f"{work}-{dtype}-{kahan}-{capability}"] == count for capability in (80, 90))


def test_nothing_is_compiled_anew(compiled):
    """Not for another p, rate, step, number, size or address: three kernels and the one that adds up serve float32."""
    assert compiled["anew"] == {"_step": 3, "_add_up": 1}


def _interpret():
    from hf_nsf.optim.kernels import gpu

    assert gpu.available("cpu")
    gpu.CHUNK, gpu.BLOCK = 32, 16  # so that small tensors have several chunks
    results = {}
    for name, run in CASES.items():
        try:
            run("cpu")
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


def _compile(table):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_nsf.optim.kernels import gpu

    def compiled(kernel, pointers, capability, **constants):
        constants |= {"CHUNK": gpu.CHUNK, "BLOCK": gpu.BLOCK}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
        source = ASTSource(kernel, {**pointers, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gpu.NO_FUSION)
        assert result.asm["cubin"]
        return result.asm

    counts = {}
    for capability in (80, 90):
        compiled(gpu._add_up, {"rows": "*i64", "parts": "*fp64", "sums": "*fp64"}, capability)
        counts[f"add-{capability}"] = None
        for (dtype, kahan), works in table.items():
            for work in works:
                pointers = {"rows": "*i64", "owner": "*i32", "sums": "*fp64"}
                constants = {"WORK": work, "DTYPE": getattr(tl, dtype), "KAHAN": kahan and work != "first"}
                asm = compiled(gpu._step, pointers, capability, **constants)
                accesses = re.findall(r"tt\.(?:load|store) .*tensor<\d+x!tt\.ptr<(?:f|bf)(\d+)>", asm["ttgir"])
                counts[f"{work}-{dtype}-{kahan}-{capability}"] = sum(map(int, accesses)) / 8 / 2  # two kinds of chunks
                if work == "second":  # 16 bytes at once; rounded, not cut off
                    assert "ld.global.v4" in asm["ptx"]
                    assert dtype != "bfloat16" or "cvt.rn.bf16" in asm["ptx"]
    return counts


def _count():
    """Kernels that a GPU would have to compile, counted on a CPU: all but the launch takes place."""
    import triton
    from triton.backends.compiler import GPUTarget

    from hf_nsf.optim.kernels import gpu

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, warmup, **options: run(*args, warmup=True, **options)
    for shapes, offset in (([(1,)], 0), ([(16,), (5,), (0,)], 1), ([(gpu.CHUNK * 17,)], 0)):
        for t, p in ((1, 0.0), (2, 0.25), (1000, 1.0)):
            for grafting in ("adam", "none"):
                Lockstep("cpu", shapes, offset=offset).step(scalars(p, grafting, t, lr=p, eps=p))
    return {kernel.fn.__name__: len(kernel.device_caches[0][0]) for kernel in (gpu._step, gpu._add_up)}


if __name__ == "__main__":
    modes = {
        "interpret": _interpret,
        "compile": lambda: {**_compile(BYTES), "anew": _count()},
        "compile others": lambda: _compile(OTHER_BYTES),
    }
    print(json.dumps(modes[sys.argv[1]]()))
