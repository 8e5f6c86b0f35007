"""Chains of every generation of TRL, rewritten from their description."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.lazy.catalogue import (
    IGNORE,
    KEEP,
    PROMPT,
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

# ---- TRL 1.16


@chain("TRL 1.16 ORPO")
def trl_orpo(logits: Tensor, batch: Batch) -> Result:
    n = batch.pairs
    nll = shifted_nll(logits[:n], batch.labels[:n])
    assert logits.shape[:-1] == batch.labels.shape
    index, mask = answers(batch)
    shifted = logits[:, :-1, :]
    logps = selective_log_softmax(shifted, index)
    means = (logps * mask).sum(-1) / mask.sum(-1)
    metrics = {"chosen": shifted[:n].detach().mean(), "rejected": shifted[n:].detach().mean()}
    return Result(nll + 0.1 * odds_ratio(means, n), {"logps": logps, "nll": nll, **metrics})


@chain("TRL 1.16 CPO, SimPO")
def trl_cpo(logits: Tensor, batch: Batch) -> Result:
    n = batch.pairs
    index, mask = answers(batch)
    means = (selective_log_softmax(logits[:, :-1, :], index) * mask).sum(-1) / mask.sum(-1)
    nll = shifted_nll(logits[:n], batch.labels[:n])
    metrics = {"chosen": logits[:n].detach().mean(), "rejected": logits[n:].detach().mean()}
    return Result(simpo(means, n) + nll, {"means": means, "nll": nll, **metrics})


@chain("TRL 1.16 TPO")
def trl_tpo(logits: Tensor, batch: Batch) -> Result:
    index, mask = answers(batch)
    shifted = logits[..., :-1, :]
    logps = selective_log_softmax(shifted, index)
    with torch.no_grad():
        entropy = entropy_from_logits(shifted[mask])
    chosen, _ = shifted.chunk(2, dim=0)
    chosen_mask, rejected_mask = mask.chunk(2, dim=0)
    nll = F.cross_entropy(chosen[chosen_mask], index.chunk(2, dim=0)[0][chosen_mask])
    kept, lost = shifted.detach().chunk(2, dim=0)
    values = {
        "logps": logps,
        "entropy": entropy,
        "chosen": kept[chosen_mask].mean(-1).sum(),
        "rejected": lost[rejected_mask].mean(-1).sum(),
        "predictions": shifted.argmax(dim=-1),
    }
    return Result(simpo((logps * mask).sum(-1), batch.pairs) + nll, values)


@chain("TRL 1.16 A2PO", logprobs=True)
def trl_a2po(logits: Tensor, batch: Batch) -> Result:
    logits = logits[:, -(KEEP + 1) :, :][:, :-1, :]  # logits_to_keep = KEEP + 1
    logps = selective_log_softmax(logits[:, -KEEP:, :], batch.ids[:, -KEEP:])
    advantage = logps.sum(-1) - batch.reference_logps[:, -KEEP:].sum(-1) - batch.advantages
    return Result((advantage**2).mean(), {"logps": logps})


@chain("TRL 1.16 OnlineDPO", logprobs=True)
def trl_online_dpo(logits: Tensor, batch: Batch) -> Result:
    index = batch.ids[:, PROMPT:].unsqueeze(-1)
    logps = torch.take_along_dim(logits[:, PROMPT - 1 : -1].log_softmax(-1), index, dim=2).squeeze(-1)
    summed = (logps * batch.attention[:, PROMPT:]).sum(-1)
    return Result(simpo(summed, batch.pairs, beta=0.5), {"logps": logps})


@chain("TRL 1.16 SDPO, SDFT sampled", logprobs=True)
def trl_sdpo_sampled(logits: Tensor, batch: Batch) -> Result:
    student = logits[:, :-1][:, -KEEP:] / TEMPERATURE
    logps = selective_log_softmax(student, batch.ids[:, -KEEP:])
    apart = logps - batch.reference_logps[:, -KEEP:]
    return Result((apart.detach() * logps).mean(), {"logps": logps})


@chain("TRL 1.16 SDPO, SDFT top k", passes=2)
def trl_sdpo_topk(logits: Tensor, batch: Batch) -> Result:
    """The student's k best, with gradient, against the teacher at the same tokens."""
    student = logits[:, :-1][:, -KEEP:] / TEMPERATURE
    teacher = batch.reference_logits[:, :-1][:, -KEEP:] / TEMPERATURE
    best, index = torch.topk(student, 5, dim=-1)
    logps = best - torch.logsumexp(student, dim=-1, keepdim=True)
    teacher_logps = teacher.gather(-1, index) - torch.logsumexp(teacher, dim=-1, keepdim=True)
    return Result((logps.exp() * (logps - teacher_logps)).sum(-1).mean(), {"logps": logps, "index": index})


@chain("TRL 1.16 SDPO, SDFT full", lazy=False)
def trl_sdpo_full(logits: Tensor, batch: Batch) -> Result:
    logps = F.log_softmax(logits[:, :-1][:, -KEEP:] / TEMPERATURE, dim=-1)
    teacher = F.log_softmax(batch.reference_logits[:, :-1][:, -KEEP:] / TEMPERATURE, dim=-1)
    per_token = (logps.exp() * (logps - teacher)).sum(-1)
    return Result(per_token.mean(), {"per_token": per_token})


@chain("TRL 1.16 GKD", lazy=False)
def trl_gkd(logits: Tensor, batch: Batch) -> Result:
    """Jensen and Shannon's divergence of all V, then the mask."""
    student = F.log_softmax(logits[:, PROMPT - 1 : -1, :] / TEMPERATURE, dim=-1)
    teacher = F.log_softmax(batch.reference_logits[:, PROMPT - 1 : -1, :] / TEMPERATURE, dim=-1)
    mixture = torch.logsumexp(torch.stack([student, teacher]), dim=0) - torch.log(torch.tensor(2.0))
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    to_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    divergence = (to_teacher + to_student) / 2
    mask = batch.labels[:, PROMPT:] != IGNORE
    return Result(divergence[mask].sum() / mask.sum(), {})


@chain("TRL 1.16 GOLD", logprobs=True)
def trl_gold_cross_entropy(logits: Tensor, batch: Batch) -> Result:
    shift = logits[..., :-1, :].contiguous()
    labels = batch.labels[..., 1:].contiguous()
    return Result(F.cross_entropy(shift.view(-1, shift.size(-1)), labels.view(-1), ignore_index=IGNORE), {})


@chain("TRL 1.16 IW-OPD", passes=2)
def trl_iw_opd(logits: Tensor, batch: Batch) -> Result:
    scaled = logits[:, PROMPT - 1 : -1] / TEMPERATURE
    index = batch.ids[:, PROMPT:]
    logps = F.log_softmax(scaled, dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    top = scaled.detach().topk(4, dim=-1).values
    weight = (batch.reference_logps[:, PROMPT - 1 :] - logps).detach().exp().clamp(max=2)
    return Result(-(weight * logps).mean(), {"logps": logps, "top": top, "best": scaled.argmax(dim=-1)})


# ---- TRL 0.8 to 1.9


@chain("TRL 0.8-0.15 ORPO")
def trl_08_orpo(logits: Tensor, batch: Batch) -> Result:
    n = batch.pairs
    sums, lengths = batch_logps(logits, batch.labels)
    nll = shifted_nll(logits[:n], batch.labels[:n])
    metrics = {"chosen": logits[:n].detach().mean().cpu(), "rejected": logits[n:].detach().mean().cpu()}
    return Result(nll + odds_ratio(sums / lengths, n), {"sums": sums, "nll": nll, **metrics})


@chain("TRL 0.8-0.11 DPO")
def trl_08_dpo(logits: Tensor, batch: Batch) -> Result:
    logps, _ = batch_logps(upcast(logits), batch.labels)
    metrics = {"chosen": logits[: batch.pairs].detach().mean(), "rejected": logits[batch.pairs :].detach().mean()}
    return Result(dpo(logps, batch), {"logps": logps, **metrics})


@chain("TRL 0.12-0.27 DPO with RPO")
def trl_012_dpo(logits: Tensor, batch: Batch) -> Result:
    """Labels are rolled instead of logits cut; the supervised term flattens; means are of the masked logits."""
    n = batch.pairs
    index = torch.roll(batch.ids, shifts=-1, dims=1)
    mask = torch.roll(batch.mask, shifts=-1, dims=1)
    logits = logits[:, -index.shape[1] :]
    logps = selective_log_softmax(logits, index.masked_fill(~mask, 0)).masked_fill(~mask, 0)
    chosen = torch.flatten(logits[:n, :-1], end_dim=1)
    nll = F.cross_entropy(chosen, torch.flatten(batch.ids[:n, 1:] * batch.mask[:n, 1:], end_dim=1), ignore_index=0)
    metrics = {"chosen": logits[:n][mask[:n]].mean(), "rejected": logits[n:][mask[n:]].mean()}
    values = {name: value.detach() for name, value in metrics.items()}
    return Result(dpo(logps.sum(-1), batch) + nll, {"logps": logps, **values})


@chain("TRL 0.13-0.27 DPO without padding")
def trl_012_dpo_padding_free(logits: Tensor, batch: Batch) -> Result:
    """One row that holds every sequence: [1, B T, V]."""
    flat = logits.view(1, -1, logits.shape[-1])
    index = torch.roll(batch.ids.view(1, -1), shifts=-1, dims=1)
    mask = torch.roll(batch.mask.view(1, -1), shifts=-1, dims=1)
    logps = selective_log_softmax(flat, index.masked_fill(~mask, 0)).masked_fill(~mask, 0)
    split = batch.pairs * batch.ids.shape[1]
    metrics = {"chosen": flat[0, :split][mask[0, :split]].mean(), "rejected": flat[0, split:][mask[0, split:]].mean()}
    values = {name: value.detach() for name, value in metrics.items()}
    return Result(dpo(logps.view(batch.ids.shape).sum(-1), batch), {"logps": logps, **values})


@chain("TRL 0.13-0.27 DPO with WPO")
def trl_012_wpo(logits: Tensor, batch: Batch) -> Result:
    """The weight of a pair is its likelihood beside the expected one, without gradient."""
    index, mask = answers(batch)
    logits = logits[:, :-1]
    logps = selective_log_softmax(logits, index)
    with torch.no_grad():
        all_logps = F.log_softmax(logits, dim=-1)
        adjustment = torch.logsumexp(2 * all_logps, dim=-1)
        weights = (((logps - adjustment) * mask).sum(-1) / mask.sum(-1)).exp()
    weight = torch.clamp(weights[: batch.pairs] * weights[batch.pairs :], max=1)
    sums = (logps * mask).sum(-1)
    return Result(weight.mean() * dpo(sums, batch), {"adjustment": adjustment, "sums": sums})


@chain("TRL 0.29-1.9 DPO")
def trl_10_dpo(logits: Tensor, batch: Batch) -> Result:
    index, mask = answers(batch)
    shifted = logits[..., :-1, :].contiguous()
    logps = selective_log_softmax(shifted, index)
    chosen_mask, rejected_mask = mask.chunk(2, dim=0)
    nll = F.cross_entropy(shifted.chunk(2, dim=0)[0][chosen_mask], index.chunk(2, dim=0)[0][chosen_mask])
    entropy = entropy_from_logits(shifted.detach())
    chosen, rejected = shifted.detach().chunk(2, dim=0)
    values = {
        "logps": logps,
        "entropy": entropy,
        "chosen": chosen[chosen_mask].mean(-1).sum(),
        "rejected": rejected[rejected_mask].mean(-1).sum(),
        "predictions": chosen.argmax(dim=-1),
    }
    return Result(dpo((logps * mask).sum(-1), batch) + nll, values)


@chain("TRL 0.29-1.9 DPO with WPO")
def trl_10_wpo(logits: Tensor, batch: Batch) -> Result:
    index, mask = answers(batch)
    shifted = logits[..., :-1, :]
    logps = selective_log_softmax(shifted, index)
    with torch.no_grad():
        collision = torch.logsumexp(2.0 * shifted, dim=-1) - 2.0 * torch.logsumexp(shifted, dim=-1)
        weights = (((logps - collision) * mask).sum(-1) / mask.sum(-1)).exp()
    weight = torch.clamp(weights[: batch.pairs] * weights[batch.pairs :], max=1)
    return Result(weight.mean() * dpo((logps * mask).sum(-1), batch), {"collision": collision, "logps": logps})


@chain("TRL 0.24 KTO, BCO")
def trl_024_kto(logits: Tensor, batch: Batch) -> Result:
    """Sequences are chosen by a list of positions."""
    sums, _ = batch_logps(logits, batch.labels)
    good = [i for i, wanted in enumerate(batch.desirable.tolist()) if wanted]
    bad = [i for i, wanted in enumerate(batch.desirable.tolist()) if not wanted]
    values = {"good": logits[good, ...].detach().nansum(), "bad": logits[bad, ...].detach().nansum()}
    return Result(kto(sums, batch), {"sums": sums, **values})


@chain("TRL 1.9 KTO")
def trl_19_kto(logits: Tensor, batch: Batch) -> Result:
    index, mask = answers(batch)
    shifted = logits[:, :-1, :]
    logps = selective_log_softmax(shifted, index)
    good = batch.desirable.nonzero().squeeze(-1)
    values = {
        "logps": logps,
        "good": shifted.detach().index_select(0, good)[mask.index_select(0, good)].mean(-1).sum(),
        "entropy": entropy_from_logits(shifted.detach()),
    }
    return Result(kto((logps * mask).sum(-1), batch), values)


@chain("TRL 0.14 GRPO", logprobs=True)
def trl_014_grpo(logits: Tensor, batch: Batch) -> Result:
    """Sequence by sequence, to hold one sequence's log-probabilities at a time."""
    rows = []
    for row, ids in zip(logits[:, :-1, :], batch.ids[:, 1:], strict=True):
        rows.append(torch.gather(row.log_softmax(dim=-1), dim=1, index=ids.unsqueeze(1)).squeeze(1))
    logps = torch.stack(rows)[:, -KEEP:]
    return Result(policy_gradient(logps, batch.attention[:, -KEEP:], batch, KEEP), {"logps": logps})


@chain("TRL 0.16-0.29 GRPO", logprobs=True)
def trl_016_grpo(logits: Tensor, batch: Batch) -> Result:
    logits = logits[:, :-1, :][:, -KEEP:]
    logps = selective_log_softmax(logits / TEMPERATURE, batch.ids[:, -KEEP:])
    return Result(policy_gradient(logps, batch.attention[:, -KEEP:], batch, KEEP), {"logps": logps})


@chain("TRL 1.0-1.9 GRPO, RLOO", in_place=True)
def trl_10_grpo(logits: Tensor, batch: Batch) -> Result:
    """The slice of a slice is divided in place; the entropy is a metric without gradient."""
    logits = logits[:, :-1, :]
    logits = logits[:, -KEEP:, :]
    logits.div_(TEMPERATURE)
    logps = selective_log_softmax(logits, batch.ids[:, -KEEP:])
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    values = {"logps": logps, "entropy": entropy}
    return Result(policy_gradient(logps, batch.attention[:, -KEEP:], batch, KEEP), values)


@chain("TRL 0.12-1.9 PPO", logprobs=True, in_place=True)
def trl_012_ppo(logits: Tensor, batch: Batch) -> Result:
    logits = logits[:, PROMPT - 1 : -1]
    logits /= TEMPERATURE + 1e-7
    all_logps = F.log_softmax(logits, dim=-1)
    logps = torch.gather(all_logps, 2, batch.ids[:, PROMPT:].unsqueeze(-1)).squeeze(-1)
    keep = batch.ids.shape[1] - PROMPT
    return Result(policy_gradient(logps, batch.attention[:, PROMPT:], batch, keep), {"logps": logps})


@chain("TRL 0.12 RLOO", in_place=True)
def trl_012_rloo(logits: Tensor, batch: Batch) -> Result:
    """With the statistics that PPO and RLOO take of the same logits."""
    logits = logits[:, PROMPT - 1 : -1]
    logits /= TEMPERATURE + 1e-7
    logps = selective_log_softmax(logits, batch.ids[:, PROMPT:])
    with torch.no_grad():
        probabilities = F.softmax(logits, dim=-1)
        entropy = torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)
    summed = (logps * batch.attention[:, PROMPT:]).sum(1)
    ratio = torch.exp(summed - summed.detach())
    return Result(-(batch.advantages * ratio).mean(), {"logps": logps, "entropy": entropy})


@chain("TRL 0.8 PPO", logprobs=True)
def trl_08_ppo(logits: Tensor, batch: Batch) -> Result:
    logps = F.log_softmax(logits[:, :-1, :], dim=2)
    logps = torch.gather(logps, 2, batch.ids[:, 1:].unsqueeze(2)).squeeze(-1)
    keep = batch.ids.shape[1] - 1
    return Result(policy_gradient(logps, batch.attention[:, 1:], batch, keep), {"logps": logps})


@chain("TRL 0.8 PPO, full KL", lazy=False)
def trl_08_ppo_full_kl(logits: Tensor, batch: Batch) -> Result:
    logps = F.log_softmax(logits[:, :-1, :], dim=2)
    reference = F.log_softmax(batch.reference_logits[:, :-1, :], dim=2)
    divergence = F.kl_div(reference, logps, log_target=True, reduction="none").sum(-1)
    return Result(divergence.mean(), {"divergence": divergence})


@chain("TRL 0.20-1.9 SFT")
def trl_020_sft(logits: Tensor, batch: Batch) -> Result:
    loss = F.cross_entropy(upcast(logits[:, :-1]).reshape(-1, logits.size(-1)), batch.labels[:, 1:].reshape(-1))
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
        predictions = logits[..., :-1, :].contiguous().argmax(dim=-1)
    return Result(loss, {"entropy": entropy, "predictions": predictions})


@chain("TRL 0.20-1.9 SFT, dft", logprobs=True)
def trl_020_sft_dft(logits: Tensor, batch: Batch) -> Result:
    index, mask = answers(batch)
    logps = selective_log_softmax(logits[..., :-1, :], index)
    per_token = -logps.exp().detach() * logps
    return Result((per_token * mask).sum() / mask.sum(), {"logps": logps})


@chain("TRL value-head wrapper", logprobs=True)
def trl_value_head(logits: Tensor, batch: Batch) -> Result:
    """The wrapper raises the logits of a 16-bit head to float32 before anybody sees them."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    logps = gathered(logits[:, :-1], batch.ids[:, 1:])
    return Result(-(logps * batch.advantages.unsqueeze(1)).mean(), {"logps": logps})


@chain("TRL XPO", logprobs=True)
def trl_xpo(logits: Tensor, batch: Batch) -> Result:
    logps = selective_log_softmax(logits[:, PROMPT - 1 : -1], batch.ids[:, PROMPT:])
    summed = logps.masked_fill(batch.attention[:, PROMPT:] == 0, 0).sum(1)
    return Result(simpo(summed, batch.pairs, beta=0.5) + 0.01 * summed.mean(), {"logps": logps})


@chain("TRL NashMD", lazy=False)
def trl_nash_mixture(logits: Tensor, batch: Batch) -> Result:
    """A geometric mixture of two models: the stand-in meets a plain tensor of its own width."""
    mixture = torch.log_softmax(0.25 * batch.reference_logits + 0.75 * logits, dim=-1)
    logps = mixture[:, :-1].gather(-1, batch.ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return Result(-logps.mean(), {"logps": logps})


@chain("TRL MiniLLM", lazy=False)
def trl_minillm(logits: Tensor, batch: Batch) -> Result:
    student = F.log_softmax(logits[:, PROMPT - 1 : -1, :] / TEMPERATURE, dim=-1)
    teacher = F.log_softmax(batch.reference_logits[:, PROMPT - 1 : -1, :] / TEMPERATURE, dim=-1)
    reverse = F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    mask = batch.labels[:, PROMPT:] != IGNORE
    return Result((reverse * mask).sum() / mask.sum(), {"reverse": reverse})
