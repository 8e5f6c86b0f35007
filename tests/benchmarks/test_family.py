"""The race of the losses that others released, and the page of the family."""

from __future__ import annotations

import math
import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import race
from benchmarks.harness.measure import UnsupportedError, flops
from benchmarks.harness.record import Record, Row
from benchmarks.problems import floor
from benchmarks.problems.cases import BATCHES, CASES, IGNORE, OBJECTIVE_TASKS, STATES
from benchmarks.problems.inputs import Problem, make_problem
from benchmarks.problems.objectives import AGAINST_REFERENCE, KL, OBJECTIVES, desirable, posed
from benchmarks.problems.providers import NAIVE, PROVIDERS, RELEASED
from benchmarks.problems.sections import sections
from benchmarks.report import family, render, tables
from orpo_kernels import objectives, reference
from orpo_kernels.objectives import CPO, KTO, ORPO

CPU = torch.device("cpu")


def problem(task: str, dtype: str = "float32", head: str = "trainable") -> Problem:
    found = make_problem(CASES["tiny-cpu"], BATCHES["tiny-cpu"], STATES["trained-like"], dtype, head, CPU)
    return posed(found, task)


@pytest.mark.parametrize("task", OBJECTIVE_TASKS)
def test_what_is_raced_is_the_specifications_loss(task: str) -> None:
    """The truth of the race is composed of log-probabilities; this one is the reference's own loss."""
    exact, objective = problem(task).double(), OBJECTIVES[task]
    inputs = exact.hidden, exact.weight, exact.labels
    logps = reference.linear_logprobs(*(getattr(exact.of_reference(), name) for name in ("hidden", "weight", "labels")))
    given, own = logps.sum(-1), reference.linear_logprobs(*inputs).sum(-1)
    if isinstance(objective, KTO):
        wanted = objective.of_answers(own, given, desirable(exact), KL).mean()
    else:
        nll = {"nll_labels": exact.nll_labels} if isinstance(objective, ORPO) else {}
        named = reference.odds_ratio(objective.beta) if isinstance(objective, ORPO) else objective
        weight = getattr(objective, "nll_weight", 0.0)
        wanted = reference.preference_loss(*inputs, named, reference_logps=given, nll_weight=weight, **nll)["loss"]
    assert NAIVE.build(exact, task)().item() == pytest.approx(wanted.item(), rel=1e-12)
    if task in AGAINST_REFERENCE:
        assert 0.1 < (own - given).abs().mean() < 100  # the reference is another model, and not far away


def test_each_loss_has_its_own_nll() -> None:
    for task in OBJECTIVE_TASKS:
        of, labels = problem(task), problem("objective-orpo").labels
        wanted = (of.nll_labels != IGNORE).sum()
        if isinstance(OBJECTIVES[task], CPO):
            assert torch.equal(of.nll_labels[0], labels[0])
        elif isinstance(OBJECTIVES[task], ORPO):
            assert wanted >= (labels[0] != IGNORE).sum()
        else:
            assert wanted == 0
        assert (of.nll_labels[len(labels) // 2 :] == IGNORE).all()


@pytest.mark.parametrize("task", OBJECTIVE_TASKS)
@pytest.mark.parametrize("provider", ["ours", "naive", "liger_eager", "trl"])
def test_what_each_multiplies(provider: str, task: str) -> None:
    """In products of the head's size, as docs/objectives.md says it."""
    of = problem(task)
    try:
        step = PROVIDERS[provider].build(of, task)
    except UnsupportedError as missing:
        if provider in ("ours", "naive"):
            raise
        pytest.skip(str(missing))  # of a machine without that package
    counted = flops(lambda: step().backward()) / (2 * of.weight.numel())
    wanted = 3 + (task in AGAINST_REFERENCE)
    if provider == "ours":
        assert counted == wanted * (of.targets != IGNORE).sum()
    else:  # of all positions; TRL's have one more a sequence, and its fused head computes the logits anew
        again = provider == "trl" and task in AGAINST_REFERENCE
        positions = of.labels.numel() + len(of.labels) * (provider == "trl" and not again)
        assert counted == (wanted + again) * positions


def test_products_are_recorded() -> None:
    asked = Row("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "float32", "full", "ours", task="objective-dpo")
    (row,) = race.measure([asked], device="cpu", repeats=3, seconds=0.0, until=math.inf)
    assert (row.status, row.figures, row.targets) == ("ok", {"products": 4.0}, 16)


def test_the_references_product_is_in_the_floor() -> None:
    of = problem("objective-dpo")
    without, within = (flops(dict(floor.cuts(of, "full", forwards))["whole"]) for forwards in (1, 2))
    assert 3 * within == 4 * without


def _measured() -> list[Row]:
    rows = []
    for place, row in enumerate(sections("cpu")["objectives"]):
        known = {"median_ms": 100.0 + place, "ratio": 1.0 + place, "peak_mib": 50.0, "provider_version": "1.0"}
        rows.append(row.with_(status="ok", figures={"products": 3.0}, **known))
    return rows


def test_the_section_and_its_tables() -> None:
    rows = _measured()
    assert [row.provider for row in rows] == list(RELEASED) * len(OBJECTIVE_TASKS)
    rows[1] = rows[1].with_(status="unsupported", reason="a reason", median_ms=None, peak_mib=None)
    table = tables.costs(rows)
    assert set(table.loss) == {f"[{name}](#{name.lower()})" for name in ("ORPO", "CPO", "SimPO", "DPO", "KTO")}
    of_orpo = table[table.loss == "[ORPO](#orpo)"].iloc[0]
    assert of_orpo["ours"] == "105 ms, 50 MiB"
    assert of_orpo["liger (Liger 1.0)"] == "x 0.5, 50 MiB"
    assert of_orpo["naive (torch 1.0)"] == "-"
    shown = render.shown_as("objectives", "cpu", Record("box", rows=rows))
    assert "| products |" in shown
    assert "unsupported: a reason" in shown
    assert shown.count("a reference's forward within") == len(AGAINST_REFERENCE)
    assert PROVIDERS["trl"].package == "trl"


@pytest.mark.parametrize("member", family.MEMBERS, ids=lambda member: member.__name__)
def test_every_member_says_what_the_page_needs(member: type) -> None:
    of = family.paragraphs(member)
    assert len(of["When"]) > 20
    assert len(of["Source"]) > 5
    assert "`" in of["formula"] or "    " in of["more"]  # a formula, in the line or in the block below it
    assert member.__name__ in family.signature(member)


def test_the_page_has_every_member_and_no_other() -> None:
    named = {name for name in objectives.__all__ if is_dataclass(getattr(objectives, name))}
    page = family.page()
    assert (
        {member.__name__ for member in family.MEMBERS} == named == set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    )
    assert "`DPO(beta=0.1, label_smoothing=0.0, robust=False, nll_weight=0.0, weighting=False)`" in page
    assert family.needs(objectives.MMPO) == ["reference_logps", "margins"]
    assert family.needs(objectives.SPPO) == ["reference_logps"]
    assert family.needs(objectives.ORPO) == []


def test_curves_are_finite_and_reward_a_margin(tmp_path: Path) -> None:
    curves = family.curves()
    assert set(curves) == {member.__name__ for member in family.MEMBERS} - {"SFT", "CrossEntropy"}
    for name, lines in curves.items():
        for label, y in lines.items():
            assert all(map(math.isfinite, y)), (name, label)
    for name in ("ORPO", "SimPO", "DPO", "CPO", "KTO"):
        first = next(label for label in curves[name] if label != "x")
        assert curves[name][first] == sorted(curves[name][first], reverse=True), name
    family.draw(tmp_path / "a.png", family.digest())
    assert render._source_in(tmp_path / "a.png") == family.digest()
