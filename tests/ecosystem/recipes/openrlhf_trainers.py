"""OpenRLHF's Actor, DPOTrainer and PolicyLoss on one process; in place of DeepSpeed stands a strategy of a few lines.

usage: openrlhf_trainers.py OUTPUT.json [{dpo | sft | ppo | ppo-entropy} ...]
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny
import torch
from openrlhf.models import Actor, PolicyLoss, SFTLoss
from openrlhf.trainer.dpo_trainer import DPOTrainer
from torch import nn

OBJECTIVES = ("dpo", "sft", "ppo", "ppo-entropy")


class Strategy:
    """What DPOTrainer asks of DeepspeedStrategy."""

    ring_attn_group = None
    accumulated_gradient = 1
    norm = 0.0

    def __init__(self) -> None:
        self.args = SimpleNamespace(
            model=SimpleNamespace(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.1),
            ds=SimpleNamespace(packing_samples=False),
            logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1),
            eval=SimpleNamespace(steps=-1),
            ckpt=SimpleNamespace(save_steps=-1),
            train=SimpleNamespace(batch_size=4),
        )

    def is_rank_0(self) -> bool:
        return False  # no bars

    def backward(self, loss: torch.Tensor, model: nn.Module, optimizer: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: nn.Module, scheduler: Any) -> None:
        self.norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def get_grad_norm(self, model: nn.Module) -> float:
        return self.norm

    def all_reduce(self, found: dict[str, float]) -> dict[str, float]:
        return found


class Logged(DPOTrainer):
    """DPOTrainer that keeps its figures."""

    def save_logs_and_checkpoints(
        self, args: Any, step: int, bar: Any, logs_dict: Any = None, states: Any = None
    ) -> None:
        self.history.append(dict(logs_dict))


def sequences(count: int = tiny.STEPS) -> list[tuple[torch.Tensor, ...]]:
    """Batches of DPO: ids and mask of the chosen and of the rejected answers, and the lengths of their prompts."""
    chance = torch.Generator().manual_seed(1)

    def some(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(3, tiny.VOCAB, (4, 1, length), generator=chance)
        mask = torch.ones_like(ids)
        mask[::2, :, -2:] = 0
        return ids, mask

    return [(*some(12), *some(10), [3] * 4) for _ in range(count)]


def actor(seed: int = 0, temperature: float = 1.0) -> Actor:
    found = Actor(tiny.model(seed), temperature=temperature)
    found.packing_samples = False  # what Actor sets where it loads its model from files, in bfloat16
    return found


def dpo() -> list[dict[str, Any]]:
    policy, reference = actor(), actor(seed=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    strategy = Strategy()
    loader = torch.utils.data.DataLoader(sequences(), batch_size=None)
    trainer = Logged(
        policy,
        reference,
        strategy,
        tiny.tokenizer(),
        optimizer,
        loader,
        None,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        beta=0.1,
        max_epochs=1,
    )
    trainer.history = []
    trainer.fit(strategy.args)
    found: list[dict[str, Any]] = trainer.history
    return found


def loop(objective: str) -> list[dict[str, Any]]:
    """As PPO's actor and SFTTrainer do it."""
    torch.manual_seed(0)
    policy = actor(temperature=1.0 if objective == "sft" else 0.7)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]
    history = []
    for ids, mask, *_ in sequences():
        ids, mask = ids.squeeze(1), mask.squeeze(1)
        figures = {}
        if objective == "sft":
            logps, _ = policy(ids, attention_mask=mask, return_output=True, return_logprobs=True)
            loss = SFTLoss()(logps, mask[:, 1:].float())
        else:
            actions = mask[:, 4:]
            logps, output = policy(
                ids,
                actions,
                attention_mask=mask,
                return_output=True,
                return_entropy=objective == "ppo-entropy",
            )
            loss, clipped, kl, *_ = PolicyLoss()(logps, logps.detach(), advantages.expand_as(logps), actions.float())
            figures = {"logps": logps.sum().item(), "kl": kl.item(), "clipped": clipped.item()}
            if objective == "ppo-entropy":
                entropy = (output.entropy[:, -actions.shape[1] :] * actions).sum() / actions.sum()
                loss = loss - 0.01 * entropy
                figures["entropy"] = entropy.item()
        loss.backward()
        figures["grad_norm"] = float(nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), **figures})
    return history


def train(objective: str) -> list[dict[str, Any]]:
    return dpo() if objective == "dpo" else loop(objective)


if __name__ == "__main__":
    tiny.main(OBJECTIVES, train, "openrlhf")
