"""The training benchmark: both variants train the same, every row is planned, and what goes wrong becomes a row."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness import isolate, machine
from benchmarks.harness.record import Row
from benchmarks.lab import train
from benchmarks.problems.cases import BATCHES, Pair

ROWS, LIMIT = train.plan(["tiny"], "cpu", 2, 32)
STEP, LONGEST = ROWS[0], ROWS[2]


@pytest.fixture(autouse=True)
def _settings() -> None:
    """Trainers seed themselves, and poisoned memory is none of their business."""
    torch.use_deterministic_algorithms(False)


def _last(rows: Sequence[Row], limit: int = LIMIT, steps: int = 2) -> list[Row]:
    answers = train.measure(rows, device="cpu", steps=steps, limit=limit, until=time.time() + 300)
    return list({row.key: row for row in answers}.values())


@pytest.mark.parametrize("setting", train.SETTINGS)
@pytest.mark.slow
def test_stock_and_patched_train_the_same(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train.MODELS["tiny"]
    monkeypatch.setitem(train.MODELS, "tiny", model._replace(vocab_size=999))  # a quick tokenizer
    monkeypatch.setattr(train, "COMPILER", "eager")  # as dynamo traced it: a C++ compiler takes a minute
    rows = _last([row for row in ROWS if row.setting == setting], limit=16, steps=1)
    assert [row.status for row in rows] == ["ok"] * len(rows), [row.reason for row in rows]
    stock, patched, *searches = rows
    assert [row.figures for row in searches] == [{"longest": 16, "at_least": True}] * (2 * (setting != train.COMPILED))
    for row in (stock, patched):
        assert (row.figures["pairs"], row.figures["tokens"], row.repeats) == (2, 796, 1)
        assert row.figures["pairs_per_s"] > 0
        assert row.ratio == row.median_ms / row.floor_ms
        assert row.peak_mib is not None
        assert row.peak_mib > 0
        assert len(row.figures["losses"]) == train.WARM_UP + 1  # of the first round
        assert all(map(math.isfinite, row.figures["losses"]))
    assert patched.floor_ms == stock.median_ms
    gap = train.loss_gap(stock, patched)
    assert gap is not None
    assert 0 < gap < 1e-4  # the same to the last bit would mean that nothing was patched


def test_the_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbance that lasts a while meets both, and one round of it moves no median."""
    order = []

    def fake(row: Row, _: str, pairs: object, steps: int, *__: object) -> train.Run:
        order.append((row.provider, steps))
        taken = 30.0 if row.provider == "stock" else 10.0
        slow = 20.0 if len(order) == 2 else 1.0  # the first round of the patched variant alone
        return train.Run([taken * slow] * steps, [1.0], 100.0)

    monkeypatch.setattr(train, "train", fake)
    *_, stock, patched = train.take_turns(ROWS[:2], "cpu", 10, math.inf)
    assert order == [("stock", 4), ("patched", 4), ("stock", 3), ("patched", 3), ("stock", 3), ("patched", 3)]
    assert (stock.status, patched.status, patched.repeats) == ("ok", "ok", 10)
    assert patched.ratio == pytest.approx(1 / 3)


def test_a_deadline_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train", lambda *_: train.Run([1.0] * 2, [1.0], 100.0))
    *_, stock, patched = train.take_turns(ROWS[:2], "cpu", 6, time.time() - 1)
    for row in (stock, patched):
        assert (row.status, row.reason, row.repeats) == ("ok", "2 of 6 steps within --seconds", 2)


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
    settings = (setting or "plain" for setting in train.SETTINGS)
    for row in itertools.product(names, settings, train.VARIANTS, train.WHATS):
        assert printed.count(row) == (row[1::2] != (train.COMPILED, "longest"))
    assert command.main(["train", "--dry-run", "--steps", "0"]) == 2
    assert "expected --steps >= 1" in capsys.readouterr().err


def _raising(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "train", fail)
    return _last([STEP, LONGEST])


def test_out_of_memory_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    step, longest = _raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), monkeypatch)
    assert (step.status, longest.status) == ("out of memory", "out of memory")
    assert step.reason == "CUDA out of memory. Tried to allocate 2 GiB more"
    assert longest.reason == "out of memory at 16"
    assert longest.figures["longest"] is None


def test_other_errors_are_failures_with_their_message(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _raising(ValueError("no such thing"), monkeypatch)
    assert {(row.status, row.reason) for row in rows} == {("failed", "ValueError: no such thing")}


def test_a_search_that_fails_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_when_long(_: object, __: str, pairs: Sequence[Pair], *___: object) -> train.Run:
        if pairs[0].chosen >= 1000:
            raise RuntimeError("an illegal memory access was encountered")
        return train.Run([], [], 0.0)

    monkeypatch.setattr(train, "train", fail_when_long)
    (longest,) = _last([LONGEST], 2048)
    assert (longest.status, longest.figures) == ("failed", {"longest": 512, "at_least": True})
    assert "illegal memory access" in longest.reason


def test_a_process_that_is_too_slow_becomes_rows() -> None:
    options = {"device": "cpu", "steps": 2, "limit": 32, "until": time.time() + 0.1}
    (row,) = isolate.process("benchmarks.lab.train", [STEP], options, patience=0)
    assert (row.status, row.reason) == ("not reached", "the time for it was used up")


def test_without_trl_rows_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda package: "" if package == "trl" else "1")
    rows = _last([STEP, LONGEST])
    assert [row.status for row in rows] == ["unsupported"] * 2
    assert rows[0].reason == "trl not installed: pip install '.[hf]'"


@pytest.mark.parametrize("most", [1, 100, 5000, 9000, 65536])
def test_the_search_ends_within_an_eighth(most: int) -> None:
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= most

    *_, row = train.search(LONGEST, fits, 65536)
    assert len(tried) < 20
    longest = row.figures["longest"]
    if most == 1:
        assert (row.status, longest) == ("out of memory", None)
    else:
        assert row.status == "ok"
        assert longest <= most <= max(longest * 9 / 8, longest + train.FINEST)
        assert row.figures["at_least"] == (most == 65536)


def test_a_search_cut_short_says_so() -> None:
    row = next(train.search(LONGEST, lambda _: True, 65536))
    assert (row.status, row.figures) == ("not reached", {"longest": 4096, "at_least": True})
    row = next(train.search(LONGEST, lambda _: False, 65536))
    assert (row.status, row.figures["longest"]) == ("not reached", None)
    assert "--seconds" in row.reason


def test_what_was_not_reached_is_in_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert command.main(["train", "--device", "cpu", "--seconds", "0", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {row["status"] for row in record["rows"]} == {"not reached"}
    assert len(record["rows"]) == len(ROWS)
    assert "the budget of 0 s was used up" in capsys.readouterr().out
