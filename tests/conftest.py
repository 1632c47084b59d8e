# SPDX-License-Identifier: Apache-2.0
"""One thread for all tests and their child processes: idle OpenMP threads spin, and the tests' tensors are small."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402  (reads the variable when it is imported)

torch.set_num_threads(1)
