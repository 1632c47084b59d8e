# SPDX-License-Identifier: Apache-2.0
"""Import hf_nsf in every Python process that imports transformers' Trainer or its arguments, and not before.

`python -m hf_nsf` puts this folder on PYTHONPATH; Python imports `sitecustomize` when it starts. Another Python than
hf_nsf's own may inherit the variable, so nothing here needs a new version or any package.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself would cost every start of Python a few milliseconds
    from typing import Any


class _Watch:
    """Meta path finder that lets the others find transformers' modules and waits until none of them is half executed.

    Importing hf_nsf inside, say, transformers.trainer_callback, which asks for training_args, would be a circular
    import. No parser of the arguments can have been built by the time the outermost of these modules is complete.
    """

    def __init__(self) -> None:
        self.searching = set()  # type: set[str]
        self.executing = 0

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if not name.startswith("transformers.") or name in self.searching:
            return None
        self.searching.add(name)  # another finder may do as this one does, and ask back
        try:
            found = (f.find_spec(name, path, target) for f in list(sys.meta_path) if hasattr(f, "find_spec"))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self.searching.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self.watch(spec.loader)
        return spec

    def watch(self, loader: "Any") -> None:
        """Have the loader, which is this one module's, call us back."""
        execute = loader.exec_module

        def exec_module(module: "Any") -> None:
            self.executing += 1
            try:
                execute(module)
            finally:
                self.executing -= 1
            if not self.executing and "transformers.training_args" in sys.modules and self in sys.meta_path:
                self.register()

        loader.exec_module = exec_module

    def register(self) -> None:
        """Import hf_nsf; a failure is told, and left to the process to judge."""
        sys.meta_path.remove(self)
        try:
            import hf_nsf  # noqa: F401
        except Exception as error:
            if isinstance(error, ImportError) and error.name != "hf_nsf" and "transformers.trainer" not in sys.modules:
                sys.meta_path.insert(0, self)  # a package that the Trainer needs is half imported: the next time
            else:
                sys.stderr.write("hf_nsf is not registered in this process: " + str(error) + "\n")


def _pass_on() -> None:
    """Become the `sitecustomize` that this one hides, if there is one; sys.path is then as it is without hf_nsf."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    this = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = this


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Watch())
    _pass_on()
