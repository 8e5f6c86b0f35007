"""What ``fuse`` does to each class of the zoo: fused, fused with an operation that needs the logits, or refused.

``python -m tests.lazy.models`` records it for the installed transformers in ``docs/models.json`` and writes the table
in ``docs/models.md``; ``--render`` writes the table again from the record.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR
from orpo_kernels.integrations import fuse, fusion_report, unfuse
from tests.lazy.model_zoo import KINDS, LENGTH, NAMES, NotBuiltError, build, inputs_of

DOCS = Path(__file__).parents[2] / "docs"
RECORD, TABLE = DOCS / "models.json", DOCS / "models.md"
MARKED = re.compile(r"(<!-- models -->\n).*?(<!-- /models -->)", re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """What became of a class; ``detail`` says which operations, or why not."""

    name: str
    status: str  # "fused", "materialises", "refused" or "not built"
    detail: str = ""
    chain: str = ""  # what the class's own loss did to the logits, from the head on
    generates: bool = False  # the same tokens, fused and not; False where the stock class generates none here


@dataclass(frozen=True)
class Step:
    """Every number of one forward and backward."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def examine(name: str, *, autocast: bool = False) -> Outcome:
    """Stock, fused and unfused runs of a class, compared; AssertionError where a number is wrong.

    ``autocast`` runs them in mixed precision, with logits in bfloat16.
    """
    try:
        model = build(name)
        stock = stock_steps(model, autocast)
    except NotBuiltError as reason:
        return Outcome(name, "not built", textwrap.shorten(str(reason), 150, placeholder=" ..."))
    tokens = generated(model)
    head = model.get_output_embeddings()
    exact = {}
    if isinstance(head, nn.Linear):
        with head_in_float64(head):
            exact = {consumer.__name__: step(model, consumer, autocast) for consumer in CONSUMERS}
    report, chain, fused = fusion_report(model), "", {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the report
        fuse(model)
        for consumer in CONSUMERS:
            fused[consumer.__name__] = step(model, consumer, autocast)
            chain = chain or ", ".join(f"`{each}`" for each in report.chains)
    lazily = report.fused
    assert lazily is (report.refusal is None), f"{name}: {report}"
    if lazily:
        assert report.calls == FORWARDS, f"{name}: {report.calls} of {FORWARDS} forwards gave lazy logits"
        for consumer, found in fused.items():
            precision = torch.bfloat16 if autocast else torch.float32
            assert_as_accurate(f"{name}, {consumer}", found, stock[consumer], exact[consumer], precision)
    else:
        for consumer, found in fused.items():
            assert_same(f"{name}, refused, {consumer}", found, stock[consumer])
    operations = sorted({f"`{each.operation}`" for each in report.materialised})
    same = generated(model)
    assert (tokens is None) == (same is None), f"{name}: generates only {'fused' if tokens is None else 'unfused'}"
    assert tokens is None or torch.equal(tokens, same), f"{name}: other tokens when fused"
    unfuse(model)
    for consumer in CONSUMERS:
        found = step(model, consumer, autocast)
        assert_same(f"{name}, unfused, {consumer.__name__}", found, stock[consumer.__name__])
    status = "refused" if not lazily else "materialises" if operations else "fused"
    return Outcome(name, status, report.refusal or ", ".join(operations), chain, tokens is not None)


def stock_steps(model: Any, autocast: bool) -> dict[str, Step]:
    """A step of each consumer; NotBuiltError where the class wants more than tokens."""
    try:
        return {consumer.__name__: step(model, consumer, autocast) for consumer in CONSUMERS}
    except Exception as error:
        raise NotBuiltError(f"not on tokens alone: {type(error).__name__}: {' '.join(str(error).split())}") from error


def own_loss(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that the class computes when it is given labels."""
    loss = _with_labels(model).loss
    return loss, {"loss": loss}


def logprobs(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the next tokens with an upstream gradient each, and the logits' mean for a log."""
    logits = model(**inputs_of(model)[0]).logits
    logps = _logps(model, logits)
    upstream = torch.linspace(-0.5, 1.0, logps.numel()).view_as(logps)
    return (logps * upstream).sum(), {"logps": logps, "mean": logits.float().mean().detach()}


def preference(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Both in one step, beside a reference without gradients, with accuracy and entropy for a log."""
    with torch.no_grad():
        reference = _logps(model, model(**inputs_of(model)[0]).logits)
    output = _with_labels(model)
    logps = _logps(model, output.logits)
    chosen, rejected = (logps - reference).sum(-1)
    with torch.no_grad():
        scores = _scores(output.logits)
        entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)
        hits = (scores.argmax(-1) == inputs_of(model)[1][:, 1:]).float().mean()
    loss = output.loss - F.logsigmoid(0.1 * (chosen - rejected))
    return loss, {"logps": logps, "reference": reference, "entropy": entropy, "hits": hits}


def _with_labels(model: Any) -> Any:
    inputs, labels = inputs_of(model)
    codebooks = type(model).__name__.startswith("Musicgen")
    return model(**inputs, labels=labels[..., None] if codebooks else labels)


def _scores(logits: Tensor) -> Tensor:
    """Of the next tokens; some classes put positions of their own before those of the tokens."""
    return logits[:, logits.shape[1] - LENGTH : -1]


def _logps(model: Any, logits: Tensor) -> Tensor:
    labels = inputs_of(model)[1][:, 1:]
    logps = torch.log_softmax(_scores(logits), dim=-1)
    return logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)


Consumer = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
CONSUMERS: Sequence[Consumer] = (own_loss, logprobs, preference)
FORWARDS = 4  # of the model in a step of each


def step(model: Any, consumer: Consumer, autocast: bool) -> Step:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, values = consumer(model)
    total.backward()
    grads = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step({key: value.detach() for key, value in values.items()}, grads)


def generated(model: Any) -> Tensor | None:
    """Four greedy tokens, or None where this transformers fails at it for the class."""
    inputs, _ = inputs_of(model)
    accepted = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask", "pixel_values")}
    start = {"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {}
    training = model.training
    try:
        found = model.eval().generate(**accepted, **start, max_new_tokens=4, do_sample=False, num_beams=1)
    except Exception:  # of whatever kind: the stock class raises it too, or the comparison above fails
        return None
    finally:
        model.train(training)
    assert isinstance(found, Tensor)
    return found


@contextmanager
def head_in_float64(head: nn.Linear) -> Iterator[None]:
    """The head's product and all that follows it in float64, above the same hidden states."""

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.double()
        return F.linear(hidden.double(), head.weight.double(), bias)

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def assert_as_accurate(name: str, ours: Step, stock: Step, exact: Step, precision: torch.dtype) -> None:
    """Within twice the stock run's own error, or below what rounding amounts to.

    Values are measured beside one nat at the least. The gradient of some parameters is zero but for rounding (a bias of
    keys), so that it is measured beside the gradient of all; in bfloat16, where one of a hundred parameters is always
    further off than its stock self, beside no less than that.
    """
    assert ours.grads.keys() == stock.grads.keys(), name
    whole = torch.stack([grad.double().norm() for grad in exact.grads.values()]).norm()
    least_grad = whole.item() * (1e-2 if precision is torch.float32 else 1.0)
    for part, floor, least in (("values", VALUE_FLOOR, 1.0), ("grads", GRAD_FLOOR, least_grad)):
        mine, theirs, truth = (getattr(run, part) for run in (ours, stock, exact))
        for key, value in mine.items():
            assert value.shape == theirs[key].shape, f"{name}, {key}"
            assert value.dtype == theirs[key].dtype, f"{name}, {key}: {value.dtype}"
            true = truth[key].double()
            size = max(true.norm().item(), least)
            error, yardstick = ((each.double() - true).norm().item() for each in (value, theirs[key]))
            allowed = max(FACTOR * yardstick, floor[precision] * size)
            assert error <= allowed, f"{name}, {key}: error {error:.2e}, stock {yardstick:.2e}, allowed {allowed:.2e}"


def assert_same(name: str, found: Step, stock: Step) -> None:
    """Bit for bit."""
    for part in ("values", "grads"):
        mine, theirs = getattr(found, part), getattr(stock, part)
        assert mine.keys() == theirs.keys(), name
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), f"{name}, {key}"


def load() -> tuple[dict[str, str], list[Outcome]]:
    """Versions, and what was recorded with them."""
    found = json.loads(RECORD.read_text())
    return found["versions"], [Outcome(**each) for each in found["classes"]]


def table(versions: dict[str, str], outcomes: list[Outcome]) -> str:
    """Markdown: how many of each kind, and a line for each class."""
    lines = [
        f"Recorded with transformers {versions['transformers']} and torch {versions['torch']}.",
        "",
        "| | classes | built | fused | of them with full logits | refused | same tokens |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in (*dict.fromkeys(KINDS.values()), "all"):
        group = [each for each in outcomes if kind in (KINDS.get(each.name), "all")]
        count = Counter(each.status for each in group)
        numbers = (
            len(group),
            len(group) - count["not built"],
            count["fused"] + count["materialises"],
            count["materialises"],
            count["refused"],
            sum(each.generates for each in group),
        )
        lines.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
    lines += ["", "| class | | its own loss, or why not | tokens |", "|---|---|---|---|"]
    for each in outcomes:
        said = "; ".join(filter(None, (each.chain, each.detail))).replace("|", "/")
        tokens = "" if each.status == "not built" else "same" if each.generates else "not compared"
        lines.append(f"| {each.name} | {each.status} | {said} | {tokens} |")
    return "\n".join(lines) + "\n"


def rendered(document: str) -> str:
    """The document with its table from the record."""
    versions, outcomes = load()
    return MARKED.sub(lambda found: found[1] + table(versions, outcomes) + found[2], document)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what fuse does to each class of transformers.")
    parser.add_argument("--render", action="store_true", help="write the table from the record and run nothing")
    if not parser.parse_args().render:
        torch.set_num_threads(1)
        outcomes = [examine(name) for name in NAMES]
        versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
        found = {"versions": versions, "classes": [asdict(each) for each in outcomes]}
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    TABLE.write_text(rendered(TABLE.read_text()))


if __name__ == "__main__":
    main()
