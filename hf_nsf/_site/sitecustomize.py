# SPDX-License-Identifier: Apache-2.0
"""Import hf_nsf in every Python process below `python -m hf_nsf`, then run the user's own `sitecustomize`.

`python -m hf_nsf` puts this folder first on PYTHONPATH; Python imports `sitecustomize` when it starts. A Python other
than hf_nsf's may inherit the variable, so this file needs no package and no new version of Python.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost every start of Python a few milliseconds
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _import_hf_nsf() -> None:
    """Import the installed hf_nsf, else the one that this file belongs to (an uninstalled clone, another Python's)."""
    sys.path.append(os.path.dirname(os.path.dirname(_HERE)))
    try:
        import hf_nsf  # noqa: F401
    except Exception as error:
        sys.stderr.write("hf_nsf is not registered in this process: " + str(error) + "\n")
    finally:
        sys.path.pop()


def _stay_first() -> None:
    """Put this folder first again at exec; opentelemetry-instrument and its like prepend a `sitecustomize`."""
    execv = os.execv

    def execute(path: "Any", argv: "Any") -> "Any":
        folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if _HERE in folders[1:]:
            folders.remove(_HERE)
            os.environ["PYTHONPATH"] = os.pathsep.join([_HERE] + folders)
        return execv(path, argv)

    os.execv = execute


def _pass_on() -> None:
    """Run the `sitecustomize` that this one hides, if there is one, with sys.path as it is without hf_nsf."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    this = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = this


if __name__ == "sitecustomize":
    _import_hf_nsf()
    _stay_first()
    _pass_on()
