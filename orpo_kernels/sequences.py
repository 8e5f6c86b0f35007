"""Log-probabilities of whole answers, as losses against a reference model ask for them."""

from __future__ import annotations

from torch import Tensor

from orpo_kernels.backends import Backend
from orpo_kernels.checks import check_cu_seqlens, shape
from orpo_kernels.loss import linear_logprobs
from orpo_kernels.shards import Shard
from orpo_kernels.targets import sums_of_sequences


def sequence_logprobs(
    hidden: Tensor,  # [S, T, H] or packed [N, H]; float32, bfloat16, float16 or float64
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [S, T] or packed [N]; integers
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shard: Shard | None = None,
    ignore_index: int = -100,
    backend: str | Backend = "auto",
    workspace_bytes: int | None = None,
    average: bool = False,
) -> Tensor:
    """The sum of ``linear_logprobs`` over each sequence, without full logits; any upstream gradient.

    Of a reference model under ``torch.no_grad()`` it is what ``preference_loss`` takes as ``reference_logps``, chosen
    sequences first.

    Args:
        hidden: hidden states ``[S, T, H]`` of any number of sequences, or packed ``[N, H]`` with ``cu_seqlens``.
        weight: the head ``[V, H]``.
        labels: shape of hidden without its last dimension, shifted; ``ignore_index`` outside the answers.
        cu_seqlens: ``[S + 1]`` offsets of packed sequences, from 0 to N; a sequence may be empty.
        average: the mean over an answer's tokens in place of their sum.
        bias, logit_scale, softcap, shard, ignore_index, backend, workspace_bytes: as ``preference_loss`` has them.

    Returns:
        ``[S]``, float32 (float64 for float64 inputs), nats; 0 for an answer without a token.

    Raises:
        TypeError, ValueError, RuntimeError: as ``linear_logprobs``, and cu_seqlens or a hidden that do not fit.

    Precision and products: as ``linear_logprobs``; two runs give the same bits. With cu_seqlens a GPU is waited for
    once more, to check them; inside ``torch.compile`` their values are not checked.
    """
    if isinstance(hidden, Tensor):  # what else it may be, linear_logprobs says
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, hidden, pairs=False)
        elif hidden.dim() != 3:
            raise ValueError(
                f"hidden must be [S, T, H] without cu_seqlens, got shape {shape(hidden)}: pass cu_seqlens for packed "
                "input"
            )
    logps = linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        shard=shard,
        ignore_index=ignore_index,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    sums = sums_of_sequences(logps, cu_seqlens)
    if not average:
        return sums
    lengths = sums_of_sequences((labels != ignore_index).to(logps.dtype), cu_seqlens)
    return sums / lengths.clamp(min=1)
