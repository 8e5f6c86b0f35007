"""What a trainer's patch is: the methods it replaces, where it can fuse and why not, what it says and logs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orpo_kernels.backends import available
from orpo_kernels.loss import PreferenceOutput, metrics_of
from orpo_kernels.pairs import Objective

BACKEND_VARIABLE = "ORPO_KERNELS_BACKEND"
WORKSPACE_VARIABLE = "ORPO_KERNELS_WORKSPACE_BYTES"

logger = logging.getLogger("orpo_kernels")


class Settings(NamedTuple):
    """How fused losses are computed under a patch; the arguments of these names of ``orpo_loss``."""

    backend: str = "auto"
    workspace_bytes: int | None = None

    @staticmethod
    def chosen(backend: str | None, workspace_bytes: int | None) -> Settings:
        """The arguments, where they are None the environment's, else the defaults.

        Raises:
            ValueError: no backend has that name, or the workspace is no positive integer; the message names its source.
        """
        source = "backend" if backend is not None else BACKEND_VARIABLE
        backend = backend or os.environ.get(BACKEND_VARIABLE) or "auto"
        names = sorted(known.name for known in available())
        if backend != "auto" and backend not in names:
            raise ValueError(f"{source} must be 'auto' or one of {names}, got {backend!r}")
        given = os.environ.get(WORKSPACE_VARIABLE) if workspace_bytes is None else str(workspace_bytes)
        if not given:
            return Settings(backend)
        if not given.isdecimal() or int(given) == 0:
            source = WORKSPACE_VARIABLE if workspace_bytes is None else "workspace_bytes"
            raise ValueError(f"{source} must be a positive number of bytes, got {given!r}")
        return Settings(backend, int(given))


class Patch:
    """Replaced methods of a trainer class.

    Args:
        owner: the trainer class.
        replacements: methods by name.
        stands_for: further methods whose work the replacements do, so that a trainer with its own keeps its path.

    Raises:
        ImportError: the class lacks one of the methods.
    """

    def __init__(self, owner: type, replacements: dict[str, Callable[..., Any]], stands_for: tuple[str, ...]) -> None:
        self.owner, self.replacements, self.stands_for = owner, replacements, stands_for
        self.stock: dict[str, Any] = {}
        self.settings = Settings()
        self.objective: Objective | None = None  # in place of the trainer's own
        missing = [name for name in (*replacements, *stands_for) if not hasattr(owner, name)]
        if missing:
            raise ImportError(
                f"{owner.__module__}.{owner.__name__} has no {', '.join(missing)}, so this version of its library is "
                "not one that its patch knows"
            )

    @property
    def applied(self) -> bool:
        return bool(self.stock)

    def apply(self, settings: Settings, objective: Objective | None = None) -> None:
        """Replace the methods, or give the ones in place other settings and another objective."""
        self.settings, self.objective = settings, objective
        if not self.applied:
            self.stock = {name: self.owner.__dict__[name] for name in (*self.replacements, *self.stands_for)}
            for name, method in self.replacements.items():
                setattr(self.owner, name, method)

    def undo(self) -> None:
        """Put the methods back; without a patch nothing happens."""
        for name in self.replacements if self.applied else ():
            setattr(self.owner, name, self.stock[name])
        if self.applied:
            # Imported where it is used: torch._dynamo behind it loads Triton, and the launcher reads this module before
            # a script has set what its libraries read.
            from orpo_kernels.integrations.detours import leave_nothing

            leave_nothing()
        self.stock, self.objective = {}, None

    def own_method(self, trainer: Any, names: tuple[str, ...]) -> str | None:
        """The first of these methods that the trainer, its class or a later patch brings itself, as a sentence."""
        library = self.owner.__module__.partition(".")[0]
        for name in names:
            found = _function(getattr(trainer, name))
            if found is self.replacements.get(name):
                found = _function(self.stock[name])
            home = getattr(found, "__globals__", {}).get("__name__", "")  # __module__ may be carried by a wrapper
            if found is _function(self.stock[name]) and home.partition(".")[0] == library:
                continue
            whose = "had its {} replaced" if name in vars(trainer) or type(trainer) is self.owner else "overrides {}"
            return f"{type(trainer).__name__} {whose.format(name)}, which a fused loss would pass by"
        return None


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


class Site(NamedTuple):
    """Where a trainer's model can be fused."""

    base: nn.Module  # the module whose call returns the model's output, without DDP or torch.compile around it
    model: nn.Module  # the Hugging Face model, without peft around it
    head: nn.Module  # an nn.Linear, or peft's layer around one


def find_site(trainer: Any, model: nn.Module) -> Site | str:
    """Where to fuse in a ``transformers.Trainer``, or the reason why this one and its model keep their own path."""
    from orpo_kernels.integrations.detours import uncompiled  # not at the top, as above
    from orpo_kernels.integrations.hf_head import head_module

    if isinstance(model, nn.DataParallel):
        return "nn.DataParallel replicates the model in threads: use one process a GPU (torchrun)"
    # accelerate would look behind torch.compile's wrapper too, and change what the wrapper names as its module.
    base = uncompiled(trainer.accelerator.unwrap_model(uncompiled(model)))
    inner = uncompiled(base.get_base_model()) if hasattr(base, "get_base_model") else base
    head = head_module(inner)
    return head if isinstance(head, str) else Site(base, inner, head)


@torch.no_grad()
def metrics_of_all_ranks(accelerator: Any, out: PreferenceOutput, logps: tuple[Tensor, Tensor]) -> dict[str, float]:
    """``out.metrics()`` over all ranks with one collective and one copy to the host.

    As accelerate's ``gather_for_metrics`` does for each value by itself, samples that a sampler repeated to fill the
    last batch of a data loader are dropped.

    Args:
        logps: what is to be logged as log-probabilities of the chosen and the rejected answers, ``[P]`` each.
    """
    names = ("chosen_rewards", "rejected_rewards", "valid", "chosen_logits_mean", "rejected_logits_mean", "nll_loss")
    own = out.objective_metrics
    values = [*(getattr(out, name) for name in names), *logps, *own.values()]
    dtype = out.loss.dtype
    of_ranks = accelerator.gather(torch.cat([value.detach().to(dtype).reshape(-1) for value in values])[None])
    state = accelerator.gradient_state
    kept = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
    parts = of_ranks.split([value.numel() for value in values], dim=1)
    gathered = [
        part.reshape(-1)[:kept].to(value.dtype) if value.dim() else part.reshape(-1)[:kept].mean()
        for part, value in zip(parts, values, strict=True)
    ]
    fields, (chosen, rejected), rest = gathered[: len(names)], gathered[len(names) :][:2], gathered[len(names) + 2 :]
    everywhere = out._replace(**dict(zip(names, fields, strict=True)))
    metrics = {**metrics_of(everywhere, chosen, rejected), **dict(zip(own, rest, strict=True))}
    return dict(zip(metrics, torch.stack([value.to(dtype) for value in metrics.values()]).tolist(), strict=True))


def keeps_stock(trainer: Any, reason: str) -> None:
    """Say once per trainer that its loss is not fused, and why."""
    if first(trainer, "unfused"):
        say(trainer, logging.WARNING, f"does not fuse the loss of this {type(trainer).__name__}: {reason}")


def first(trainer: Any, what: str) -> bool:
    """Whether this is to be said of a trainer for the first time; some trainers cannot be hashed."""
    said: set[str] = vars(trainer).setdefault("_orpo_kernels_said", set())
    first = what not in said
    said.add(what)
    return first


def say(trainer: Any, level: int, line: str) -> None:
    """One line a machine. A program that configures no logging finds it on stderr all the same."""
    if not trainer.accelerator.is_local_main_process:
        return
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.log(level, "orpo_kernels: %s", line)
