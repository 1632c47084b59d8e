# SPDX-License-Identifier: Apache-2.0
"""Register both optimizers when transformers' modules for training are imported; import nothing before.

Two stages: the names go into transformers' enum when `transformers.training_args` has been executed, before a parser
can be made of it; the rest (:func:`hf_nsf.register`) follows when `transformers.trainer` has been executed. Python
holds the module's import lock meanwhile, so other threads get the module only after registration.
"""

from __future__ import annotations

import sys
from _thread import get_ident
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MODULES = ("transformers.training_args", "transformers.trainer")


def _register(name: str) -> None:
    """Run the stage of that module. A failure is a warning, because the process may not need the optimizers."""
    try:
        if name == "transformers.training_args":
            from .trainer.names import add_names

            add_names(sys.modules[name].OptimizerNames)
        else:
            from .trainer.registry import register

            register()
    except Exception as error:
        import warnings

        warnings.warn(f"hf_nsf is not registered in this process: {error}", RuntimeWarning, stacklevel=2)


class _Watch:
    """Meta path finder that takes both modules' specs from the other finders and adds a stage to their loaders.

    It stays on sys.meta_path: reloaded modules register again, and no thread misses a finder while it reads the list.
    """

    def __init__(self) -> None:
        self.searching: set[tuple[str, int]] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        key = (name, get_ident())
        if name not in _MODULES or key in self.searching:
            return None
        self.searching.add(key)  # another finder may ask all finders in turn, this one included
        try:
            found = (f.find_spec(name, path, target) for f in list(sys.meta_path) if hasattr(f, "find_spec"))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self.searching.discard(key)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """A loader with a stage after it. The loader itself is not changed: it may serve many modules, or be a proxy."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module.__name__)


_WATCH = _Watch()


def start() -> None:
    """Wait for both modules, and register at once with those that are imported already."""
    if _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)
    for name in _MODULES:
        if name in sys.modules:
            import_module(name)  # waits if another thread is executing it
            _register(name)
