"""Stock scripts that read a model's logits, as users have them: they know nothing of this package.

usage: stock_readers.py {dpo | grpo | smoothing | loop} OUTPUT.json
"""

import json
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS = 3


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=97, num_key_value_heads=2))


def batches(count: int = STEPS, sequences: int = 4, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences whose first tokens are a prompt and whose last are padding."""
    chance = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 97, (sequences, length), generator=chance)
        labels = ids.clone()
        labels[:, :3] = labels[:, -2:] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def batch_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """As many preference trainers have it: the mask is met after the gather."""
    labels = labels[:, 1:].clone()
    mask = labels != -100
    labels[~mask] = 0
    logps = torch.gather(logits[:, :-1, :].log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (logps * mask).sum(-1)


class PreferenceTrainer(Trainer):
    """DPO over a batch whose first half is chosen, in the manner of LLaMA-Factory."""

    reference = model(seed=1).eval()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: object):
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits.to(torch.float32)
        chosen, rejected = batch_logps(logits, labels).split(len(labels) // 2)
        chosen_logits, rejected_logits = logits.split(len(labels) // 2)
        self.shown = chosen_logits.mean().item(), rejected_logits.mean().item()
        with torch.no_grad():
            of_reference = batch_logps(self.reference(**inputs).logits.to(torch.float32), labels)
        margin = (chosen - rejected) - (of_reference[:2] - of_reference[2:])
        return -F.logsigmoid(0.1 * margin).mean()


def trained(trainer_class: type[Trainer], **settings: object) -> list[float]:
    examples = [{name: row[i] for name, row in batch.items()} for batch in batches() for i in range(4)]
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, **quiet, per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, **settings
        )
        trainer = trainer_class(model=model(), args=arguments, train_dataset=examples)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    picked = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    return picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def grpo(temperature: float = 0.7, completion: int = 6) -> list[float]:
    policy = model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        logits = policy(batch["input_ids"]).logits
        logits = logits[:, :-1, :]
        logits = logits[:, -completion:, :]
        logits.div_(temperature)
        logps = selective_log_softmax(logits, batch["input_ids"][:, -completion:])
        with torch.no_grad():
            every = F.log_softmax(logits, dim=-1)
            entropy = -(torch.exp(every) * every).sum(-1).mean()
        advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]
        loss = -(torch.exp(logps - logps.detach()) * advantage).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), entropy.item()]
    return losses


def loop() -> list[float]:
    policy = model()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    losses = []
    for batch in batches():
        logits = policy(batch["input_ids"]).logits[:, :-1]
        target = batch["labels"][:, 1:]
        loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), target.reshape(-1))
        accuracy = (logits.argmax(-1) == target)[target != -100].float().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), accuracy.item()]
    return losses


def main(objective: str, output: str) -> None:
    losses = {
        "dpo": lambda: trained(PreferenceTrainer),
        "grpo": grpo,
        "smoothing": lambda: trained(Trainer, label_smoothing_factor=0.1),
        "loop": loop,
    }[objective]()
    with open(output, "w") as file:
        json.dump(losses, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
