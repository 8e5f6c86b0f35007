"""``make gpu`` where there is no GPU: the same steps at toy sizes, what it would run, and what its targets say."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import accuracy, race
from benchmarks.harness import isolate
from benchmarks.harness.machine import ROOT
from benchmarks.harness.record import AccuracyRow, Check, Record, Row, merged
from benchmarks.lab import gpu, proof
from benchmarks.problems.cases import CASES
from benchmarks.problems.sections import gpu_race
from benchmarks.report import promises

ASKED = Row("llama3-8b", "dense", "trained-like", "trainable", "bfloat16", "full", "ours")


def test_the_dry_run_lists_every_step_and_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--device", "cuda", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for step in gpu.STEPS:
        assert step in said
    for rows in gpu_race().values():
        for row in rows:
            assert " ".join(filter(None, row.key)) in said
    asked = {row.group for rows in gpu_race().values() for row in rows}
    assert {
        target.group for target in promises.PROMISES["gpu"]
    } <= asked  # every promise is about something that is measured


def test_the_tests_it_names_are_there() -> None:
    """pytest says nothing of a --deselect or of a word after -k that fits no test."""
    named = [
        word.removeprefix("--deselect=").split("::") for word in (*gpu.SUITE, *gpu.NO_GPU, *gpu.SANITIZED, *gpu.TOY)
    ]
    files = [(ROOT / file, tests) for file, *tests in named if file.endswith(".py")]
    for file, tests in files:
        assert file.is_file(), file
        assert all(f"def {test}(" in file.read_text() for test in tests), tests
    for words in (gpu.SANITIZED, gpu.TOY):
        text = "".join((ROOT / word).read_text() for word in words if word.endswith(".py"))
        for name in re.findall(r"\w+", words[-1].replace(" and ", " ").replace(" or ", " ")):
            assert re.search(rf"def test_\w*{name}|\b{name}\b", text), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_one_sentence_and_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs a CUDA device and torch sees none" in said.err


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_make_gpu_takes_the_python_of_the_venv(tmp_path: Path) -> None:
    assert "python3 -m benchmarks gpu" in _make(tmp_path, "-n", "gpu").stdout
    venv = tmp_path / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").touch()
    assert ".venv/bin/python -m benchmarks gpu" in _make(tmp_path, "-n", "gpu").stdout


def test_make_gpu_says_what_python_lacks(tmp_path: Path) -> None:
    done = _make(tmp_path, "gpu", f"GPU_PYTHON={sys.executable} -S")  # without what is installed into it
    assert done.returncode != 0
    assert "lacks torch, " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, make gpu itself runs")
@pytest.mark.slow
def test_the_whole_command_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "toy.json"
    assert command.main(["gpu", "--device", "cpu", "--json", str(file)]) == 0
    found = Record.load(file)
    assert {check.name: check.status for check in found.checks} == {
        "warm": "not available", "proof": "ok", "tiles": "ok", "profile: tiny-cpu": "ok", "suite": "ok",
        "memcheck": "not available", "racecheck": "not available",
    }  # fmt: skip
    raced = {row.provider: row.status for row in gpu.rows_of(found, "loss")}
    assert raced == {"ours_triton": "ok", "naive": "ok", "floor": "ok"}
    proven = gpu.rows_of(found, proof.TASK)
    assert {row.provider for row in proven if row.status == "ok"} == {"tma", "pointer", "library"}
    assert len(proven) == len(proof.kinds("interpreter"))
    assert {row.case for row in gpu.rows_of(found, "tune")} == {"tiny", "tiny-capped"}
    assert "whole call" in {row.provider for row in gpu.rows_of(found, "profile")}
    ours = next(row for row in found.rows if row.provider == "ours_triton")
    assert ours.err_weight is not None
    assert ours.err_weight < 1e-4
    assert len(found.accuracy) == 30
    assert "no target applies" in capsys.readouterr().out
    assert "16 of 16 kinds of call hold" in (tmp_path / "gpu.md").read_text()


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


def _run(tmp_path: Path, *only: str) -> tuple[int, Record, str]:
    """The command at toy sizes: its exit code, its record and its page."""
    code = gpu.run(torch.device("cpu"), 60.0, tmp_path / "a.json", only)
    return code, Record.load(tmp_path / "a.json"), (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("statuses", "raced"), [(("wrong", "failed"), False), (("not reached",), False), (("wrong", "ok"), True)]
)
def test_where_no_kind_of_call_holds_nothing_is_raced(
    statuses: tuple[Any, ...], raced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    answers = [row.with_(status=status) for row, status in zip(proof.rows("sm_90"), statuses, strict=False)]
    monkeypatch.setattr(proof, "run", lambda *_: answers)
    monkeypatch.setattr(race, "run", lambda rows, *_, **__: seen.append(rows))
    code, found, page = _run(tmp_path, "proof", "race")
    assert bool(seen) == raced
    assert code == (1 if "wrong" in statuses else 0)
    assert {check.name: check.status for check in found.checks if check.name.startswith("race")} == (
        {} if raced else dict.fromkeys(("race: ours", "race: others", "race: compiled"), "not reached")
    )
    assert ("no kind of call holds" in page) != raced


def test_advice_that_fails_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_check", lambda name, *_: Check(name, "failed", 1.0, "no"))
    code, found, page = _run(tmp_path, "tiles", "profile")
    assert {check.status for check in found.checks} == {"failed"}
    assert (code, page.count("| failed |")) == (0, 2)
    assert _run(tmp_path, "suite")[0] == 1
    assert _run(tmp_path, "tiles")[0] == 0  # what an earlier run found is not of this one


def test_a_step_that_breaks_leaves_the_others_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(gpu, "_check", lambda name, *_: Check(name, "ok", 1.0, "yes"))
    monkeypatch.setattr(accuracy, "run", broken)
    code, found, page = _run(tmp_path, "suite", "accuracy")
    assert {check.name: check.status for check in found.checks} == {"suite": "ok", "accuracy": "failed"}
    assert code == 1
    assert "RuntimeError: an illegal address" in page
    assert "Ended early" not in page

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "accuracy")
    assert "Ended early: in the step accuracy." in (tmp_path / "gpu.md").read_text()


def test_what_the_budget_did_not_reach_is_a_row() -> None:
    wanted = [ASKED, ASKED.with_(provider="naive")]
    rows = race.run(wanted, "cpu", repeats=3, seconds=1.0, budget=-1)
    assert [(row.provider, row.status) for row in rows] == [("ours", "not reached"), ("naive", "not reached")]
    assert "budget" in rows[0].reason


def test_on_a_gpu_the_providers_of_a_head_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def process(module: str, group: list[Row], *_: object) -> list[Row]:
        seen.append(group)
        return group

    monkeypatch.setattr(isolate, "process", process)
    rows = [ASKED, ASKED.with_(provider="naive"), ASKED.with_(case="gemma2-2b")]
    race.run(rows, "cuda", repeats=3, seconds=1.0)
    assert seen == [rows[:2], rows[2:]]
    seen.clear()
    race.run(rows, "cpu", repeats=3, seconds=1.0)
    assert seen == [[row] for row in rows]


@pytest.mark.slow
def test_a_failure_ends_its_process_and_nothing_else() -> None:
    """The first measurement names no dtype; the others of its process get theirs all the same."""
    bad = Row("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "nothing", "full", "floor")
    rows, options = [bad, bad.with_(dtype="float32")], {"device": "cpu", "repeats": 1, "seconds": 1.0}
    found = isolate.run("benchmarks.race", rows, options, together=lambda row: row.case)
    assert [row.status for row in found] == ["failed", "ok"]


def _measured(**changes: object) -> Row:
    return ASKED.with_(**{"status": "ok", "median_ms": 10.0, "floor_ms": 9.5, "peak_mib": 3000.0, **changes})


def test_targets_say_what_holds() -> None:
    rows = [
        _measured(),
        _measured(provider="naive", median_ms=30.0),
        _measured(provider="compiled", median_ms=9.0),
        ASKED.with_(provider="cce", status="unsupported", reason="not installed"),
    ]
    regimes = [
        AccuracyRow("-11", -11.0, "bfloat16", "grad_weight", 2e-3, 1e-3, 4e-3),
        AccuracyRow("-0.4", -0.4, "bfloat16", "grad_weight", 9e-3, 3e-3, 2e-2),
    ]
    said = {verdict.claim: verdict for verdict in promises.verdicts("gpu", Record(rows=rows, accuracy=regimes))}
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
    assert all(math.isfinite(target.bound) for target in promises.PROMISES["gpu"])


def test_measured_again_replaces(tmp_path: Path) -> None:
    kept = Record(rows=[_measured()], checks=[Check("suite", "ok", 1.0, "")])
    assert merged(kept.rows, [_measured(median_ms=1.0)]) == [_measured(median_ms=1.0)]
    kept.save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json") == kept


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(("needs", "code"), [("torch pytest", 0), ("torch no_such_module", 2)])
def test_make_gpu_starts_where_nothing_is_missing_and_names_what_is(needs: str, code: int) -> None:
    command = ["make", "gpu", f"GPU_PYTHON={sys.executable}", f"GPU_NEEDS={needs}", "ARGS=--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("lacks no_such_module: install them" in done.stderr) == bool(code)
