"""Chains of the ORPO paper, LLaMA-Factory, Axolotl, OpenRLHF, verl and ms-swift, rewritten from their description."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.lazy.catalogue import (
    IGNORE,
    KEEP,
    TEMPERATURE,
    Batch,
    Result,
    answers,
    batch_logps,
    chain,
    dpo,
    entropy_from_logits,
    gathered,
    kto,
    odds_ratio,
    policy_gradient,
    selective_log_softmax,
    shifted_nll,
    simpo,
    upcast,
)

# ---- ORPO paper


@chain("xfactlab/orpo", logprobs=True)
def orpo_paper(logits: Tensor, batch: Batch) -> Result:
    """Masked positions gather token 0: the mask is in the index and again after the gather; sums are in float64."""
    mask = batch.mask[:, 1:].int()
    index = (mask * batch.ids[:, 1:]).unsqueeze(2)
    per_token = torch.gather(logits[:, :-1, :].log_softmax(-1), dim=2, index=index).squeeze(2)
    means = (per_token * mask.to(torch.bfloat16)).sum(dim=1).to(torch.float64) / mask.sum(dim=1).to(torch.float64)
    nll = shifted_nll(upcast(logits[: batch.pairs]), batch.labels[: batch.pairs])
    return Result(nll + odds_ratio(means, batch.pairs), {"means": means, "nll": nll})


@chain("xfactlab/orpo", logprobs=True)
def orpo_paper_custom_loss(logits: Tensor, batch: Batch) -> Result:
    shift = logits.contiguous()[..., :-1, :].contiguous()
    losses = F.cross_entropy(shift.transpose(2, 1), batch.labels[..., 1:], reduction="none", ignore_index=IGNORE)
    return Result(losses.mean(dim=-1).mean(), {"losses": losses})


# ---- LLaMA-Factory


@chain("LLaMA-Factory DPO, ORPO, SimPO")
def llamafactory_dpo(logits: Tensor, batch: Batch) -> Result:
    """The means of all positions are taken with gradient and leave by ``item()``."""
    logits = upcast(logits)
    sums, lengths = batch_logps(logits, batch.labels)
    chosen_logits, rejected_logits = logits.split(batch.pairs, dim=0)
    chosen, rejected = chosen_logits.mean().item(), rejected_logits.mean().item()
    loss = odds_ratio(sums / lengths, batch.pairs) + simpo(sums / lengths, batch.pairs)
    means = torch.tensor([chosen, rejected], dtype=torch.float64)
    return Result(loss, {"sums": sums, "means": means})


@chain("LLaMA-Factory KTO")
def llamafactory_kto(logits: Tensor, batch: Batch) -> Result:
    logits = upcast(logits)
    sums, _ = batch_logps(logits, batch.labels)
    good, bad = logits[batch.desirable], logits[~batch.desirable]
    totals = torch.tensor([good.nansum().item(), bad.nansum().item()], dtype=torch.float64)
    return Result(kto(sums, batch), {"sums": sums, "totals": totals})


@chain("LLaMA-Factory SFT, dft", logprobs=True)
def llamafactory_dft(logits: Tensor, batch: Batch) -> Result:
    logits = upcast(logits)
    vocab = logits.size(-1)
    labels = F.pad(batch.labels, (0, 1), value=IGNORE)[..., 1:].contiguous().view(-1)
    per_token = F.cross_entropy(logits.view(-1, vocab), labels, ignore_index=IGNORE, reduction="none")
    valid = labels != IGNORE
    per_token = per_token[valid]
    return Result((per_token * torch.exp(-per_token.detach())).sum() / valid.sum(), {"per_token": per_token})


@chain("LLaMA-Factory, Axolotl SFT, eaft", passes=2)
def llamafactory_eaft(logits: Tensor, batch: Batch) -> Result:
    """Each token is weighted by the entropy of its twenty best."""
    logits = upcast(logits)
    labels = F.pad(batch.labels, (0, 1), value=IGNORE)[..., 1:].contiguous().view(-1)
    source = logits.view(-1, logits.size(-1))
    per_token = F.cross_entropy(source, labels, ignore_index=IGNORE, reduction="none")
    valid = labels != IGNORE
    top = torch.topk(source[valid].detach(), k=20, dim=-1).values
    logps = top - torch.logsumexp(top, dim=-1, keepdim=True)
    weight = -(logps.exp() * logps).sum(-1) / 3.0
    return Result((per_token[valid] * weight).mean(), {"weight": weight})


@chain("LLaMA-Factory SFT, asft", lazy=False)
def llamafactory_asft(logits: Tensor, batch: Batch) -> Result:
    source = upcast(logits)[:, :-1].reshape(-1, logits.size(-1))
    labels = batch.labels[:, 1:].reshape(-1)
    valid = labels != IGNORE
    per_token = F.cross_entropy(source, labels, ignore_index=IGNORE, reduction="none")[valid]
    probability = F.softmax(source[valid], dim=-1)
    reference = F.softmax(upcast(batch.reference_logits)[:, :-1].reshape(-1, logits.size(-1))[valid], dim=-1)
    divergence = F.kl_div(probability.log(), reference, reduction="none").sum(-1)
    weighted = per_token * torch.exp(-per_token.detach()) + 0.05 * divergence
    return Result(weighted.mean(), {"divergence": divergence})


@chain("LLaMA-Factory metrics")
def llamafactory_metric(logits: Tensor, batch: Batch) -> Result:
    logits = (logits,)[0] if isinstance((logits,), tuple) else logits
    assert logits.dim() == 3
    return Result(None, {"predictions": torch.argmax(logits, dim=-1)})


@chain("LLaMA-Factory v1")
def llamafactory_v1(logits: Tensor, batch: Batch) -> Result:
    """The width of the view is inferred; the mean over V is taken with gradient."""
    shift = upcast(logits)[..., :-1, :].contiguous()
    labels = batch.labels[..., 1:].contiguous().view(-1)
    flat = shift.view(labels.numel(), -1)
    per_token = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="none")
    mask = (labels != IGNORE).view(shift.shape[:2])
    means = shift.mean(-1) * mask
    return Result(per_token.sum() / mask.sum() + 0.01 * means.mean(), {"per_token": per_token, "means": means})


# ---- Axolotl


@chain("Axolotl ORPO", logprobs=True)
def axolotl_orpo(logits: Tensor, batch: Batch) -> Result:
    """Cross-entropy of logits whose last two dimensions are transposed, then log-probabilities of each half."""
    n = batch.pairs
    chosen, rejected = logits.chunk(2)
    shift = chosen.contiguous()[..., :-1, :].contiguous()
    losses = F.cross_entropy(shift.transpose(2, 1), batch.labels[:n, 1:], reduction="none")
    nll = losses.mean(dim=-1).mean()
    means = []
    for half, ids, mask in zip((chosen, rejected), batch.ids.chunk(2), batch.mask.chunk(2), strict=True):
        index = (mask[:, 1:] * ids[:, 1:]).unsqueeze(2)
        logps = torch.gather(half[:, :-1, :].log_softmax(-1), dim=2, index=index).squeeze(2)
        means.append((logps * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1))
    together = torch.cat(means)
    return Result(nll + odds_ratio(together, n), {"means": together, "losses": losses})


@chain("Axolotl GRPO, async", logprobs=True, passes=2)
def axolotl_grpo_async(logits: Tensor, batch: Batch) -> Result:
    """All sequences are packed in one row, which is taken apart again; the zero keeps every parameter in the graph."""
    packed = torch.nan_to_num(logits.view(1, -1, logits.shape[-1]))
    ids = batch.ids.view(1, -1)
    logps = selective_log_softmax((packed[0, :-1, :] / TEMPERATURE).unsqueeze(0), ids[:, 1:])
    length = batch.ids.shape[1]
    rows = [logps[0, start : start + length - 1] for start in range(0, ids.shape[1], length)]
    kept = torch.stack(rows)[:, -KEEP:]
    loss = policy_gradient(kept, batch.attention[:, -KEEP:], batch, KEEP)
    return Result(loss + logits.sum() * 0, {"logps": kept})


@chain("Axolotl GRPO, packed sequences")
def axolotl_grpo_packed(logits: Tensor, batch: Batch) -> Result:
    """Each sequence is cut out of the packed row by itself."""
    packed, length = logits.view(1, -1, logits.shape[-1]), batch.ids.shape[1]
    logps, entropies = [], []
    for row, ids in enumerate(batch.ids):
        sequence = packed[0, row * length : (row + 1) * length - 1, :]
        logps.append(gathered(sequence, ids[1:]))
        entropies.append(entropy_from_logits(sequence.detach()))
    together = torch.stack(logps)
    loss = policy_gradient(together, batch.attention[:, 1:], batch, length - 1)
    return Result(loss, {"logps": together, "entropies": torch.stack(entropies)})


@chain("Axolotl chunked cross-entropy", logprobs=True)
def axolotl_chunked_cross_entropy(logits: Tensor, batch: Batch) -> Result:
    labels = F.pad(batch.labels, (0, 1), value=IGNORE)[..., 1:]
    total = logits.new_zeros((), dtype=upcast(batch.advantages).dtype)
    for part, target in zip(logits.chunk(3, dim=1), labels.chunk(3, dim=1), strict=True):
        flat = part.reshape(-1, part.size(-1))
        total = total + F.cross_entropy(upcast(flat), target.reshape(-1), ignore_index=IGNORE, reduction="sum")
    return Result(total / (labels != IGNORE).sum(), {})


@chain("Axolotl distillation of the teacher's best")
def axolotl_kd(logits: Tensor, batch: Batch) -> Result:
    teacher, index = batch.reference_logits[:, :-1].topk(6, dim=-1)
    target = torch.softmax(upcast(teacher), dim=-1)
    student = logits[:, :-1]
    logps = upcast(torch.gather(student, dim=-1, index=index)) - torch.logsumexp(upcast(student), -1, keepdim=True)
    per_token = (target * (target.log() - logps)).sum(-1)
    mask = batch.mask[:, 1:]
    return Result(per_token[mask].sum() / mask.sum(), {"per_token": per_token})


# ---- OpenRLHF


@chain("OpenRLHF log_probs_from_logits", logprobs=True, in_place=True)
def openrlhf_logprobs(logits: Tensor, batch: Batch) -> Result:
    """Rows are taken in slices and written into a buffer; 16 bits go sequence by sequence."""
    output = {"logits": logits}
    output["logits"] = upcast(output["logits"])
    logits, labels = output["logits"][:, :-1], batch.ids[:, 1:]
    logits.div_(TEMPERATURE)
    flat, index = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logps = torch.zeros(index.shape, dtype=flat.dtype)
    for start in range(0, len(index), 16):
        part, picked = flat[start : start + 16], index[start : start + 16]
        chosen = part.gather(dim=-1, index=picked.unsqueeze(-1)).squeeze(-1)
        logps[start : start + 16] = chosen - torch.logsumexp(part, dim=-1)
    logps = logps.view(labels.shape)
    return Result(policy_gradient(logps, batch.attention[:, 1:], batch, labels.shape[1]), {"logps": logps})


@chain("OpenRLHF log_probs_from_logits, 16 bits", logprobs=True)
def openrlhf_logprobs_16(logits: Tensor, batch: Batch) -> Result:
    rows = []
    for row, labels in zip(logits[:, :-1], batch.ids[:, 1:], strict=True):
        rows.append(F.log_softmax(row, dim=-1).gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1))
    logps = torch.stack(rows)
    return Result(policy_gradient(logps, batch.attention[:, 1:], batch, logps.shape[1]), {"logps": logps})


@chain("OpenRLHF compute_entropy")
def openrlhf_entropy(logits: Tensor, batch: Batch) -> Result:
    """With gradient: an entropy bonus beside the policy's loss."""
    logits = upcast(logits)
    probabilities = F.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)
    logps = gathered(logits[:, :-1], batch.ids[:, 1:])
    bonus = (entropy * batch.attention).sum() / batch.attention.sum()
    loss = policy_gradient(logps, batch.attention[:, 1:], batch, logps.shape[1]) - 0.1 * bonus
    return Result(loss, {"entropy": entropy, "logps": logps})


@chain("OpenRLHF GPTLMLoss", logprobs=True)
def openrlhf_gpt_loss(logits: Tensor, batch: Batch) -> Result:
    shift = logits[..., :-1, :].contiguous()
    labels = batch.labels[..., 1:].contiguous()
    loss = F.cross_entropy(shift.view(-1, shift.size(-1)), labels.view(-1), ignore_index=IGNORE)
    return Result(loss + shift.mean() * 0, {})


@chain("OpenRLHF KDLoss", lazy=False)
def openrlhf_kd(logits: Tensor, batch: Batch) -> Result:
    teacher = F.softmax(batch.reference_logits, dim=-1)
    infinite = torch.isinf(logits)
    products = torch.masked_fill(teacher * F.log_softmax(logits, dim=-1), infinite, 0)
    per_token = products.sum(dim=-1).view(-1)
    mask = (batch.labels != IGNORE).view(-1)
    return Result(-(per_token * mask).sum() / mask.sum(), {"per_token": per_token})


# ---- verl


def _packed(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[1, B T, V] as the model gives without padding, and the next token of each position."""
    return logits.view(1, -1, logits.shape[-1]), torch.roll(batch.ids.view(1, -1), shifts=-1, dims=1).squeeze(0)


@chain("verl", in_place=True)
def verl_actor(logits: Tensor, batch: Batch) -> Result:
    packed, index = _packed(logits, batch)
    flat = packed.squeeze(0)
    flat.div_(TEMPERATURE)
    chosen = torch.gather(flat, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    logps = chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in flat])
    logps = logps.view(batch.ids.shape)[:, :-1]
    entropy = entropy_from_logits(flat)
    loss = policy_gradient(logps, batch.attention[:, 1:], batch, logps.shape[1]) - 0.01 * entropy.mean()
    return Result(loss, {"logps": logps, "entropy": entropy})


@chain("verl, a temperature for each token", logprobs=True, in_place=True, unless=("bias", "softcap"))
def verl_token_temperature(logits: Tensor, batch: Batch) -> Result:
    packed, index = _packed(logits, batch)
    flat = packed.squeeze(0)
    flat.div_(batch.token_temperature.view(-1).unsqueeze(-1))
    logps = gathered(flat, index).view(batch.ids.shape)[:, :-1]
    return Result(policy_gradient(logps, batch.attention[:, 1:], batch, logps.shape[1]), {"logps": logps})


def _entropy(logits: Tensor) -> Tensor:
    probabilities = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)


@chain("verl, entropy under a checkpoint")
def verl_checkpointed_entropy(logits: Tensor, batch: Batch) -> Result:
    packed, index = _packed(logits, batch)
    flat = packed.squeeze(0)
    entropy = checkpoint(_entropy, flat, use_reentrant=False)
    return Result(-gathered(flat, index).mean() - 0.1 * entropy.mean(), {"entropy": entropy})


@chain("verl, sum of squared probabilities")
def verl_sum_of_squares(logits: Tensor, batch: Batch) -> Result:
    packed, index = _packed(logits, batch)
    flat = packed.squeeze(0)
    with torch.no_grad():
        squares = torch.exp(torch.logsumexp(2.0 * flat, dim=-1) - 2.0 * torch.logsumexp(flat, dim=-1))
    logps = gathered(flat, index)
    return Result(-(logps * (1 - squares)).mean(), {"squares": squares, "logps": logps})


# ---- ms-swift


@chain("ms-swift DPO")
def swift_dpo(logits: Tensor, batch: Batch) -> Result:
    """The mean over V is taken of every position with gradient, and masked as a number."""
    assert logits.shape[:-1] == batch.labels.shape
    index, mask = answers(batch)
    shifted = logits[:, :-1]
    means = shifted.mean(-1)
    logps = selective_log_softmax(shifted, index).masked_fill(~mask, 0)
    values = {"logps": logps, "means": means[mask], "sums": shifted.sum(-1)[mask]}
    return Result(dpo(logps.sum(-1), batch), values)


@chain("ms-swift GRPO", in_place=True)
def swift_grpo(logits: Tensor, batch: Batch) -> Result:
    outputs = {"logits": logits}
    outputs["logits"] = outputs["logits"][:, -(KEEP + 1) : -1, :]
    kept = outputs["logits"]
    kept.div_(TEMPERATURE)
    logps = selective_log_softmax(kept, batch.ids[:, -KEEP:])
    with torch.no_grad():
        entropy = entropy_from_logits(kept)
    values = {"logps": logps, "entropy": entropy}
    return Result(policy_gradient(logps, batch.attention[:, -KEEP:], batch, KEEP), values)


@chain("ms-swift SFT")
def swift_sft(logits: Tensor, batch: Batch) -> Result:
    labels = torch.roll(batch.labels, shifts=-1, dims=-1).view(-1)
    flat = upcast(logits).view(-1, logits.shape[-1])
    per_token = F.cross_entropy(flat, labels, reduction="none")
    with torch.no_grad():
        predictions = logits.argmax(dim=-1)
    valid = labels != IGNORE
    return Result(per_token.sum() / valid.sum(), {"per_token": per_token, "predictions": predictions})
