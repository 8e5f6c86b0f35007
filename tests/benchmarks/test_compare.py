"""Two checkouts in one run, at toy size: this one against the commit that it stands on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import isolate
from benchmarks.harness.machine import ROOT, commit
from benchmarks.harness.record import Record, Row
from benchmarks.lab import compare
from benchmarks.problems.sections import compared

TOY = Row("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "float32", "full")
needs_git = pytest.mark.skipif(not commit(), reason="compares commits, and this is no git checkout")


@needs_git
@pytest.mark.slow
def test_both_packages_run_the_same_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    wanted = ["--cases", "tiny-cpu", "--batches", "tiny-cpu", "--heads", "frozen", "--dtypes", "float32"]
    options = [*wanted, "--rounds", "1", "--device", "cpu", "--json", str(file)]
    assert command.main(["compare", "--against", "HEAD", *options]) == 0
    before, after = Record.load(file).rows
    assert (before.provider, after.provider, before.status, after.status) == ("before", "after", "ok", "ok")
    assert (before.commit, after.commit) == (commit().removesuffix("+"), commit())
    assert before.loss == pytest.approx(after.loss)
    assert before.head == after.head == "frozen"
    assert after.ratio == after.median_ms / before.median_ms
    assert after.figures["ratios"] == [after.ratio]
    assert "of a round" in capsys.readouterr().out


@needs_git
def test_rounds_alternate_and_medians_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"before": iter([100.0, 900.0, 110.0]), "after": iter([50.0, 55.0, 60.0])}
    seen = []

    def process(module: str, group: list[Row], options: object, environment: dict[str, str]) -> list[Row]:
        (row,) = group
        package = Path(environment["ORPO_CHECKOUT"])
        assert (package / "orpo_kernels" / "__init__.py").exists()
        seen.append((row.provider, package == ROOT))
        return [row.with_(status="ok", median_ms=next(taken[row.provider]), loss=1.0)]

    monkeypatch.setattr(isolate, "process", process)
    before, after = compare.run([TOY], "HEAD", "cpu", 3)
    assert [side for side, _ in seen] == ["before", "after", "after", "before", "before", "after"]
    assert all(mine == (side == "after") for side, mine in seen)
    assert (before.median_ms, after.median_ms, after.ratio) == (110.0, 55.0, 0.5)
    line = compare.table([before, after]).iloc[0]
    assert (line["ratio"], line["of a round"], line["loss gap"]) == (0.5, "0.061-0.545", 0.0)


@needs_git
def test_a_side_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(module: str, group: list[Row], *_: object, **__: object) -> list[Row]:
        if group[0].provider == "before":
            return [group[0].with_(status="failed", reason="no such function")]
        return [group[0].with_(status="ok", median_ms=1.0)]

    monkeypatch.setattr(isolate, "process", process)
    before, after = compare.run([TOY], "HEAD", "cpu", 1)
    assert (before.status, after.status, after.ratio) == ("failed", "ok", None)
    assert compare.table([before, after]).iloc[0][""] == "before: failed: no such function"


def test_another_package_than_the_one_asked_for_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORPO_CHECKOUT", str(tmp_path))
    with pytest.raises(RuntimeError, match="orpo_kernels came from"):
        next(compare.measure([TOY], device="cpu", until=0.0))


def test_what_cannot_be_compared_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["compare", "one.json"]) == 2
    assert "two records, or --against COMMIT" in capsys.readouterr().err
    assert command.main(["compare", "--against", "no-such-commit"]) == 2
    assert "--against no-such-commit: git cannot check it out" in capsys.readouterr().err


def test_the_usual_rows_and_those_asked_for() -> None:
    usual = {(row.case, row.batch, row.dtype, row.head) for row in compared("cpu", None, None, None, None)}
    for head in ("trainable", "frozen"):
        assert ("qwen2.5-0.5b-cpu", "ragged-cpu", "bfloat16", head) in usual
        assert ("small-v32k-cpu", "ragged-small-cpu", "float32", head) in usual
    assert ("qwen2.5-0.5b-cpu", "ragged-cpu", "float32", "trainable") in usual
    (row,) = compared("cpu", ["tiny-cpu"], ["tiny-cpu"], ["frozen"], ["float32"])
    assert row.group == TOY.with_(head="frozen").group
