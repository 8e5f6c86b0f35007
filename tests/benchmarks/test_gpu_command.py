"""``make gpu`` where there is no GPU: the same steps at toy sizes, what it would run, and what its targets say."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu, race, record, targets
from benchmarks.cases import CASES
from benchmarks.rows import AccuracyRow, Check, Record, Row, Spec, row_of

SPEC = Spec("llama3-8b", "dense", "trained-like", "trainable", "bfloat16", "full", "ours", "cuda")


def test_the_dry_run_lists_every_step_and_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--device", "cuda", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for step in gpu.STEPS:
        assert step in said
    for specs in record.gpu_race().values():
        for spec in specs:
            assert " ".join((*spec.group, spec.provider)) in said
    asked = {spec.group for specs in record.gpu_race().values() for spec in specs}
    assert {target.group for target in targets.GPU} <= asked  # every promise is about something that is measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, make gpu itself runs")
def test_the_whole_command_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "toy.json"
    assert command.main(["gpu", "--device", "cpu", "--json", str(file)]) == 0
    found = Record.load(file)
    assert {check.name: check.status for check in found.checks} == {
        "suite": "ok", "memcheck": "not available", "racecheck": "not available",
    }  # fmt: skip
    assert {row.provider: row.status for row in found.rows} == {"ours_triton": "ok", "naive": "ok", "floor": "ok"}
    ours = next(row for row in found.rows if row.provider == "ours_triton")
    assert ours.err_weight is not None
    assert ours.err_weight < 1e-4
    assert len(found.accuracy) == 30
    assert "no target applies" in capsys.readouterr().out


def test_a_failed_check_and_one_cut_short(tmp_path: Path) -> None:
    def check(code: str, limit: float) -> Check:
        return gpu._check("suite", [sys.executable, "-c", code], limit, tmp_path / "suite.log")

    failed = check("print('FAILED tests/a.py::b'); print('more'); raise SystemExit(1)", 60)
    assert failed.status == "failed"
    assert failed.detail.endswith("\nFAILED tests/a.py::b")
    late = check("import time; print('so far', flush=True); time.sleep(60)", 1)
    assert (late.status, "so far" in late.detail, late.seconds < 30) == ("not reached", True, True)
    other = check("print('Device not supported'); raise SystemExit(9)", 60)
    assert other.status == "not available"
    assert (tmp_path / "suite.log").read_text() == "Device not supported\n"


def test_what_the_budget_did_not_reach_is_a_row() -> None:
    wanted = [replace(SPEC, device="cpu", provider=name) for name in ("ours", "naive")]
    rows = race.run(wanted, budget=-1)
    assert [(row.provider, row.status) for row in rows] == [("ours", "not reached"), ("naive", "not reached")]
    assert "budget" in rows[0].reason


def test_on_a_gpu_the_providers_of_a_head_share_a_process() -> None:
    specs = [SPEC, replace(SPEC, provider="naive"), replace(SPEC, case="gemma2-2b")]
    assert race._one_process(specs) == specs[:2]
    assert race._one_process([replace(spec, device="cpu") for spec in specs]) == [replace(SPEC, device="cpu")]


def test_a_failure_ends_its_process_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first measurement names no dtype; the others of its process get theirs all the same."""
    monkeypatch.setattr(race, "_one_process", list)
    bad = Spec("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "nothing", "full", "floor", repeats=1)  # type: ignore[arg-type]
    good = replace(bad, dtype="float32")
    assert [row.status for row in race.run([bad, good])] == ["failed", "ok"]


def _measured(**changes: object) -> Row:
    row = row_of(SPEC, "ok").with_(median_ms=10.0, floor_ms=9.5, ratio=10 / 9.5, peak_mib=3000.0)
    return row.with_(**changes)


def test_targets_say_what_holds() -> None:
    rows = [
        _measured(),
        _measured(provider="naive", median_ms=30.0),
        _measured(provider="compiled", median_ms=9.0),
        row_of(replace(SPEC, provider="cce"), "unsupported", "not installed"),
    ]
    regimes = [
        AccuracyRow("-11", -11.0, "bfloat16", "grad_weight", 2e-3, 1e-3, 4e-3),
        AccuracyRow("-0.4", -0.4, "bfloat16", "grad_weight", 9e-3, 3e-3, 2e-2),
    ]
    said = {verdict.claim: verdict for verdict in targets.verdicts("gpu", Record(rows=rows, accuracy=regimes))}
    where = "llama3-8b, dense, trainable"
    assert said[f"floor / time, {where}"].holds
    assert said[f"faster than naive, {where}"].measured == "3.00"
    assert said[f"faster than compiled, {where}"].holds is False
    assert said[f"faster than cce, {where}"].holds is None
    assert "not installed" in said[f"faster than cce, {where}"].measured
    limit = 1024 + 4 * CASES["llama3-8b"].vocab * CASES["llama3-8b"].features / 2**20
    assert said[f"memory, {where}"].bound == f"at most {limit:.0f} MiB"
    assert said[f"memory, {where}"].holds
    assert said["naive's error of grad_weight over ours, in every regime"].measured == "2.00"
    assert said["naive's error of grad_weight over ours, where mean logp is above -0.5"].holds is False
    assert all(math.isfinite(t.least) for t in targets.GPU if isinstance(t, targets.Target))


def test_measured_again_replaces(tmp_path: Path) -> None:
    kept = Record(rows=[_measured()], checks=[Check("suite", "ok", 1.0, "")])
    assert record.merged(kept.rows, [_measured(median_ms=1.0)]) == [_measured(median_ms=1.0)]
    kept.save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json") == kept
