# SPDX-License-Identifier: Apache-2.0
"""NSF beside its neighbour Padam (arXiv 1806.06763), which is its formula without grafting, with p fixed."""

import pytest
import torch
from problems import drive, make_parameters, relative_error

from hf_nsf import NSF

pytestmark = pytest.mark.ecosystem
B2 = 0.999


@pytest.mark.parametrize("p", [0.125, 0.25, 0.5])
def test_nsf_without_grafting_is_padam(p):
    padam = pytest.importorskip("pytorch_optimizer").PAdam
    actual, expected = make_parameters(torch.float64), make_parameters(torch.float64)
    options = {"lr": 1e-2, "betas": (0.9, B2), "weight_decay": 0.0, "eps": 1e-30}
    nsf, other = NSF(actual, p=p, grafting="none", **options), padam(expected, partial=p, **options)
    for t in range(1, 51):
        # It divides v by its bias to the power 1/2, whatever p is.
        nsf.param_groups[0]["lr"] = 1e-2 * (1 - B2**t) ** (0.5 - p)
        drive(nsf, actual, steps=t, skip=t - 1)
        drive(other, expected, steps=t, skip=t - 1)
    assert relative_error(actual, expected) < 1e-12
