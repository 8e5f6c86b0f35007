"""The benchmark itself: no provider rots, the documents show recorded figures, inputs are what they claim."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import accuracy, race
from benchmarks.harness.measure import UnsupportedError
from benchmarks.harness.memory import peak_of
from benchmarks.harness.record import Record, Row, merged
from benchmarks.lab.compile import TARGETS, problem
from benchmarks.problems import floor
from benchmarks.problems.cases import (
    BATCHES,
    CASES,
    HEADS,
    IGNORE,
    LOGITS_TASKS,
    OBJECTIVE_TASKS,
    STATES,
    TASKS,
    Batch,
    Case,
    Pair,
)
from benchmarks.problems.inputs import Problem, make_problem
from benchmarks.problems.providers import FLOOR, NAMES, PROVIDERS, RELEASED, Provider, default_names, objective
from benchmarks.problems.sections import sections
from benchmarks.report import plots, render, tables
from orpo_kernels import explain, reference

CPU = torch.device("cpu")
TINY = Case("tiny", 32, 299)
TINY_CAPPED = Case("tiny-capped", 32, 299, softcap=30.0)
FEW = Batch("few", (Pair(5, 9, 7), Pair(3, 11, 13)), 16)
ASKED = Row("small-v32k-cpu", "ragged-small-cpu", "trained-like", "trainable", "float32", "full", "ours")
# The others compute everything everywhere. Liger has the loss alone and no softcap.
MAY_BE_ABSENT = {"cce", "cce_filtered", "liger", "liger_eager", "quack", "trl_fused", "trl", "torch_lce", "ours_triton"}


# Losses that others released by those who have one of their own, and by one of those who give log-probabilities.
RACED = [
    pytest.param(provider, task, id=f"{provider.name}-{task}")
    for provider in PROVIDERS.values()
    for task in TASKS
    if task not in OBJECTIVE_TASKS or provider.name in (*RELEASED, "torch_lce")
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", [TINY, TINY_CAPPED], ids=lambda case: case.name)
@pytest.mark.parametrize(("provider", "task"), RACED)
def test_every_provider_computes_the_task_or_says_why_not(provider: Provider, case: Case, head: str, task: str) -> None:
    problem = make_problem(case, FEW, STATES["trained-like"], "float32", head, CPU)
    reads = task in LOGITS_TASKS
    if (provider.logits is None and task not in provider.chains) if reads else provider.name in ("lazy", "quack"):
        with pytest.raises(UnsupportedError, match="gives no log"):
            provider.build(problem, task)
        return
    try:
        with torch.compiler.set_stance("force_eager"):  # what is tested is the wiring, not the compiler
            row = race.check(provider, ASKED.with_(task=task), problem)
    except UnsupportedError as reason:
        if provider.name in MAY_BE_ABSENT and len(str(reason)) > 10:
            return
        raise
    assert row.status == "ok", row.reason
    assert row.err_loss is not None
    assert row.err_loss < 1e-5
    assert (row.err_weight is None) == (head == "frozen")


@pytest.mark.parametrize("pairs", [FEW.pairs, FEW.pairs[:1]], ids=len)
def test_quack_gets_flat_rows_by_eights(pairs: tuple[Pair, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU, so what it is given stands in for them: the same loss and gradients come of it."""

    def loss(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
        assert (x.dim(), x.shape[0] % 8, x.shape[0] - (target != ignore_index).sum() < 8) == (2, 0, True)
        return F.cross_entropy(F.linear(x, weight), target, ignore_index=ignore_index)

    problem = make_problem(TINY, Batch("few", pairs, 16), STATES["random"], "float32", "trainable", CPU)
    with pytest.raises(UnsupportedError, match="need a GPU"):
        PROVIDERS["quack"].build(problem, "sft")
    theirs = race._outputs(problem, PROVIDERS["naive"].build(problem, "sft"))
    monkeypatch.setattr(Problem, "device", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", SimpleNamespace(chunked_linear_cross_entropy=loss))
    torch.testing.assert_close(race._outputs(problem, PROVIDERS["quack"].build(problem, "sft")), theirs)


def test_log_probabilities_get_any_upstream_gradient() -> None:
    """The same at each call, one for each scored position, of both signs: no shortcut of a loss serves it."""
    problem = make_problem(TINY, FEW, STATES["random"], "float32", "trainable", CPU)
    upstream = problem.upstream()
    assert torch.equal(upstream, problem.upstream())
    assert torch.equal(upstream != 0, problem.targets != IGNORE)
    assert (upstream > 0).any()
    assert (upstream < 0).any()
    logps = torch.zeros(problem.targets.shape, requires_grad=True)
    objective(problem, "logprobs")(logps).backward()
    assert torch.equal(logps.grad, upstream)
    assert set(default_names("cpu", "logprobs")) == {FLOOR, "naive", "trl_fused", "cce", "torch_lce", "ours"}


def test_the_backend_left_out_is_what_auto_takes() -> None:
    problem = make_problem(TINY, FEW, STATES["random"], "float32", "trainable", CPU)
    plan = explain(problem.hidden, problem.weight, problem.labels)
    assert f"ours_{plan.backend}" not in default_names("cpu")


def test_a_wrong_gradient_is_reported_as_wrong() -> None:
    def build(problem, task):  # type: ignore[no-untyped-def]
        step = PROVIDERS["naive"].build(problem, task)
        return lambda: 1.01 * step()

    problem = make_problem(TINY, FEW, STATES["trained-like"], "float32", "trainable", CPU)
    row = race.check(Provider("scaled", "torch", None, build), ASKED, problem)
    assert row.status == "wrong"
    assert "error" in row.reason


@pytest.mark.parametrize(
    ("phase", "head", "products"), [("forward", "trainable", 1), ("full", "frozen", 2), ("full", "trainable", 3)]
)
def test_every_cut_of_the_floor_is_the_same_products(
    phase: str, head: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(floor.ROWS, "cpu", (7,))
    monkeypatch.setitem(floor.TOKENS, "cpu", (100, 64))
    problem = make_problem(TINY, FEW, STATES["random"], "float32", head, CPU)
    found = dict(floor.cuts(problem, phase))
    names = ["7 rows", "100 tokens", "64 tokens", "whole"]
    both = [layout for name in names for layout in (name, f"{name}, z by columns")]
    assert list(found) == (both if products == 3 else names)
    for name, step in found.items():
        with FlopCounterMode(display=False) as counter:
            step()
        assert counter.get_total_flops() == products * 2 * FEW.targets * TINY.vocab * TINY.features, name


def test_logits_that_do_not_fit_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floor.ROWS, "cpu", (7,))
    monkeypatch.setitem(floor.WHOLE_BYTES, "cpu", 4 * FEW.targets * TINY.vocab - 1)
    problem = make_problem(TINY, FEW, STATES["random"], "float32", "trainable", CPU)
    assert "whole" not in dict(floor.cuts(problem, "full"))


def test_the_floor_is_the_fastest_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"slow": lambda: time.sleep(0.05), "fast": lambda: None, "slower": lambda: time.sleep(0.1)}
    monkeypatch.setattr(floor, "cuts", lambda *_: iter(steps.items()))
    problem = make_problem(TINY, FEW, STATES["random"], "float32", "trainable", CPU)
    assert floor.build_floor(problem, "full") == ("fast", steps["fast"])


@pytest.mark.parametrize("provider", [FLOOR, "ours"])
def test_the_cut_of_the_floor_is_recorded(provider: str) -> None:
    asked = Row("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "float32", "full", provider, task="logprobs")
    (row,) = race.measure([asked], device="cpu", repeats=3, seconds=0.0, until=math.inf)
    assert (row.status, row.repeats) == ("ok", 3)
    assert row.cut in ("whole", "whole, z by columns")  # whichever was the faster
    assert row.ratio == row.median_ms / row.floor_ms


def test_an_exception_becomes_a_row() -> None:
    def measure(**changes: str) -> Row:
        return next(race.measure([ASKED.with_(**changes)], device="cpu", repeats=1, seconds=0.0, until=math.inf))

    row = measure(dtype="no such dtype")
    assert row.status == "failed"
    assert "AttributeError" in row.reason
    assert measure(provider="cce").status == "unsupported"


def test_peak_memory_is_the_calls_own() -> None:
    def call() -> None:
        torch.ones(64 << 18)  # 64 MiB, freed at once

    torch.ones(256 << 18)  # an earlier and higher peak, which must not count
    peak = peak_of(call, CPU)
    assert 60 < peak.beyond_mib < 80
    assert peak.absolute_mib is not None
    assert peak.absolute_mib > peak.beyond_mib


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_like_states_are_what_they_claim(dtype: str, softcap: float | None) -> None:
    case = replace(CASES["small-v32k-cpu"], vocab=8000, softcap=softcap)
    batch = BATCHES["ragged-small-cpu"]
    problem = make_problem(case, batch, STATES["trained-like"], dtype, "frozen", CPU)
    scored = problem.targets != IGNORE
    assert scored.sum() == batch.targets
    logps = reference.linear_logprobs(
        problem.hidden.detach()[scored].double(), problem.weight.double(), problem.targets[scored], softcap=softcap
    )
    assert logps.mean().item() == pytest.approx(-1.5, abs=0.15)
    assert logps.quantile(0.75).item() > -0.3  # many tokens are nearly certain
    assert logps.quantile(0.1).item() < -3.5  # and some are surprises


@pytest.mark.slow
def test_the_table_of_regimes_covers_what_it_names() -> None:
    for row in accuracy.run(targets=32, features=256, vocab=8000):
        assert row.holds, row
        if float(row.regime) > -10:  # the others depend on the vocabulary
            assert row.mean_logp == pytest.approx(float(row.regime), rel=0.25)


def test_specified_sizes() -> None:
    assert BATCHES["ragged-cpu"].targets == 2697
    for batch in BATCHES.values():
        assert all(pair.prompt - 1 + max(pair.chosen, pair.rejected) <= batch.positions for pair in batch.pairs)


def _rows() -> list[Row]:
    timing = {"median_ms": 100.0, "p20_ms": 99.0, "p80_ms": 101.0, "floor_ms": 90.0, "ratio": 1.11}
    ours = ASKED.with_(status="ok", **timing, peak_mib=50.0)
    return [
        ours,
        ours.with_(provider="naive", median_ms=80.0, peak_mib=500.0),
        ours.with_(provider=FLOOR, median_ms=90.0, ratio=1.0, peak_mib=None),
        ASKED.with_(provider="cce", status="unsupported", reason="no GPU"),
        ours.with_(batch="length-128-cpu"),
        ours.with_(batch="length-256-cpu"),
    ]


def test_several_names_after_one_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["record", "--only", "small", "nonsense", "--device", "cpu"]) == 2
    assert "no section nonsense; there are headline, " in capsys.readouterr().err
    assert command.main(["loss", "--heads", "frozen", "thawed"]) == 2
    assert "no thawed; there are trainable, frozen" in capsys.readouterr().err


def test_compare_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    rows = _rows()
    Record("box", rows=rows).save(before)
    Record("box", rows=[row.with_(median_ms=2 * row.median_ms) if row.median_ms else row for row in rows]).save(after)
    assert Record.load(before).rows == rows
    assert command.main(["compare", str(before), str(after)]) == 0
    assert "2.00" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not a record"):
        Record.load(_json(tmp_path / "c.json", {}))


def _json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_who_beats_ours_is_said() -> None:
    assert tables.beaten(_rows())[["provider", "better in"]].values.tolist() == [["naive", "time"]]


def test_no_legend_covers_a_line() -> None:
    figure = plots.drawn(_rows())
    figure.canvas.draw()
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    assert legends
    for legend in legends:
        assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_plot_names_its_source(tmp_path: Path) -> None:
    plots.plot(_rows(), tmp_path / "a.png", "from here")
    assert render._source_in(tmp_path / "a.png") == "from here"


def test_render_fills_marked_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    document, pictures = tmp_path / "page.md", tmp_path / "images"
    document.write_text("\n".join(f"<!-- benchmarks:cpu-{name} -->\n<!-- /benchmarks -->" for name in render.TABLES))
    assert render.render([document], pictures, write=False) == []  # nothing is recorded, so there is nothing to show
    rows = accuracy.run(targets=8, features=16, vocab=64)
    Record("box", "2026-01-01", rows=_rows(), accuracy=rows).save(tmp_path / "cpu-test-2026-01-01.json")
    assert len(render.render([document], pictures, write=False)) == 2
    render.render([document], pictures)
    assert render.render([document], pictures, write=False) == []
    assert "| ours | 100 |" in document.read_text()
    document.write_text("<!-- benchmarks:cpu-nonsense -->\n<!-- /benchmarks -->")
    with pytest.raises(ValueError, match="names no table"):
        render.render([document], pictures)


def _whole() -> list[Row]:
    rows = [row for section in sections("cpu").values() for row in section]
    return [row.with_(status="ok", median_ms=100.0, floor_ms=90.0, ratio=1.1, peak_mib=5.0) for row in rows]


def test_a_partial_record_empties_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `record --only small` on another day leaves is no reason to forget the other sections."""
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    accurate = accuracy.run(targets=8, features=16, vocab=64)
    whole, of_small = _whole(), [row for row in _whole() if (row.case, row.task) == ("small-v32k-cpu", "loss")]
    small = [row.with_(median_ms=1.0) for row in of_small]
    Record("box", "2026-01-01", rows=whole, accuracy=accurate).save(tmp_path / "cpu-test-2026-01-01.json")
    document, pictures = tmp_path / "page.md", tmp_path / "images"
    document.write_text("\n".join(f"<!-- benchmarks:cpu-{name} -->\n<!-- /benchmarks -->" for name in render.TABLES))
    render.render([document], pictures)
    before = document.read_text()
    Record("box", "2026-01-02", rows=small).save(tmp_path / "cpu-test-2026-01-02.json")
    assert render.render([document], pictures) == []
    assert document.read_text() == before
    (reason,) = render.newest()[1]
    assert reason.startswith("cpu-test-2026-01-02.json lacks")
    newer = merged(whole, small)  # measured again on that day, and nothing lost
    Record("box", "2026-01-03", rows=newer, accuracy=accurate).save(tmp_path / "cpu-test-2026-01-03.json")
    assert document in render.render([document], pictures)


def test_a_table_without_figures_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    Record("box", "2026-01-01", rows=_rows()).save(tmp_path / "cpu-test-2026-01-01.json")
    document = tmp_path / "page.md"
    document.write_text("<!-- benchmarks:cpu-logprobs -->\nas it was\n<!-- /benchmarks -->")
    assert render.render([document], tmp_path / "images") == [tmp_path / "images" / "cpu.png"]


def test_time_over_floor_is_explained_where_it_is_shown() -> None:
    """It is no quotient of the column beside it: each row has a floor of its own, timed in turn with it."""
    _, record = render.newest()[0]["cpu"]
    for row in record.rows:
        assert row.ratio is None or row.ratio == pytest.approx(row.median_ms / row.floor_ms)
    for document in render.DOCUMENTS[:2]:
        assert "timed in turn with" in document.read_text().partition("<!-- benchmarks:")[0], document.name


def test_documents_show_the_recorded_figures() -> None:
    assert render.render(write=False) == [], "run `python -m benchmarks render`"


def test_the_recorded_compilation_has_no_problem() -> None:
    (file,) = (render.RESULTS / "compiled").glob("*.json")
    rows = json.loads(file.read_text())
    assert {row["target"] for row in rows} == set(TARGETS)
    assert not [row for row in rows if problem(row)]
    assert render._compiled().count("\n") > len(TARGETS)


def test_every_section_and_default_names_known_things() -> None:
    rows = [row for device in ("cpu", "cuda") for section in sections(device).values() for row in section]
    assert {row.provider for row in rows} <= set(NAMES)
    assert {row.case for row in rows} <= set(CASES)
    assert {row.batch for row in rows} <= set(BATCHES)
    assert len({row.key for row in rows}) == len(rows)
