# SPDX-License-Identifier: Apache-2.0
"""What all tests and their child processes inherit.

One thread: idle OpenMP threads spin, and the tests' tensors are small. Python's usual signals: a shell starts jobs in
the background with two of them ignored.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402  (reads the variable when it is imported)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGQUIT"):
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
