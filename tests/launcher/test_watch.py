# SPDX-License-Identifier: Apache-2.0
"""When and how a process registers: after `import hf_nsf`, and below `python -m hf_nsf`.

The processes here import small packages in transformers' place, with the same modules and the same order of imports,
and hf_nsf's own files but for its registry, which needs the real Trainer (tests/trainer/test_registration.py).
"""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

import hf_nsf

PACKAGE = Path(hf_nsf.__file__).parent
DOUBLES = {
    "transformers/__init__.py": "",
    "transformers/training_args.py": """
import enum
class OptimizerNames(str, enum.Enum):
    ADAMW = "adamw_torch"
print("arguments")
""",
    "transformers/trainer_callback.py": "from . import training_args; print('callback')",
    "transformers/trainer.py": """
from . import trainer_callback
import needed, time
time.sleep(needed.SECONDS)
print("trainer")
""",
    "needed.py": "SECONDS = 0",
    "hf_nsf/trainer/registry.py": "def register(): print('registered')",
}
NAMES = "print(*transformers.training_args.OptimizerNames, sep=',')"
ADDED = "OptimizerNames.ADAMW,OptimizerNames.LCAM,OptimizerNames.NSF"
TRAINER = "arguments callback trainer registered"
RELOADS = """
import importlib, transformers.trainer
importlib.reload(transformers.training_args)
importlib.reload(transformers.trainer)
"""
FAILS_AT_FIRST = """
import needed
try:
    import transformers.trainer
except ValueError:
    needed.SECONDS = 0
    import transformers.trainer
"""
FINDER = """
import importlib.util, sys
class Finder:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if not self.asking:
            self.asking = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.asking = False
sys.meta_path.insert(0, Finder())
import transformers.trainer
"""
PROXY = """
import importlib.util, sys
class Proxy:  # what is set on it is set on what it wraps, as with wrapt
    def __init__(self, loader):
        self.__dict__["wrapped"] = loader
    def __getattr__(self, name):
        return getattr(self.wrapped, name)
    def __setattr__(self, name, value):
        setattr(self.wrapped, name, value)
    def exec_module(self, module):
        self.wrapped.exec_module(module)
class Hook:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if self.asking or name not in ("transformers.trainer", "transformers.training_args"):
            return None
        self.asking = True
        spec = importlib.util.find_spec(name)
        self.asking = False
        spec.loader = Proxy(spec.loader)
        return spec
sys.meta_path.insert(0, Hook())
import hf_nsf, transformers.trainer
"""
THREADS = """
import threading, time
found = []
def run():
    import transformers.trainer
    found.append("NSF" in vars(transformers.training_args.OptimizerNames))
threads = [threading.Thread(target=run) for _ in range(2)]
for thread in threads:
    thread.start()
    time.sleep(0.1)
for thread in threads:
    thread.join()
print(found)
"""
POOLS = """
import multiprocessing
from transformers.training_args import OptimizerNames
if __name__ == "__main__":
    for kind in ("spawn", "forkserver"):
        with multiprocessing.get_context(kind).Pool(1) as pool:
            assert pool.apply(type, [OptimizerNames.NSF]) is OptimizerNames
"""
# (code, printed, changed files); after `import hf_nsf`, and below the launcher.
BY_BOTH = {
    "no_trainer": ("import transformers; print('nothing')", "nothing", {}),
    "arguments": (f"import transformers.training_args; {NAMES}", f"arguments {ADDED}", {}),
    "callbacks": (f"import transformers.trainer_callback; {NAMES}", f"arguments callback {ADDED}", {}),
    "trainer": (f"import transformers.trainer; {NAMES}", f"{TRAINER} {ADDED}", {}),
    "dependency_of_the_trainer_imports_the_arguments": (
        "import transformers.trainer", "arguments callback OptimizerNames.NSF trainer registered",
        {"needed.py": "from transformers.training_args import OptimizerNames as o; print(o.NSF); SECONDS = 0"},
    ),
    "reloads": (RELOADS + NAMES, f"{TRAINER} arguments trainer registered {ADDED}", {}),
    "trainer_that_fails_at_first": (FAILS_AT_FIRST, TRAINER, {"needed.py": "SECONDS = -1"}),
    "finder_that_asks_all_finders": (FINDER + NAMES, f"{TRAINER} {ADDED}", {}),
    "two_threads": (THREADS, f"{TRAINER} [True, True]", {"needed.py": "SECONDS = 0.3"}),
    "spawn_and_forkserver": (POOLS, "arguments arguments arguments", {}),
}  # fmt: skip
# (code, printed, changed files, on stderr); by `import hf_nsf` only.
BY_IMPORT = {
    "hf_nsf_imported_last": (f"import transformers.trainer, hf_nsf; {NAMES}", f"{TRAINER} {ADDED}", {}, ""),
    "after_a_hook_whose_loader_is_a_proxy": (PROXY + NAMES, f"{TRAINER} {ADDED}", {}, ""),
    "hf_nsf_reloaded": (
        f"import hf_nsf, importlib; importlib.reload(hf_nsf); import transformers.trainer; {NAMES}",
        f"{TRAINER} {ADDED}", {}, "",
    ),
    "hf_nsf_in_another_thread_than_the_trainer": (
        "import threading, time\n"
        "def first(): import transformers.trainer\n"
        "threading.Thread(target=first).start(); time.sleep(0.1); import hf_nsf",
        TRAINER, {"needed.py": "SECONDS = 0.3"}, "",
    ),
    "neither_torch_nor_transformers": (
        "import sys; before = {*sys.modules}; import hf_nsf; print(*sorted({'torch', 'typing', 'transformers'} & "
        "({*sys.modules} - before)), 'NSF' in dir(hf_nsf), hasattr(hf_nsf, 'nothing'))",
        "True False", {}, "",
    ),
    "failure_is_a_warning": (
        "import hf_nsf, transformers.trainer; print('on')", "arguments callback trainer on",
        {"hf_nsf/trainer/registry.py": "raise ImportError('too old')"},
        "RuntimeWarning: hf_nsf is not registered in this process: too old",
    ),
}  # fmt: skip
BY_LAUNCHER = {
    "failure_is_a_warning": (
        "import transformers.trainer; print('on')", "arguments callback trainer on",
        {"hf_nsf/trainer/registry.py": "1 / 0"}, "hf_nsf is not registered in this process: division by zero",
    ),
    "hf_nsf_that_does_not_import": (
        "import transformers.trainer; print('on')", "arguments callback trainer on",
        {"hf_nsf/__init__.py": "1 / 0"}, "hf_nsf is not registered in this process: division by zero",
    ),
    "other_sitecustomize": (
        "import sitecustomize, transformers.trainer; print(sitecustomize.own)", f"user {TRAINER} 1",
        {"sitecustomize.py": "print('user'); own = 1"}, "",
    ),
    "other_sitecustomize_that_fails": (
        "import transformers.trainer", f"user {TRAINER}",
        {"sitecustomize.py": "print('user'); import nowhere"}, "Error in sitecustomize",
    ),
}  # fmt: skip
CASES = [
    *(
        pytest.param(way, *case, "", id=f"{name}-{way}")
        for name, case in BY_BOTH.items()
        for way in ("import", "launcher")
    ),
    *(pytest.param("none", *case, id=f"{name}-import") for name, case in BY_IMPORT.items()),
    *(pytest.param("launcher", *case, id=f"{name}-launcher") for name, case in BY_LAUNCHER.items()),
]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python without packages, so that hf_nsf is not installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize(("way", "code", "printed", "changes", "error"), CASES)
def test_when_and_how_a_process_registers(way, code, printed, changes, error, bare_python, tmp_path):
    packages, clone = tmp_path / "packages", tmp_path / "clone"
    for name in ("__init__.py", "_watch.py", "_site/sitecustomize.py", "trainer/__init__.py", "trainer/names.py"):
        (clone / "hf_nsf" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, clone / "hf_nsf" / name)
    for name, text in {**DOUBLES, **changes}.items():
        file = (clone if name.startswith("hf_nsf") else packages) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    site = clone / "hf_nsf" / "_site"
    # Below the launcher, sitecustomize finds its own hf_nsf, as in a clone that is not installed.
    folders = [site, packages] if way == "launcher" else [packages, clone]
    first = "import hf_nsf\n" if way == "import" else ""
    script = tmp_path / "script.py"
    last = f"import sys; assert {str(site)!r} not in sys.path and {str(packages)!r} in sys.path"
    script.write_text(f"{first}{code}\n{last}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([bare_python, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == printed.split()
    assert error in done.stderr and bool(error) == bool(done.stderr)
