"""Chains of transformers itself, of torchtune and of hand-written loops, rewritten from their description."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.lazy.catalogue import (
    IGNORE,
    PROMPT,
    TEMPERATURE,
    Batch,
    Result,
    batch_logps,
    chain,
    dpo,
    policy_gradient,
    shifted_nll,
    upcast,
)

# ---- transformers


@chain("transformers ForCausalLMLoss", logprobs=True)
def hf_causal_lm_loss(logits: Tensor, batch: Batch) -> Result:
    logits = upcast(logits)
    labels = F.pad(batch.labels, (0, 1), value=IGNORE)[..., 1:].contiguous().view(-1).to(logits.device)
    items = (labels != IGNORE).sum()
    flat = logits.view(-1, logits.shape[-1])
    summed = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum") / items
    mean = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="mean")
    return Result(summed + mean, {"summed": summed, "mean": mean})


@chain("transformers up to 4.45", logprobs=True)
def hf_shifted_loss(logits: Tensor, batch: Batch) -> Result:
    return Result(shifted_nll(upcast(logits), batch.labels), {})


@chain("transformers LabelSmoother")
def hf_label_smoother(logits: Tensor, batch: Batch) -> Result:
    """Both terms are filled at ignored positions after the reductions; the sum over V is in float32."""
    shift, labels = logits[..., :-1, :].contiguous(), batch.labels[..., 1:].contiguous()
    log_probs = -F.log_softmax(shift, dim=-1)
    labels = labels.unsqueeze(-1)
    padding = labels.eq(IGNORE)
    nll = log_probs.gather(dim=-1, index=torch.clamp(labels, min=0))
    smoothed = log_probs.sum(dim=-1, keepdim=True, dtype=upcast(batch.advantages).dtype)
    nll.masked_fill_(padding, 0.0)
    smoothed.masked_fill_(padding, 0.0)
    active = padding.numel() - padding.long().sum()
    nll, smoothed = nll.sum() / active, smoothed.sum() / (active * log_probs.shape[-1])
    return Result(0.9 * nll + 0.1 * smoothed, {"nll": nll, "smoothed": smoothed})


@chain("transformers prediction_step")
def hf_prediction_step(logits: Tensor, batch: Batch) -> Result:
    """Evaluation: outputs detached, argmax before anything leaves the device, numpy last."""
    with torch.no_grad():
        (detached,) = tuple(value.detach() for value in (logits,))
        predictions = detached.argmax(dim=-1)
        loss = F.cross_entropy(detached[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    return Result(None, {"predictions": torch.from_numpy(predictions.cpu().numpy()), "loss": loss})


@chain("transformers, speech models", logprobs=True)
def hf_masked_shift(logits: Tensor, batch: Batch) -> Result:
    kept = batch.attention[:, 1:] != 0
    shift = logits[..., :-1, :][kept].contiguous()
    labels = batch.labels[..., 1:][kept].contiguous()
    loss = torch.nn.CrossEntropyLoss()(shift.view(-1, shift.size(-1)), labels.view(-1))
    return Result(loss, {})


# ---- torchtune


@chain("torchtune DPO")
def torchtune_dpo(logits: Tensor, batch: Batch) -> Result:
    sums, _ = batch_logps(logits, batch.labels)
    n = batch.pairs
    values = {"sums": sums, "chosen": logits[:n].detach().mean(), "rejected": logits[n:].detach().mean()}
    return Result(dpo(sums, batch), values)


@chain("torchtune PPO, sequences written into a buffer", logprobs=True)
def torchtune_ppo(logits: Tensor, batch: Batch) -> Result:
    logits, index = logits[:, PROMPT - 1 : -1], batch.ids[:, PROMPT:]
    logps = torch.zeros(index.shape, dtype=logits.dtype)
    for start in range(0, len(index), 2):
        rows = slice(start, start + 2)
        part = F.log_softmax(logits[rows] / TEMPERATURE, dim=-1)
        logps[rows] = torch.gather(part, 2, index[rows].unsqueeze(-1)).squeeze(-1)
    return Result(policy_gradient(logps, batch.attention[:, PROMPT:], batch, index.shape[1]), {"logps": logps})


@chain("torchtune chunked cross-entropy", logprobs=True)
def torchtune_chunked(logits: Tensor, batch: Batch) -> Result:
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
    parts = [part.reshape(-1, logits.size(-1)) for part in logits.chunk(4, dim=1)]
    targets = [part.reshape(-1) for part in labels.chunk(4, dim=1)]
    pieces = zip(parts, targets, strict=True)
    losses = [F.cross_entropy(upcast(p), t, ignore_index=IGNORE, reduction="sum") for p, t in pieces]
    return Result(torch.stack(losses).sum() / (labels != IGNORE).sum(), {"losses": torch.stack(losses)})


@chain("torchtune distillation", lazy=False)
def torchtune_kd(logits: Tensor, batch: Batch) -> Result:
    wide = upcast(batch.advantages).dtype
    teacher = F.softmax(batch.reference_logits, dim=-1, dtype=wide)
    infinite = torch.isinf(logits)
    products = torch.masked_fill(teacher * F.log_softmax(logits, dim=-1, dtype=wide), infinite, 0)
    per_token = products.sum(dim=-1).view(-1)
    mask = (batch.labels != IGNORE).view(-1).int()
    return Result(-(per_token * mask).sum() / mask.sum(), {"per_token": per_token})


# ---- Hand-written loops


@chain("loop: cross_entropy of a view", logprobs=True)
def loop_view(logits: Tensor, batch: Batch) -> Result:
    return Result(F.cross_entropy(logits.view(-1, logits.size(-1)), batch.ids.view(-1)), {})


@chain("loop: cross_entropy of a transpose and of a permutation", logprobs=True)
def loop_transpose(logits: Tensor, batch: Batch) -> Result:
    one = F.cross_entropy(logits.transpose(1, 2), batch.ids, reduction="none")
    other = F.cross_entropy(logits.permute(0, 2, 1), batch.labels, reduction="none")
    return Result(one.mean() + other.sum() / batch.mask.sum(), {"one": one, "other": other})


@chain("loop: smoothed cross_entropy")
def loop_label_smoothing(logits: Tensor, batch: Batch) -> Result:
    flat, labels = logits[:, :-1].reshape(-1, logits.size(-1)), batch.labels[:, 1:].reshape(-1)
    return Result(F.cross_entropy(flat, labels, label_smoothing=0.1), {})


@chain("loop: log_softmax and nll_loss", logprobs=True)
def loop_nll(logits: Tensor, batch: Batch) -> Result:
    logps = torch.log_softmax(logits[:, :-1].reshape(-1, logits.size(-1)), dim=1)
    return Result(F.nll_loss(logps, batch.labels[:, 1:].reshape(-1), ignore_index=IGNORE), {})


@chain("loop: gather minus logsumexp", logprobs=True)
def loop_logsumexp(logits: Tensor, batch: Batch) -> Result:
    logps = logits.gather(2, batch.ids[..., None])[..., 0] - logits.logsumexp(-1)
    return Result(-logps.mean(), {"logps": logps})


@chain("loop: integer indices at the labels", logprobs=True)
def loop_arange(logits: Tensor, batch: Batch) -> Result:
    logps = F.log_softmax(logits, dim=-1)
    rows = torch.arange(logits.shape[0])[:, None]
    columns = torch.arange(logits.shape[1] - 1)[None, :]
    chosen = logps[rows, columns, batch.ids[:, 1:]]
    return Result(-chosen.mean(), {"chosen": chosen})


@chain("loop: softmax, then its logarithm", logprobs=True)
def loop_softmax_log(logits: Tensor, batch: Batch) -> Result:
    chosen = torch.log(torch.softmax(logits, dim=-1)).gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1)
    return Result(-chosen.mean(), {"chosen": chosen})


@chain("loop: softmax at the labels, then its logarithm", logprobs=True)
def loop_probability(logits: Tensor, batch: Batch) -> Result:
    chosen = torch.softmax(logits, dim=-1).gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1)
    return Result(-torch.log(chosen).mean(), {"chosen": chosen})


@chain("loop: perplexity without gradient, and accuracy")
def loop_perplexity(logits: Tensor, batch: Batch) -> Result:
    with torch.no_grad():
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)), batch.labels[:, 1:].reshape(-1))
        predictions = logits.argmax(-1)
        best = logits.max(dim=-1).values
    return Result(None, {"perplexity": torch.exp(loss), "predictions": predictions, "best": best})


@chain("loop: z-loss")
def loop_z_loss(logits: Tensor, batch: Batch) -> Result:
    partition = torch.logsumexp(logits, dim=-1)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), batch.ids.view(-1)) + 1e-2 * partition.pow(2).mean()
    return Result(loss, {"partition": partition})


@chain("loop: loss.item() alone", logprobs=True)
def loop_item(logits: Tensor, batch: Batch) -> Result:
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), batch.ids.view(-1))
    return Result(loss, {"number": torch.tensor(loss.item(), dtype=torch.float64)})


@chain("loop: Categorical")
def loop_categorical(logits: Tensor, batch: Batch) -> Result:
    policy = torch.distributions.Categorical(logits=logits)
    logps, entropy = policy.log_prob(batch.ids), policy.entropy()
    return Result(-(logps * batch.advantages.unsqueeze(1)).mean() - 0.01 * entropy.mean(), {"entropy": entropy})


@chain("loop: kl_div against a plain teacher")
def loop_distillation(logits: Tensor, batch: Batch) -> Result:
    """The teacher's probabilities are plain: only their product with the student's logits is asked for."""
    student = F.log_softmax(logits.view(-1, logits.size(-1)) / 2.0, dim=-1)
    teacher = F.softmax(batch.reference_logits.view(-1, logits.size(-1)) / 2.0, dim=-1)
    return Result(F.kl_div(student, teacher, reduction="batchmean") * 4.0, {})
