"""Runs at the start of every Python process below the launcher; loads nothing until a watched module is imported.

Python imports the first ``sitecustomize`` on its path. This one stands in front of the environment's own, so it runs
that one too. Where the launcher's variable is missing it does nothing else.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
VARIABLE = "ORPO_KERNELS_WATCH"  # names of modules, separated by commas


class _Watch:
    """Calls ``then(name)`` once for each of these modules, right after whoever imports it first has done so."""

    def __init__(self, modules: Iterable[str], then: Callable[[str], None]) -> None:
        self.modules, self.then = set(modules), then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        self.modules.discard(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.then(fullname)

        loader.exec_module = exec_module
        return spec


def watch(modules: Sequence[str], then: Callable[[str], None]) -> None:
    """Call ``then(name)`` for those that are imported already, and later for each of the others.

    A launcher must not import a library before the script it runs: scripts set environment variables first. A process
    is watched once.
    """
    if any(type(finder).__name__ == _Watch.__name__ for finder in sys.meta_path):
        return
    for name in modules:
        if name in sys.modules:
            then(name)
    sys.meta_path.insert(0, _Watch((name for name in modules if name not in sys.modules), then))  # type: ignore[arg-type]


def _imported(name: str) -> None:
    try:
        from orpo_kernels import cli
    except Exception as error:  # another environment than the launcher's: the process goes on as it would without us
        print(f"orpo_kernels: a child process is not patched: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        cli.imported(name)


def _run_the_next() -> None:
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    if VARIABLE in os.environ:
        watch(os.environ[VARIABLE].split(","), _imported)
    _run_the_next()
