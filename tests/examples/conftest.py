# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import the example scripts, and the file that their processes run."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[2] / "examples"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
