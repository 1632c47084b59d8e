# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import the tiny training of tests/distributed."""

import sys
from pathlib import Path

for _folder in (Path(__file__).parents[1] / "distributed",):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
