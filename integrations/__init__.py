"""Ways into scripts as they are: any model's head made lazy (``lazy``), patches for trainers, a reference's numbers.

A patch has a module of its own, and all are known here: a new trainer is one module over ``trainer.py`` with a
``PATCH``, and one line in ``TRAINERS``. The patch of Liger's loss is asked for by name alone, in ``liger.py``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

__all__ = [
    "TESTED",
    "TRAINERS",
    "add_reference_logps",
    "fuse",
    "fusion_report",
    "patch_liger",
    "patch_transformers",
    "patch_trl",
    "patched_trl",
    "precompute",
    "unfuse",
    "unpatch_liger",
    "unpatch_transformers",
    "unpatch_trl",
]

if TYPE_CHECKING:
    from orpo_kernels.integrations.lazy.heads import (
        fuse,
        fusion_report,
        patch_transformers,
        unfuse,
        unpatch_transformers,
    )
    from orpo_kernels.integrations.liger import patch_liger, unpatch_liger
    from orpo_kernels.integrations.reference import add_reference_logps, precompute
    from orpo_kernels.pairs import Objective

HOMES = {
    **dict.fromkeys(("fuse", "fusion_report", "patch_transformers", "unfuse", "unpatch_transformers"), "lazy.heads"),
    **dict.fromkeys(("patch_liger", "unpatch_liger"), "liger"),
    **dict.fromkeys(("add_reference_logps", "precompute"), "reference"),
}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for: a launcher must not import it before its script does."""
    if name in HOMES:
        return getattr(importlib.import_module(f"orpo_kernels.integrations.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Trainer:
    """A trainer that can be patched, without importing its library."""

    library: str  # distribution name
    oldest: str  # version of the library that this patch was tried with
    homes: tuple[str, ...]  # modules that may define the trainer class, the newest first
    name: str  # the class
    integration: str  # our module

    @property
    def target(self) -> str:
        """What is patched, for people."""
        return f"{self.library} {self.name}"

    def find_class(self) -> Any:
        """The trainer class.

        Raises:
            ImportError: the library is missing, broken or has no such class; the message says what would help.
        """
        failures: list[str] = []
        for home in self.homes:
            try:
                return getattr(importlib.import_module(home), self.name)
            except (ImportError, AttributeError) as error:
                failures.append(f"{home}: {error}")
        try:
            version = importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{self.library} is not installed: pip install {self.library}") from None
        raise ImportError(
            f"{self.library} {version} gave no {self.name} ({'; '.join(failures)}). The patch knows {self.library} "
            f"from {self.oldest} on: pip install --upgrade {self.library}"
        )

    def load(self) -> Any:
        """Our ``Patch`` of this trainer, which imports its library.

        Raises:
            ImportError: as ``find_class``, or the class lacks a method that the patch replaces.
        """
        return importlib.import_module(self.integration).PATCH

    def patch(
        self, backend: str | None = None, workspace_bytes: int | None = None, objective: Objective | None = None
    ) -> None:
        """Replace the trainer's methods, or give those in place other settings.

        Raises:
            ImportError: as ``load``.
            ValueError: no such backend, or no such number of bytes.
        """
        from orpo_kernels.integrations.trainer import Settings

        self.load().apply(Settings.chosen(backend, workspace_bytes), objective)


TRL_ORPO = Trainer(
    "trl",
    "0.12",
    ("trl.experimental.orpo.orpo_trainer", "trl.trainer.orpo_trainer"),
    "ORPOTrainer",
    "orpo_kernels.integrations.trl_orpo",
)
TRL_CPO = Trainer(
    "trl",
    "0.12",
    ("trl.experimental.cpo.cpo_trainer", "trl.trainer.cpo_trainer"),
    "CPOTrainer",
    "orpo_kernels.integrations.trl_cpo",
)
LLAMA_FACTORY = Trainer(
    "llamafactory",
    "0.9.5",
    ("llamafactory.train.dpo.trainer",),
    "CustomDPOTrainer",
    "orpo_kernels.integrations.llamafactory",
)
TRL = (TRL_ORPO, TRL_CPO)
# The oldest and the newest version of what patches and lazy logits were tried with: the record in docs/stacks.md.
TESTED = {"torch": ("2.9", "2.13"), "transformers": ("4.46", "5.24"), "trl": ("0.12", "1.16")}
TRAINERS = (*TRL, LLAMA_FACTORY)
LIGER = Trainer(
    "liger-kernel",
    "0.8.5",
    ("liger_kernel.chunked_loss.orpo_loss",),
    "LigerFusedLinearORPOLoss",
    "orpo_kernels.integrations.liger",
)


def patch_trl(
    *, objective: Objective | None = None, backend: str | None = None, workspace_bytes: int | None = None
) -> None:
    """Make TRL's ``ORPOTrainer`` and ``CPOTrainer`` and their subclasses compute their loss without full logits.

    Works before or after the classes were imported and for trainers that exist already. Patching twice is patching
    once, with the settings of the second. If one of the two is not there or not known, a warning says so.

    Args:
        objective: what both trainers are to train in place of their own loss: one of ``orpo_kernels.objectives``, or a
            callable of your own from ``PairLogps`` to losses. Its ``nll_weight`` is that of the NLL, 0 without one; of
            the trainer's options it reads none. One that needs a reference model reads the dataset's columns
            ``ref_chosen_logps`` and ``ref_rejected_logps``, sums over the answers as the trainer truncates them; one
            with margins reads ``margin``. A trainer that cannot be fused then raises, rather than train its own loss.
        backend: "auto" or a backend's name, as in ``orpo_loss``; None takes the environment's ``ORPO_KERNELS_BACKEND``,
            else "auto", under which a kernel that fails on its first call gives way to the torch backend.
        workspace_bytes: as in ``orpo_loss``; None takes ``ORPO_KERNELS_WORKSPACE_BYTES``, else the default.

    Raises:
        ImportError: trl is missing or has neither trainer in a form this package knows; the message says what would
            help.
        TypeError: objective is not one.
        ValueError: an objective without pairs, no such backend, or no such number of bytes.
    """
    if objective is not None:
        from orpo_kernels.pairs import check_objective

        check_objective(objective)
        if not getattr(objective, "paired", True):
            raise ValueError(
                f"{objective!r} trains sequences without partners, and these trainers have pairs: take "
                "objectives.SFT() on the pairs, or TRL's SFTTrainer under lazy logits"
            )
    known = _patches_of_trl()
    for trainer, patch in known.items():
        if isinstance(patch, ImportError):
            if all(isinstance(other, ImportError) for other in known.values()):
                raise patch
            logging.getLogger("orpo_kernels").warning("orpo_kernels: leaves %s alone: %s", trainer.target, patch)
        else:
            trainer.patch(backend, workspace_bytes, objective)


def unpatch_trl() -> None:
    """Give TRL's trainers their own methods back. Without a patch nothing happens."""
    for trainer in TRL:
        if trainer.integration in sys.modules:
            trainer.load().undo()


@contextmanager
def patched_trl(
    *, objective: Objective | None = None, backend: str | None = None, workspace_bytes: int | None = None
) -> Iterator[None]:
    """``patch_trl`` for the length of a ``with`` block; a patch that was there before stays after it."""
    patches = [patch for patch in _patches_of_trl().values() if not isinstance(patch, ImportError)]
    before = [(patch, patch.settings if patch.applied else None, patch.objective) for patch in patches]
    patch_trl(objective=objective, backend=backend, workspace_bytes=workspace_bytes)
    try:
        yield
    finally:
        for patch, settings, trained in before:
            if settings is None:
                patch.undo()
            else:
                patch.apply(settings, trained)


def _patches_of_trl() -> dict[Trainer, Any]:
    """The patch of each of TRL's trainers, or the error that says why there is none."""
    found: dict[Trainer, Any] = {}
    for trainer in TRL:
        try:
            found[trainer] = trainer.load()
        except ImportError as error:
            found[trainer] = error
    return found
