"""What ``make gpu`` proves first, what it tries where one form fails, and the page that it ends with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from benchmarks.harness import isolate
from benchmarks.harness.machine import ROOT
from benchmarks.harness.record import Record, Row
from benchmarks.lab import proof
from benchmarks.report import page
from orpo_kernels import explain
from orpo_kernels.backends.kernels.configs import config

CPU = torch.device("cpu")
HOPPER = proof.rows("sm_90")


def test_it_asks_for_every_kind_and_starts_with_the_chips_own_form() -> None:
    assert {row.case for row in HOPPER} == set(proof.KINDS)
    assert list(dict.fromkeys(row.provider for row in HOPPER)) == ["tma", "library", "pointer", "gluon"]
    row = next(row for row in HOPPER if row.case == "wide")
    assert proof.tile_of(row) == config("sm_90", torch.bfloat16).tma


@pytest.mark.parametrize("size", [proof.TOY, proof.LARGE])
def test_the_kinds_are_what_their_names_say(size: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def planned(name: str) -> Any:
        kind = proof.kinds("interpreter")[name]
        given = proof.given(kind, CPU, **size)
        room = kind.workspace(given.labels, given.weight.shape[0])
        backend = proof._Cramped(config=kind.config("interpreter"))
        return explain(given.hidden, given.weight, given.labels, backend=backend, workspace_bytes=room)

    assert planned("bfloat16").passes == 3
    assert len(planned("groups of pairs").groups) > 1
    assert planned("E computed again").passes == 4


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.001, "wrong"), (float("nan"), "wrong")])
def test_a_kernel_that_is_off_is_wrong(factor: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(kind: proof.Kind, of: proof.Given, row: object) -> dict[str, torch.Tensor]:
        found = proof.outputs(kind, of, proof.REFERENCES[kind.function])
        return {**found, "weight": found["weight"] * factor}

    monkeypatch.setattr(proof, "ours", off)
    (row,) = proof.measure(proof.rows("interpreter")[:1], device="cpu", until=time.time() + 60)
    assert row.status == status
    assert ("weight has error" in row.reason) == (status == "wrong")
    assert row.figures["hidden error"] == row.figures["hidden naive error"]


def _bisected(
    answers: Mapping[str, str], cures: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Row], list[Any]]:
    """Kinds of call answered by their form, "ok" where none is given, and every change that is then tried."""
    tried: list[Any] = []

    def run(module: str, rows: Sequence[Row], *_: object, **__: object) -> list[Row]:
        return [row.with_(status=answers.get(row.provider, "ok")) for row in rows]

    def process(module: str, rows: Sequence[Row], options: Any, patience: float, environment: Any) -> list[Row]:
        tried.append((rows[0].setting, proof.tile_of(rows[0]), rows[0].provider, environment))
        return [row.with_(status="ok" if row.setting in cures else "wrong") for row in rows]

    monkeypatch.setattr(isolate, "run", run)
    monkeypatch.setattr(proof, "arch_of", lambda device: "sm_90")
    return proof.run(CPU, 60.0, process), tried


def test_one_form_that_fails_is_bisected(monkeypatch: pytest.MonkeyPatch) -> None:
    found, tried = _bisected({"tma": "wrong"}, ["pointers", "not flattened"], monkeypatch)
    row = config("sm_90", torch.bfloat16)
    narrow, pointer = row.narrow, row.pointer
    assert narrow is not None
    assert tried[:6] == [
        ("pointers", pointer, "pointer", {}),
        ("not flattened", narrow._replace(flatten=False), "tma", {}),
        ("one program a multiprocessor", narrow._replace(programs=1), "tma", {}),
        ("two stages", narrow._replace(stages=2), "tma", {}),
        ("tiles in their own order", narrow._replace(group_v=1), "tma", {}),
        ("assembled without optimisation", narrow, "tma", {"DISABLE_PTXAS_OPT": "1"}),
    ]
    status, said = proof.verdict(found)
    assert status == "failed"
    assert "bfloat16 (tma) is wrong" in said
    assert said.endswith(f"of {len(tried)} changes to the first of them, these cure it: pointers, not flattened")


def test_a_form_without_a_setting_is_not_changed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gluon form is never flattened and has one program a multiprocessor."""
    _, tried = _bisected({"gluon": "failed"}, [], monkeypatch)
    names = [name for name, *_ in tried]
    assert not {"not flattened", "one program a multiprocessor"} & set(names)
    assert {"pointers", "two stages"} <= set(names)


@pytest.mark.parametrize("answers", [{}, dict.fromkeys(("tma", "pointer"), "wrong"), {"tma": "not reached"}])
def test_nothing_else_is(answers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two forms fail, it is not the form."""
    found, tried = _bisected(answers, [], monkeypatch)
    assert not tried
    assert proof.verdict(found)[0] == ("failed" if "pointer" in answers else "ok")


def _page(rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(page, "arch_of", lambda device: "sm_90")
    return page.written(Record("a GPU", "today", "abc", list(rows)), torch.device("cuda"), "")


def _line(said: str, start: str) -> list[str]:
    (line,) = (line for line in said.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def _recorded(kind: str) -> list[Row]:
    """What an H200 took, as recorded."""
    path = ROOT / "benchmarks/results" / kind
    return Record.load(path).rows


def test_the_page_reads_a_real_record(monkeypatch: pytest.MonkeyPatch) -> None:
    said = _page([*_recorded("tune/h200-2026-11-26.json"), *_recorded("gpu-h200-2026-11-26.json")], monkeypatch)
    for head in ("llama3-8b", "qwen2.5-7b", "gemma2-2b", "qwen2.5-0.5b"):
        assert "the main loop is fine" in _line(said, head)[-1]
    _, whole, alone, around = _line(said, "qwen2.5-0.5b, ultrafeedback, trainable, full")
    assert float(whole) > float(alone) > 1
    assert float(around) > 0
    assert "floor / time, qwen2.5-0.5b, ultrafeedback, trainable |" in said


@pytest.mark.parametrize(("ratio", "meaning"), [(1.05, "is fine"), (1.10, "between the two"), (1.15, "waits")])
def test_the_page_says_what_a_tile_loses(ratio: float, meaning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [row for row in _recorded("tune/h200-2026-11-26.json") if row.case == "llama3-8b"]
    said = _page([row.with_(ratio=ratio) for row in tiles if row.ratio], monkeypatch)
    assert meaning in _line(said, "llama3-8b")[-1]


def test_the_page_says_where_a_calls_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Row(
        "llama3-8b", "dense", "trained-like", "trainable", "bfloat16", "full", "whole call", "ok", task="profile"
    )
    figures = {"total_ms": 20.0, "idle_ms": 0.8, "busy_ms": 19.2, "plan": ""}
    rows = [
        call.with_(figures=figures, median_ms=20.0, floor_ms=18.0),
        call.with_(provider="products", median_ms=13.2),
        call.with_(provider="reductions", median_ms=0.28),
    ]
    meaning = _line(_page(rows, monkeypatch), "llama3-8b")[-1]
    assert meaning == (
        "the device waits 0.80 ms for the host; 0.28 ms of reductions, of which the pass over the head is one; "
        "the library's products take 1.10 of theirs in the floor: odd shapes"
    )
    quick = [row.with_(figures={**figures, "idle_ms": 0.05}) for row in rows[:1]]
    assert _line(_page(quick, monkeypatch), "llama3-8b")[-1] == "the host keeps up"
