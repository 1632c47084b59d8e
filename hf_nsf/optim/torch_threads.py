# SPDX-License-Identifier: Apache-2.0
"""Run compiled code on the threads that torch computes with.

A second pool of threads would fight with torch's own for the cores: OpenMP's threads go on turning for milliseconds
after their work. So we ask the OpenMP library that torch has loaded for its pool (`GOMP_parallel`, which GNU's library
has, and LLVM's and Intel's too on Linux); where there is none, a few Python threads serve, the code being outside of
Python's lock.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


def run_here(kernel: Any, argument: int) -> None:
    """Call a C function of one pointer (numba's `cfunc`) on this thread.

    Args:
        kernel: the function.
        argument: the pointer, as an address.
    """
    _called(kernel.address)(argument)


def run_on_threads(kernel: Any, argument: int) -> None:
    """Call it once on each of as many threads as torch uses, and wait for all. They share out the work themselves.

    Args:
        kernel: the function.
        argument: the pointer, as an address; all threads get the same.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        run_here(kernel, argument)
        return
    parallel = gomp_parallel()
    if parallel is not None:
        parallel(kernel.address, argument, threads, 0)
        return
    others = [_pool(threads - 1).submit(run_here, kernel, argument) for _ in range(threads - 1)]
    run_here(kernel, argument)
    for other in others:
        other.result()


@functools.cache
def gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch has loaded, or None."""
    own = Path(torch.__file__).parent
    bundled = [*own.glob("lib/lib*omp*.so*"), *own.parent.glob("torch.libs/lib*omp*.so*")]
    loaded_only = getattr(os, "RTLD_NOLOAD", None)
    if loaded_only is None:
        return None
    for name in (*map(str, bundled), "libiomp5.so", "libomp.so", "libgomp.so.1"):
        try:
            function = ctypes.CDLL(name, mode=loaded_only | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


@functools.lru_cache(maxsize=16)
def _called(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_nsf")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
