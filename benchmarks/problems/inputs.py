"""From a case's data to tensors: labels as TRL has them, and hidden states of a stated log-probability."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from benchmarks.harness.record import Row
from benchmarks.problems.cases import BATCHES, CASES, IGNORE, STATES, Batch, Case, Pair, States

# The check against float64 runs on this many tokens at most: two float64 copies of a full head would cost more time and
# memory than all that is measured. A multiple of 128, as real heads are and some peers ask for, but not of 256, so that
# tails are masked here too.
SAMPLE_VOCAB = 97 * 128
SAMPLE_BATCH = Batch("sample", (Pair(9, 30, 21), Pair(14, 17, 33)), 48)
WEIGHT_STD = 0.02  # what language models are initialised with


@dataclass(frozen=True)
class Problem:
    """One call of the loss, as every provider gets it: the padded batch."""

    hidden: Tensor  # [2P, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2P, T] answers, IGNORE elsewhere; already shifted
    nll_labels: Tensor  # [2P, T] prompt and answer of the chosen side, IGNORE elsewhere
    softcap: float | None

    @property
    def targets(self) -> Tensor:
        """``[2P, T]``: what is scored at each position. Here the NLL and the answers never name two tokens at once."""
        return torch.where(self.labels != IGNORE, self.labels, self.nll_labels)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def target_rows(self) -> Tensor:
        """``[N, H]`` hidden states of the target positions."""
        return self.hidden[self.targets != IGNORE]

    def upstream(self) -> Tensor:
        """``[2P, T]``, the gradient that log-probabilities get: normal, always the same, 0 where nothing is scored."""
        generator = torch.Generator(self.device).manual_seed(1)
        drawn = torch.randn(self.labels.shape, generator=generator, device=self.device)
        return drawn * (self.targets != IGNORE)

    def of_reference(self) -> Self:
        """The batch as a reference model sees it, which trains nothing: without every 32nd feature, which is exact in
        every dtype and some nats away."""
        hidden = self.hidden.detach().clone()
        hidden[..., ::32] = 0
        return replace(self, hidden=hidden, weight=self.weight.detach())

    def gradients(self) -> dict[str, Tensor]:
        """What the last backward left in hidden and weight."""
        named = {"hidden": self.hidden.grad, "weight": self.weight.grad}
        return {name: grad for name, grad in named.items() if grad is not None}

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def double(self) -> Self:
        """The same numbers in float64, leaves of their own."""
        hidden, weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)


def make_problem(case: Case, batch: Batch, states: States, dtype: str, head: str, device: torch.device) -> Problem:
    """The same numbers for the same arguments, in every process."""
    generator = torch.Generator(device).manual_seed(0)
    # Drawn in the dtype, so that no float32 copy of the head ever exists.
    weight = torch.empty((case.vocab, case.features), dtype=getattr(torch, dtype), device=device)
    weight.normal_(0, WEIGHT_STD, generator=generator)
    pairs = len(batch.pairs)
    tokens = torch.randint(case.vocab, (2 * pairs, batch.positions), generator=generator, device=device)
    labels, nll_labels = torch.full_like(tokens, IGNORE), torch.full_like(tokens, IGNORE)
    for index, pair in enumerate(batch.pairs):
        first = pair.prompt - 1  # the position of the prompt's last token predicts the answer's first
        for row, answer in ((index, pair.chosen), (pairs + index, pair.rejected)):
            labels[row, first : first + answer] = tokens[row, first : first + answer]
        nll_labels[index, : first + pair.chosen] = tokens[index, : first + pair.chosen]
    problem = Problem(weight.new_empty(0), weight, labels, nll_labels, case.softcap)
    hidden = make_hidden(weight, problem.targets, states, case.softcap, generator)
    return replace(problem, hidden=hidden.requires_grad_(), weight=weight.requires_grad_(head == "trainable"))


def problem_of(row: Row, device: torch.device, *, sample: bool = False) -> Problem:
    """What the row asks for, or a ``sample``: a few rows of the same case, small enough for float64."""
    case, batch = CASES[row.case], BATCHES[row.batch]
    if sample:
        case, batch = replace(case, vocab=min(case.vocab, SAMPLE_VOCAB)), SAMPLE_BATCH
    return make_problem(case, batch, STATES[row.states], row.dtype, row.head, device)


def make_hidden(
    weight: Tensor, targets: Tensor, states: States, softcap: float | None, generator: torch.Generator
) -> Tensor:
    """Hidden states ``[..., H]`` of a regime, see ``States``, for a head ``[V, H]`` and targets ``[...]``.

    Against a head of independent normal entries the noise's logits are normal, so their log-sum-exp is close to
    ``log V + noise^2 / 2``. Adding ``c W_y`` to a row moves the label's logit by ``lift = c |W_y|^2`` and the others by
    normal amounts of variance ``lift^2 / H``, which add to the noise's.
    """
    vocab, features = weight.shape
    normal = partial(torch.randn, generator=generator, device=weight.device)
    hidden = normal((*targets.shape, features)) * (states.noise / (WEIGHT_STD * math.sqrt(features)))
    if states.margin is not None:
        spread = normal(targets.shape) * states.spread
        wanted = margin = math.log(vocab) + states.noise**2 / 2 + states.margin + spread
        for _ in range(8):  # wanted = margin + wanted^2 / 2H, where wanted is small beside H
            wanted = margin + wanted.square() / (2 * features)
        if softcap is not None:  # the logit before the cap that the cap maps to the wanted one
            wanted = softcap * torch.atanh((wanted / softcap).clamp(max=0.98))
        label_rows = weight[targets.clamp(min=0)].float()
        lift = (wanted - (hidden * label_rows).sum(-1)) / label_rows.square().sum(-1)
        hidden += (lift * (targets != IGNORE))[..., None] * label_rows
    return hidden.to(weight.dtype)
