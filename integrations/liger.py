"""Liger's fused ORPO loss under its own name, constructor, call and outputs, computed by this package.

Where Liger computes every position, one pair at a time, with float32 copies of the log-softmax, this computes the
positions that count, and adds up the weight's gradient in float32 rather than in the weight's dtype. Where it differs:
an answer without a token makes Liger's loss and gradients NaN; here its pair leaves the odds term, with a warning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.engine import mean_logit
from orpo_kernels.integrations import LIGER
from orpo_kernels.integrations.trainer import Patch, Settings
from orpo_kernels.loss import orpo_loss
from orpo_kernels.settings import Head

__all__ = ["LigerFusedLinearORPOLoss", "patch_liger", "unpatch_liger"]

Outputs = tuple[Tensor, tuple[Tensor, ...]]


class LigerFusedLinearORPOLoss(nn.Module):
    """A drop-in for ``liger_kernel.chunked_loss.LigerFusedLinearORPOLoss``; Liger need not be installed.

    Args:
        ignore_index: the label of positions that do not count.
        beta: weight of the odds term.
        compute_nll_loss: False leaves the NLL out of the loss, and the output of its name is 0.
        compiled, chunk_size: how Liger trades time for memory, by torch.compile and by pairs at a time. They are kept
            as attributes for code that reads them and decide nothing here: no results depend on them in Liger either.
            What bounds memory here is ``ORPO_KERNELS_WORKSPACE_BYTES``, or ``patch_liger(workspace_bytes=...)``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Outputs:
        """The loss, which alone is differentiable, and nine figures.

        Args:
            lin_weight: the head ``[V, H]``.
            _input: hidden states ``[2P, T, H]``, chosen first.
            target: shifted labels ``[2P, T]`` of the answers.
            bias: the head's bias ``[V]``.
            nll_target: shifted labels of the NLL, ``[2P, T]``, of which the chosen half is read, or that half; None
                takes ``target``'s.

        Returns:
            ``loss, (chosen_logps [P], rejected_logps [P], chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards [P], rejected_rewards [P], log_odds_ratio, log_odds_chosen)``. Means of logits are over all
            positions, as Liger has them.

        Raises:
            TypeError, ValueError, RuntimeError: as ``orpo_loss``.
        """
        # Under ``patch_liger`` this is the forward of Liger's own class.
        own = isinstance(self, LigerFusedLinearORPOLoss)
        settings = Settings.chosen(None, None) if own else _patch().settings
        out = orpo_loss(
            _input,
            lin_weight,
            target,
            nll_labels=nll_target,
            bias=bias,
            beta=self.beta,
            nll_weight=1.0 if self.compute_nll_loss else 0.0,
            ignore_index=self.ignore_index,
            **settings._asdict(),
        )
        with torch.no_grad():
            sides = _input.detach().flatten(0, 1).chunk(2)
            chosen, rejected = (mean_logit(side, Head(lin_weight, bias), settings.backend) for side in sides)
        nll = out.nll_loss if self.compute_nll_loss else torch.zeros_like(out.nll_loss)
        of_pairs = (
            out.chosen_logps,
            out.rejected_logps,
            chosen,
            rejected,
            nll,
            out.chosen_rewards,
            out.rejected_rewards,
        )
        return out.loss, (*of_pairs, out.log_odds_ratio, out.log_odds_chosen)


def _patch() -> Patch:
    """The patch of Liger's class, which imports Liger.

    Raises:
        ImportError: Liger is missing or has no such class; the message says what would help.
    """
    if "PATCH" not in globals():
        globals()["PATCH"] = Patch(LIGER.find_class(), {"forward": LigerFusedLinearORPOLoss.forward}, ())
    patch: Patch = globals()["PATCH"]
    return patch


def __getattr__(name: str) -> Any:
    """``PATCH``, when it is asked for: the class above needs no Liger."""
    if name == "PATCH":
        return _patch()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def patch_liger(*, backend: str | None = None, workspace_bytes: int | None = None) -> None:
    """Make Liger's own ``LigerFusedLinearORPOLoss`` compute as the class above does.

    The method of the class is replaced, so it holds for code that imported the class before, for instances that exist,
    and for subclasses that do not bring a ``forward`` of their own. Patching twice is patching once, with the settings
    of the second.

    Args:
        backend, workspace_bytes: as ``patch_trl`` has them.

    Raises:
        ImportError: Liger is missing or has no such class; the message says what would help.
        ValueError: no such backend, or no such number of bytes.
    """
    LIGER.patch(backend, workspace_bytes)


def unpatch_liger() -> None:
    """Give Liger's class its own method back. Without a patch nothing happens."""
    if "PATCH" in globals():
        _patch().undo()
