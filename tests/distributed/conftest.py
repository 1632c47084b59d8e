# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import the file that their processes run."""

import sys
from pathlib import Path

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)
