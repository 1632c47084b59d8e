# SPDX-License-Identifier: Apache-2.0
"""NSF's two halves as kernels, for speed only: Triton on GPUs (`gpu`), numba on a CPU (`cpu`).

Each module offers `first_half`, `second_half` and `whole_step` over lists of buckets, as
:mod:`hf_nsf.optim.nsf_update` does. Both are imported where they are used, as Triton and numba may be missing.
"""
