# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import the oracles of tests/reference by their file names."""

import sys
from pathlib import Path

_REFERENCE = str(Path(__file__).parents[1] / "reference")
if _REFERENCE not in sys.path:
    sys.path.insert(0, _REFERENCE)
