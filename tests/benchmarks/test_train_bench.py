"""The training benchmark: both variants train the same, every row is planned, and what goes wrong becomes a row."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine, train
from benchmarks.cases import BATCHES, Pair

SPEC = train.TrainSpec("tiny", "stock", checkpointing=False, steps=2, longest_limit=32)


@pytest.fixture(autouse=True)
def _settings() -> None:
    """Trainers seed themselves, and poisoned memory is none of their business."""
    torch.use_deterministic_algorithms(False)


def _last(spec: train.TrainSpec) -> dict[str, train.TrainRow]:
    return {row.what: row for row in train.measure_all(spec)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_and_patched_train_the_same(checkpointing: bool) -> None:
    stock, patched = (_last(replace(SPEC, variant=name, checkpointing=checkpointing)) for name in train.VARIANTS)
    for rows in (stock, patched):
        step, longest = rows["step"], rows["longest"]
        assert (step.status, longest.status) == ("ok", "ok"), (step.reason, longest.reason)
        assert (step.pairs, step.tokens, step.steps) == (2, 796, 2)
        assert step.pairs_per_s is not None
        assert step.pairs_per_s > 0
        assert step.peak_mib is not None
        assert step.peak_mib > 0
        assert len(step.losses) == train.WARM_UP + 2
        assert all(map(math.isfinite, step.losses))
        assert (longest.longest, longest.at_least) == (32, True)
    gap = train.loss_gap(stock["step"], patched["step"])
    assert gap is not None
    assert 0 < gap < 1e-4  # the same to the last bit would mean that nothing was patched


def test_pairs_have_the_lengths_they_claim() -> None:
    pairs, tokenizer = BATCHES["ultrafeedback"].pairs, train._tokenizer(99)
    for pair, text in zip(pairs, train._texts(pairs, 99), strict=True):
        prompt, *answers = (tokenizer(text[side])["input_ids"] for side in ("prompt", "chosen", "rejected"))
        assert tuple(map(len, (prompt, *answers))) == pair
        assert prompt[0] == tokenizer.bos_token_id
        assert all(answer[-1] == tokenizer.eos_token_id for answer in answers)
        assert all(min(ids) > 0 for ids in (prompt, *answers))


def test_dry_run_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["train", "--device", "cuda", "--dry-run"]) == 0
    printed = [tuple(line.split()[:4]) for line in capsys.readouterr().out.splitlines()]
    names = ("llama-3.2-1b", "qwen2.5-0.5b")
    for row in itertools.product(names, ("off", "on"), train.VARIANTS, train.WHATS):
        assert printed.count(row) == 1
    assert command.main(["train", "--dry-run", "--steps", "0"]) == 2
    assert "expected --steps >= 1" in capsys.readouterr().out


def _raising(error: Exception, monkeypatch: pytest.MonkeyPatch) -> dict[str, train.TrainRow]:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "train", fail)
    return _last(SPEC)


def test_out_of_memory_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), monkeypatch)
    assert [row.status for row in rows.values()] == ["out of memory"] * 2
    assert rows["step"].reason == "CUDA out of memory. Tried to allocate 2 GiB"
    assert rows["longest"].reason == "out of memory at 16"
    assert rows["longest"].longest is None


def test_other_errors_are_failures_with_their_message(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _raising(ValueError("no such thing"), monkeypatch)
    assert {(row.status, row.reason) for row in rows.values()} == {("failed", "ValueError: no such thing")}


def test_a_search_that_fails_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_when_long(_: object, pairs: Sequence[Pair], *__: object) -> train.TrainRow:
        if pairs[0].chosen >= 1000:
            raise RuntimeError("an illegal memory access was encountered")
        return train.row_of(SPEC, "step", "ok")

    monkeypatch.setattr(train, "train", fail_when_long)
    longest = _last(replace(SPEC, longest_limit=2048))["longest"]
    assert (longest.status, longest.longest, longest.at_least) == ("failed", 512, True)
    assert "illegal memory access" in longest.reason


def test_a_process_that_is_too_slow_becomes_rows() -> None:
    rows = train.run_one(replace(SPEC, seconds=0.1))
    assert [(row.what, row.status) for row in rows] == [(what, "out of time") for what in train.WHATS]


def test_without_trl_rows_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda package: "" if package == "trl" else "1")
    rows = _last(SPEC)
    assert {(row.what, row.status) for row in rows.values()} == {(what, "unsupported") for what in train.WHATS}
    assert rows["step"].reason == "trl not installed: pip install '.[hf]'"


@pytest.mark.parametrize("most", [1, 100, 5000, 9000, 65536])
def test_the_search_ends_within_an_eighth(most: int) -> None:
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= most

    *_, row = train.search(train.row_of(SPEC, "longest", "ok"), fits, 65536)
    assert len(tried) < 20
    if most == 1:
        assert (row.status, row.longest) == ("out of memory", None)
    else:
        assert row.longest is not None
        assert row.longest <= most <= max(row.longest * 9 / 8, row.longest + train.FINEST)
        assert row.at_least == (most == 65536)


def test_a_search_cut_short_says_so() -> None:
    row = next(train.search(train.row_of(SPEC, "longest", "ok"), lambda _: True, 65536))
    assert (row.status, row.longest, row.at_least) == ("ok", 4096, True)
    row = next(train.search(train.row_of(SPEC, "longest", "ok"), lambda _: False, 65536))
    assert (row.status, row.longest) == ("out of time", None)
    assert "--seconds" in row.reason


def test_what_was_not_reached_is_in_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert command.main(["train", "--device", "cpu", "--seconds", "0", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {row["status"] for row in record["rows"]} == {"out of time"}
    assert len(record["rows"]) == 2 * len(train.specs(None, "cpu", 1, None))
    assert set(record["versions"]) >= {"torch", "triton", "trl", "transformers"}
    assert "not begun within --seconds" in capsys.readouterr().out
