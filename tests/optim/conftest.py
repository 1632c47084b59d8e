# SPDX-License-Identifier: Apache-2.0
"""Lets the tests import the oracles of tests/reference by their file names."""

import sys
from pathlib import Path

import pytest
import torch

_REFERENCE = str(Path(__file__).parents[1] / "reference")
if _REFERENCE not in sys.path:
    sys.path.insert(0, _REFERENCE)


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread costs more than it brings on a few hundred elements."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
