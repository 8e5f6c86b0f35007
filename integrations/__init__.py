"""Patches for trainers: each in a module of its own, all known here.

A new trainer is one module with ``patch``, ``unpatch`` and ``refusal``, and one line in ``TRAINERS``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["TRAINERS", "patch_trl", "patched_trl", "unpatch_trl"]


@dataclass(frozen=True)
class Trainer:
    """A trainer that can be patched, without importing its library."""

    library: str  # distribution name
    module: str  # the module that defines the trainer class
    target: str  # what is patched, for people
    integration: str  # our module

    def load(self) -> ModuleType:
        """Our module for this trainer, which imports its library."""
        return importlib.import_module(self.integration)


TRAINERS = (Trainer("trl", "trl.experimental.orpo.orpo_trainer", "trl ORPOTrainer", "orpo_kernels.integrations.trl"),)


def patch_trl() -> None:
    """Make TRL's ``ORPOTrainer`` and its subclasses compute their loss without full logits.

    Works before or after the class was imported and for trainers that exist already; patching twice is patching once.

    Raises:
        ImportError: trl is missing or has no ORPOTrainer this package knows; the message says which versions do.
    """
    TRAINERS[0].load().patch()


def unpatch_trl() -> None:
    """Give ``ORPOTrainer`` its own methods back. Without a patch nothing happens."""
    TRAINERS[0].load().unpatch()


@contextmanager
def patched_trl() -> Iterator[None]:
    """``patch_trl`` for the length of a ``with`` block; a patch that was there before stays after it."""
    integration = TRAINERS[0].load()
    before = integration.is_patched()
    integration.patch()
    try:
        yield
    finally:
        if not before:
            integration.unpatch()


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Runs ``then`` once, right after ``module`` has been imported by whoever imports it first."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.then()

        loader: Any = spec.loader
        loader.exec_module = exec_module
        return spec


def when_imported(module: str, then: Callable[[], None]) -> None:
    """Call ``then`` now if ``module`` is imported, else right after it will have been.

    A launcher must not import a training library before the script it runs: scripts set environment variables first.
    """
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _PatchOnImport(module, then))
