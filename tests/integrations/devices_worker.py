"""One of several processes on gloo: the patched trainer's loss and the loss in one's own loop, in every layout.

usage: python -m tests.integrations.devices_worker RANK WORLD FOLDER

Writes FOLDER/rank{RANK}.json: of each layout and mode the errors against one process that saw every rank's batch in
float64, the traceback, or what was refused.
"""

from __future__ import annotations

import traceback
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import Partial
from transformers import LlamaForCausalLM

from benchmarks.accuracy import relative_error
from orpo_kernels import orpo_loss, reference
from orpo_kernels.integrations.fused import Batch, fused_logprobs, fused_loss
from orpo_kernels.integrations.trainer import Site, find_site
from orpo_kernels.objectives import ORPO
from tests.integrations.models import VOCAB, FakePatch, FakeTrainer, batch, llama
from tests.lazy.distributed_worker import LAYOUTS, OF_FOUR, RATE, STEPS, Layout, weights_of, without_reduction
from tests.ranks import join, leave

BETA = 0.5
# Of the patch: its whole loss, and a loss of log-probabilities. Of one's own loop: in the forward of a head of one's
# own, in the model's forward, and after it with the head's weight gathered.
PATCHED, OWN = ("patch", "patch, log-probabilities"), ("head's forward", "model's forward", "gathered weight")
ON_FOUR = ("ddp", "fsdp1", "fsdp2 tail", "fsdp2 head", *OF_FOUR)
# Whether a loss after the model's forward finds the head's weight, or is refused because it is sharded again.
OUTSIDE = {
    "ddp": True,
    "fsdp1": False,
    "fsdp1 flat parameters": True,
    "fsdp1 keeps weights": False,
    "fsdp2 root": False,
    "fsdp2 layers": True,
    "fsdp2 head": False,
    "fsdp2 tail": True,
}
HEAD_APART = "fsdp2 head"  # in these layouts the head's weight is gathered for the head's own forward alone


def modes_of(name: str, world: int) -> tuple[str, ...]:
    """What is run of a layout."""
    if world > 2:
        return ("patch", "head's forward")
    if not LAYOUTS[name].exact:
        return ("stock", "patch", "head's forward")
    own = [OWN[0]]
    if not name.startswith((HEAD_APART, "fsdp1 head")):
        own.append(OWN[1])
    if name.startswith("fsdp2") and "tied" not in name:  # a tied weight is the embedding's, and gathered with the root
        own.append(OWN[2])
    if name in OUTSIDE:
        own.append("outside")
    return (*PATCHED, *own)


class Devices(FakeTrainer):
    """A trainer whose accelerator knows the wrappers."""

    class _Accelerator:
        is_local_main_process = False
        state = types.SimpleNamespace()
        unwrap_model = staticmethod(extract_model_from_parallel)

    def __init__(self) -> None:
        self.accelerator = self._Accelerator()
        self.args = types.SimpleNamespace()


class ScoringHead(nn.Linear):
    """A head that makes a loss, in its own forward, of the hidden states that it is given."""

    def forward(self, hidden: Tensor, answer: Tensor, nll: Tensor) -> Tensor:  # type: ignore[override]
        return orpo_loss(hidden, self.weight, answer, nll_labels=nll, beta=BETA).loss


class OwnHead(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = ScoringHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer: Tensor, nll: Tensor) -> Tensor:
        loss: Tensor = self.lm_head(self.model(input_ids, attention_mask)[0], answer, nll)
        return loss


class OwnForward(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer: Tensor, nll: Tensor) -> Tensor:
        hidden = self.model(input_ids, attention_mask)[0]
        return orpo_loss(hidden, self.lm_head.weight, answer, nll_labels=nll, beta=BETA).loss


class Hidden(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids, attention_mask)[0]
        return hidden


CLASSES = {"head's forward": OwnHead, "model's forward": OwnForward, "gathered weight": Hidden, "outside": Hidden}


def of_logprobs(answer: Tensor, nll: Tensor) -> Tensor:
    """A loss of one's own, not linear in log-probabilities; as a trainer's subclass may have it."""
    chosen, rejected = answer.sum(-1).chunk(2)
    return (chosen - rejected).square().mean() / 100 - nll.sum() / 50


def of_logits(logits: Tensor, data: Batch, mode: str) -> Tensor:
    """The specification's loss of a model's own logits."""
    if mode != "patch, log-probabilities":
        everything = torch.eye(VOCAB, dtype=logits.dtype)
        loss: Tensor = reference.orpo_loss(logits, everything, data.answer, nll_labels=data.nll, beta=BETA)["loss"]
        return loss
    logps = logits.log_softmax(-1)

    def picked(of: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels == -100, 0, of.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1))

    return of_logprobs(picked(logps, data.answer), picked(logps[: len(data.nll)], data.nll))


def loss_of(mode: str, wrapped: nn.Module, model: nn.Module, data: Batch) -> Tensor:
    if mode == "stock":
        return of_logits(wrapped(**data.inputs).logits, data, mode)
    if mode in PATCHED:
        trainer = Devices()
        site = find_site(trainer, wrapped)
        assert isinstance(site, Site), site
        fuse: Any = fused_loss if mode == "patch" else fused_logprobs
        fused = fuse(FakePatch(), trainer, wrapped, site, data, *([ORPO(BETA)] if mode == "patch" else []))
        assert not isinstance(fused, str), fused
        found = fused[0]
        return found.loss if mode == "patch" else of_logprobs(found.answer, found.nll)
    if mode in OWN[:2]:
        loss: Tensor = wrapped(**data.inputs, answer=data.answer, nll=data.nll)
        return loss
    hidden, weight = wrapped(**data.inputs), model.lm_head.weight
    if mode == "gathered weight" and hasattr(weight, "full_tensor"):
        weight = weight.full_tensor(grad_placements=[Partial("avg")])
    return orpo_loss(hidden, weight, data.answer, nll_labels=data.nll, beta=BETA).loss


def data_of(layout: Layout, rank: int) -> list[Batch]:
    """A rank's micro-batches of a step."""
    parts = [batch(pairs=1 + rank % 2, seed=2 * rank + part) for part in range(2 if layout.accumulates else 1)]
    if layout.empty and rank == 1:
        parts = [part._replace(answer=part.answer.fill_(-100), nll=part.nll.fill_(-100)) for part in parts]
    return parts


def train(layout: Layout, mode: str, rank: int, world: int, alone: bool = False) -> dict[str, Tensor]:
    """The gradients of every step, and the mean of the ranks' losses in evaluation."""
    model = llama(CLASSES.get("stock" if alone else mode, LlamaForCausalLM), tie_word_embeddings=layout.tied)
    model = model.to(torch.float64 if layout.exact or alone else torch.float32)
    if not alone:  # classes draw their weights in another order
        same = llama(tie_word_embeddings=layout.tied).to(torch.float64)
        model.load_state_dict(same.state_dict())
    wrapped = model if alone else layout.wrap(model)
    ranks = [data_of(layout, each) for each in (range(world) if alone else [rank])]
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=RATE)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=layout.autocast and not alone)
    found = {}

    def loss_on(data: Batch) -> Tensor:
        with cast:
            if alone:
                return of_logits(wrapped(**data.inputs).logits, data, mode)
            return loss_of(mode, wrapped, model, data)

    before = weights_of(wrapped, model)
    for step in range(STEPS):
        for parts in ranks:
            for index, data in enumerate(parts):
                if not alone and index < len(parts) - 1:
                    with without_reduction(wrapped):
                        (loss_on(data) / len(parts)).backward()
                else:
                    (loss_on(data) / len(parts) / len(ranks)).backward()
        optimiser.step()
        optimiser.zero_grad()
        after = weights_of(wrapped, model)
        found.update({f"step {step}: {name}": (before[name] - after[name]) / RATE for name in before})
        before = after
    wrapped.eval()
    with torch.no_grad():
        loss = torch.stack([loss_on(data) for parts in ranks for data in parts]).mean().double()
    if not alone:
        dist.all_reduce(loss)
        loss /= world
    found["loss in evaluation"] = loss
    return found


def judge(layout: Layout, mode: str, rank: int, world: int) -> dict[str, Any]:
    """Errors of one layout."""
    truth = train(layout, mode, rank, world, alone=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = train(layout, mode, rank, world)
    except Exception:  # the layouts after this one are still worth their results
        return {"traceback": traceback.format_exc()}
    return {"errors": {name: relative_error(found[name], expected) for name, expected in truth.items()}}


def main() -> None:
    rank, world, folder = join()
    results: dict[str, dict[str, Any]] = {
        name: {mode: judge(layout, mode, rank, world) for mode in modes_of(name, world)}
        for name, layout in LAYOUTS.items()
        if (name in ON_FOUR if world > 2 else name not in OF_FOUR)
    }
    leave(results, rank, folder)


if __name__ == "__main__":
    main()
