# SPDX-License-Identifier: Apache-2.0
"""One thread for the tests of this folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread costs more than it brings on a few hundred elements."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
