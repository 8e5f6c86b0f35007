"""What a call is made of: every keyword of the public functions once, with what it means and its check.

``Head`` and ``Batch`` hold tensors, ``Settings`` everything else; their field names are the keywords' names. A new
keyword is a field here, a line in its check, and the parameter of the function that takes it.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.shards import Shard


class Head(NamedTuple):
    """The map from hidden states to logits: ``z = cap(logit_scale * (hidden @ weight.T + bias))``."""

    weight: Tensor  # [V, H], as nn.Linear has it
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0  # factor on the logits, positive
    softcap: float | None = None  # cap(z) = softcap * tanh(z / softcap), or None for no cap
    shard: Shard | None = None  # how the vocabulary is split over ranks; weight and bias are then this rank's rows
    # [V, r], what the last r columns of weight are copies of, in its dtype or a wider one: it takes the weight's
    # gradient, and the columns before it have none. An adapter beside a frozen head, which no keyword names.
    tail: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        """What takes the weight's gradient: the weight, or the tail where there is one."""
        return self.weight if self.tail is None else self.tail

    @property
    def vocab(self) -> int:
        """Tokens that ``weight`` has."""
        return self.weight.shape[0]

    @property
    def whole_vocab(self) -> int:
        return self.vocab if self.shard is None else self.shard.vocab

    @property
    def widest(self) -> int:
        """Tokens of the rank that holds most."""
        return self.vocab if self.shard is None else self.shard.widest

    @property
    def features(self) -> int:
        return self.weight.shape[1]

    def places(self, tokens: Tensor) -> Tensor:
        """Rows of ``weight``, -1 for tokens whose rows another rank holds."""
        return tokens if self.shard is None else self.shard.places(tokens)

    def cap(self, logits: Tensor) -> Tensor:
        """``softcap * tanh(logits / softcap)``, or the logits themselves without a softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Capped logits ``[n, tokens]`` of ``hidden [n, H]``, multiplied in its dtype and then in float32 or wider.

        float16 is multiplied in float32, as its logits may pass 65,504.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        product = dtype if hidden.dtype == torch.float16 else hidden.dtype
        bias = None if self.bias is None else self.bias[tokens].to(product)
        raw = F.linear(hidden.to(product), self.weight[tokens].to(product), bias).to(dtype)
        return self.cap(raw if self.logit_scale == 1 else raw * self.logit_scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """``d cap(z) / dz``: ``1 / cosh^2(z / softcap)``, which keeps its relative precision where tanh saturates."""
        return 1.0 if self.softcap is None else torch.cosh(logits / self.softcap) ** -2

    def slope_of_capped(self, capped: Tensor) -> Tensor | float:
        """The same, ``1 - (capped / softcap)^2``, where no more than the capped logit is known."""
        return 1.0 if self.softcap is None else 1 - (capped / self.softcap) ** 2

    def detached(self) -> Head:
        """The same head, unknown to autograd."""
        bias, tail = (None if tensor is None else tensor.detach() for tensor in (self.bias, self.tail))
        return self._replace(weight=self.weight.detach(), bias=bias, tail=tail)


class Batch(NamedTuple):
    """Tensors of a call that autograd does not track."""

    labels: Tensor  # [2P, T] or packed [N]: the token that each hidden row predicts, ignore_index where it is no answer
    nll_labels: Tensor | None = None  # [P, T] or the shape of labels; None takes the chosen side of labels
    cu_seqlens: Tensor | None = None  # [2P + 1], offsets of packed sequences, chosen first
    reference_logps: Tensor | None = None  # [2P], a reference model's sums over the answers, chosen first, nats
    margins: Tensor | None = None  # [P], a number for each pair that the objective may use
    answer_weights: Tensor | None = None  # the shape of labels, what each log-probability counts in its answer's sum

    def of_pairs(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The reference model's sums, chosen and rejected, and the margins, ``[P]`` each."""
        margins = None if self.margins is None else self.margins.to(dtype)
        if self.reference_logps is None:
            return None, None, margins
        chosen, rejected = self.reference_logps.to(dtype).view(2, -1).unbind()
        return chosen, rejected, margins


class Settings(NamedTuple):
    """Everything of a call that is no tensor."""

    objective: Any = None  # an objectives.Objective; None for log-probabilities alone
    nll_weight: float | None = None  # weight of the NLL; None takes the objective's own
    nll_reduction: str = "token"  # mean over all NLL tokens, or "sequence": mean over sequences of their means
    ignore_index: int = -100  # the label of positions that do not count
    backend: Any = "auto"  # or a backend's name, or a backends.Backend
    workspace_bytes: int | None = None  # bound on what is held beyond inputs and returned gradients
    sequence_group: Any = None  # a ProcessGroup over whose ranks the positions of every sequence are split

    @property
    def weight_of_nll(self) -> float:
        """``nll_weight``, or the objective's own: 1 for ORPO, 0 for an objective that names none."""
        return float(getattr(self.objective, "nll_weight", 0.0) if self.nll_weight is None else self.nll_weight)

    @property
    def paired(self) -> bool:
        """Whether sequences come as chosen ones and then their rejected ones, or all as chosen ones."""
        return bool(getattr(self.objective, "paired", True))


class Needs(NamedTuple):
    """Which gradients autograd asks for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias

    @staticmethod
    def of(hidden: Tensor, head: Head) -> Needs:
        """What the tensors ask for now."""
        if not torch.is_grad_enabled():
            return Needs(False, False, False)
        bias = head.bias
        return Needs(hidden.requires_grad, head.trained.requires_grad, bias is not None and bias.requires_grad)


def number(name: str, value: Any, *, positive: bool = False, signed: bool = False) -> float:
    """A finite number that is not negative, is ``positive``, or is ``signed`` and may be either, as a float.

    Raises:
        TypeError: not a number; a tensor would be detached without a word.
        ValueError: out of range, infinite or NaN.
    """
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a tensor, whose gradient would be lost: pass float({name}), and to train it "
            "multiply hidden by it"
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or (found < 0 and not signed) or (positive and found == 0):
        rest = "" if signed else " and positive" if positive else " and not negative"
        raise ValueError(f"{name} must be finite{rest}, got {found}")
    return found


def checked_head(head: Head) -> Head:
    """The head with its numbers checked; its tensors are ``checks.check_tensors``'s.

    Raises:
        TypeError, ValueError: as ``number``.
    """
    softcap = head.softcap
    if softcap is not None:
        try:
            softcap = number("softcap", softcap, positive=True)
        except ValueError as error:
            raise ValueError(f"softcap must be finite and positive, or None for no softcap, got {softcap}") from error
    if head.shard is not None and not isinstance(head.shard, Shard):
        raise TypeError(f"shard must be an orpo_kernels.Shard or None, got {type(head.shard).__name__}")
    return head._replace(logit_scale=number("logit_scale", head.logit_scale, positive=True), softcap=softcap)


def checked(settings: Settings) -> Settings:
    """The settings, each checked.

    Raises:
        TypeError, ValueError: a setting that cannot be right; the message names it.
    """
    if settings.nll_weight is not None:
        settings = settings._replace(nll_weight=number("nll_weight", settings.nll_weight))
    if settings.nll_reduction not in ("token", "sequence"):
        raise ValueError(f"nll_reduction must be 'token' or 'sequence', got {settings.nll_reduction!r}")
    if isinstance(settings.ignore_index, bool) or not isinstance(settings.ignore_index, Integral):
        raise TypeError(f"ignore_index must be an integer, as -100, got {type(settings.ignore_index).__name__}")
    most = settings.workspace_bytes
    if most is not None and (isinstance(most, bool) or not isinstance(most, Integral) or most <= 0):
        raise ValueError(f"workspace_bytes must be a positive number of bytes or None, got {most!r}")
    group = settings.sequence_group
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"sequence_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}: of a "
            "DeviceMesh pass .get_group()"
        )
    return settings._replace(
        ignore_index=int(settings.ignore_index), workspace_bytes=None if most is None else int(most)
    )
