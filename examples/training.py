"""Training by fine-tuning, ORPO, its probability-ratio ablation or DPO in a plain loop, with what each costs counted.

Any causal language model of transformers whose logits are its head's product and nothing else. Every loss is a fused
one: ``linear_logprobs`` for fine-tuning, which never runs the rejected answers, ``preference_loss`` for the others.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness.machine import synchronize
from benchmarks.harness.memory import peak_of
from orpo_kernels import linear_logprobs, preference_loss, sequence_logprobs
from orpo_kernels.objectives import DPO, ORPO, ProbabilityRatio, log_odds
from orpo_kernels.pairs import Objective

IGNORED = -100
BY_HEART = 3.0  # of a learning rate, where a few pairs are to be certain within the steps that all pairs get
BELOW_CERTAIN = -1e-6  # as ORPO holds its log-probabilities, since the odds of a certain answer are infinite


class Example(NamedTuple):
    """A pair in tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Recipe:
    """What all methods of a comparison share."""

    steps: int
    batch_size: int  # pairs a step
    learning_rate: float
    measured: int  # how often held-out pairs are measured after the start
    bf16: bool = False


@dataclass(frozen=True)
class Method:
    """A way to train; without an objective it is cross-entropy on the chosen answers alone."""

    name: str
    objective: Objective | None = None
    has_reference: bool = False  # a frozen copy of what it starts from
    rate: float = 1.0  # of the recipe's learning rate


SFT = Method("sft")


def orpo(beta: float, rate: float = 1.0) -> Method:
    return Method("orpo", ORPO(beta), rate=rate)


def probability_ratio(beta: float, rate: float = 1.0) -> Method:
    return Method("probability_ratio", ProbabilityRatio(beta), rate=rate)


def dpo(beta: float, rate: float) -> Method:
    return Method("dpo", DPO(beta), has_reference=True, rate=rate)


class Measured(NamedTuple):
    """Means over held-out pairs, nats."""

    chosen: float  # log-probability a token
    rejected: float
    log_odds: float


@dataclass
class Run:
    """One training: held-out figures at ``steps``, and what it cost."""

    method: str
    beta: float | None
    steps: list[int]
    chosen: list[float]
    rejected: list[float]
    log_odds: list[float]
    calls: int  # forward passes of any model, as a hook counted them
    sequences: int  # sequences in them
    peak_mib: float  # beyond what was held before the models were copied


class Forwards:
    """Counts forward passes of models, by hooks, while it is entered."""

    def __init__(self, *models: nn.Module) -> None:
        self.models, self.calls, self.sequences = models, 0, 0

    def __enter__(self) -> "Forwards":
        self._hooks = [model.register_forward_pre_hook(self._seen, with_kwargs=True) for model in self.models]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.calls += 1
        self.sequences += len(keywords["input_ids"])


Answer = tuple[list[int], list[int]]  # a prompt and what follows


def inputs_of(model: Any, answers: Sequence[Answer]) -> tuple[dict[str, Tensor], Tensor]:
    """What the model takes ``[S, T]``, padded on the right, and the shifted labels ``[S, T - 1]``."""
    length = max(len(prompt) + len(answer) for prompt, answer in answers)
    ids = torch.zeros(len(answers), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(answers):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels[:, 1:].to(device)


def states_of(model: Any, answers: Sequence[Answer]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Hidden states, the head's weight and labels, as the losses take them; and the head's bias."""
    inputs, labels = inputs_of(model, answers)
    head = model.get_output_embeddings()
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return (hidden, head.weight, labels), getattr(head, "bias", None)


def both_sides(examples: Sequence[Example]) -> list[Answer]:
    """Chosen answers first, then their rejected ones."""
    return [(e.prompt, e.chosen) for e in examples] + [(e.prompt, e.rejected) for e in examples]


@torch.no_grad()
def check_head(model: Any, examples: Sequence[Example]) -> None:
    """One pair by the model's own logits and by its head.

    Raises:
        ValueError: they differ, so that the model does more to its logits than its head.
    """
    model.eval()
    answers = both_sides(examples[:1])
    inputs, labels = inputs_of(model, answers)
    states, bias = states_of(model, answers)
    ours = linear_logprobs(*states, bias=bias)
    logits = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    theirs = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).masked_fill(labels == IGNORED, 0)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        worst = (ours - theirs).abs().max().item()
        raise ValueError(
            f"--model: the logits of {type(model).__name__} are not its head's product with its last hidden states: "
            f"log-probabilities differ by up to {worst:.2g}; take a model without a softcap or scale on its logits"
        )


@torch.no_grad()
def measure(model: Any, examples: Sequence[Example], recipe: Recipe) -> Measured:
    """The model in evaluation mode on held-out pairs."""
    was_training = model.training
    model.eval()
    sides = []
    for first in range(0, len(examples), recipe.batch_size):
        with autocast(model, recipe):
            states, bias = states_of(model, both_sides(examples[first : first + recipe.batch_size]))
            means = sequence_logprobs(*states, bias=bias, average=True)
        sides.append(means.double().cpu().view(2, -1))
    model.train(was_training)
    chosen, rejected = torch.cat(sides, -1)
    odds = log_odds(chosen.clamp(max=BELOW_CERTAIN), rejected.clamp(max=BELOW_CERTAIN))
    return Measured(chosen.mean().item(), rejected.mean().item(), odds.mean().item())


def autocast(model: Any, recipe: Recipe) -> Any:
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, torch.bfloat16) if recipe.bf16 else nullcontext()


class Trainee:
    """A copy of a model in training, with its optimiser and, where its method has one, its reference."""

    def __init__(self, start: Any, method: Method, recipe: Recipe, device: torch.device) -> None:
        self.method, self.recipe = method, recipe
        self.model: Any = copy.deepcopy(start).to(device).train()
        self.reference: Any = copy.deepcopy(start).to(device).eval() if method.has_reference else None
        self.forwards = Forwards(*(model.base_model for model in (self.model, self.reference) if model is not None))
        # As in train_orpo.py: at an epsilon of 1e-8 Adam makes full steps of gradients that are mostly rounding.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), recipe.learning_rate * method.rate, (0.9, 0.95), eps=1e-6, weight_decay=0.0
        )
        warmup, steps = max(1, recipe.steps // 10), recipe.steps
        self.schedule = LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)
        )

    def step(self, examples: Sequence[Example], method: Method | None = None) -> None:
        """One update, by the trainee's own method unless another is named."""
        with self.forwards, autocast(self.model, self.recipe):
            loss = self._loss(examples, method or self.method)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, examples: Sequence[Example], method: Method) -> Tensor:
        if method.objective is None:
            states, bias = states_of(self.model, [(example.prompt, example.chosen) for example in examples])
            return -linear_logprobs(*states, bias=bias).sum() / (states[2] != IGNORED).sum()
        answers, known = both_sides(examples), None
        if method.has_reference:
            with torch.no_grad():
                states, bias = states_of(self.reference, answers)
                known = sequence_logprobs(*states, bias=bias)
        states, bias = states_of(self.model, answers)
        return preference_loss(*states, method.objective, bias=bias, reference_logps=known).loss


def batches(examples: Sequence[Example], recipe: Recipe, seed: int) -> list[list[Example]]:
    """A batch for each step: whole rounds over the examples, each in a new order."""
    chance, order = random.Random(seed), list[Example]()
    while len(order) < recipe.steps * recipe.batch_size:
        order += chance.sample(list(examples), len(examples))
    return [order[n * recipe.batch_size : (n + 1) * recipe.batch_size] for n in range(recipe.steps)]


def train(
    start: Any,
    method: Method,
    recipe: Recipe,
    steps: Sequence[Sequence[Example]],
    held_out: Sequence[Example],
    device: torch.device,
    tick: Callable[[], object],
) -> tuple[Run, Any]:
    """Train a copy of ``start``, measured on held-out pairs along the way if there are any; ``tick`` at every step."""
    when = {round(part * len(steps) / recipe.measured) for part in range(recipe.measured + 1)}
    found: list[tuple[int, Measured]] = []
    kept: list[Trainee] = []

    def whole() -> None:
        trainee = Trainee(start, method, recipe, device)
        kept.append(trainee)
        for number, examples in enumerate([*steps, None]):
            if held_out and number in when:
                found.append((number, measure(trainee.model, held_out, recipe)))
            if examples is not None:
                trainee.step(examples)
                trainee.schedule.step()
                tick()

    peak = peak_of(whole, device).beyond_mib
    (trainee,) = kept
    counted, model = trainee.forwards, trainee.model.cpu().eval()
    run = Run(
        method=method.name,
        beta=getattr(method.objective, "beta", None),
        steps=[number for number, _ in found],
        chosen=[at.chosen for _, at in found],
        rejected=[at.rejected for _, at in found],
        log_odds=[at.log_odds for _, at in found],
        calls=counted.calls,
        sequences=counted.sequences,
        peak_mib=peak,
    )
    return run, model


def step_seconds(
    start: Any,
    methods: Sequence[Method],
    recipe: Recipe,
    rounds: Sequence[Sequence[Example]],
    device: torch.device,
) -> dict[str, float]:
    """Median seconds of a step by each method, in turn on the same batches, so that all meet the same disturbances.

    All update one throwaway model: what a step costs does not depend on the weights. The first round warms up.
    """
    host = next((method for method in methods if method.has_reference), methods[0])
    trainee = Trainee(start, host, recipe, device)
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    for examples in rounds:
        for method in methods:
            synchronize(device)
            begun = time.perf_counter()
            trainee.step(examples, method)
            synchronize(device)
            seconds[method.name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:] or times) for name, times in seconds.items()}
