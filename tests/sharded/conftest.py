# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import the tiny training of tests/distributed."""

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).parents[1] / "distributed")
if _FOLDER not in sys.path:
    sys.path.insert(0, _FOLDER)
