"""Tuning and profiling without a GPU: the same code in Triton's interpreter, and on a CPU's operators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness.measure import measured
from benchmarks.harness.record import Row
from benchmarks.lab import profile, tune
from orpo_kernels.backends.kernels.configs import Tile, config

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")


@pytest.fixture(autouse=True)
def _settings() -> None:
    """Poisoned memory and deterministic kernels are none of a timing's business."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "REPEATS", 2)
    monkeypatch.setattr(tune, "WARM_UP", 0)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpreter"])
def test_the_shipped_tile_comes_first(arch: str, capped: bool) -> None:
    dtype = torch.float32 if arch == "interpreter" else torch.bfloat16
    shipped = config(arch, dtype).choose(mapped=True, biased=False, capped=capped, features=4096)
    found = tune.candidates(arch, capped=capped)
    assert found[0][:2] == shipped
    assert len(set(found)) == len(found)
    assert {"library", "pointer"} <= {candidate.form for candidate in found}
    for form in ("tma", "gluon"):
        assert (form in {candidate.form for candidate in found}) == (getattr(config(arch, dtype), form) is not None)


def test_what_cannot_fit_is_no_candidate() -> None:
    tiles = {one.tile for one in tune.candidates("sm_90", capped=False)}
    assert Tile(128, 256, 64, 8, 4, 8, 2) in tiles  # 196,608 bytes of stages and 32,768 to store from
    assert Tile(128, 256, 64, 8, 4, 8, 1) not in tiles
    assert Tile(128, 256, 64, 4, 3, 8, 2) not in tiles  # 256 registers a thread for the accumulator alone


@WITHOUT_GPU
def test_dry_run_needs_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["tune", "--dry-run"]) == 0
    first, *rest = capsys.readouterr().out.replace(", the \nshipped", ", the shipped").splitlines()
    candidates = [line for line in rest if line.startswith(("tma", "gluon", "pointer", "library"))]
    assert "sm_90" in first
    assert candidates[0] == str(tune.candidates("sm_90", capped=False)[0])
    assert candidates[1] == str(tune.candidates("sm_90", capped=True)[0])
    assert len(candidates) == len(tune.plan([tune.CASES[name] for name in tune.HEADS], "sm_90"))


@WITHOUT_GPU
def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["tune"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert command.main(["tune", "--device", "cpu", "--cases", "llama3-8b"]) == 2
    assert "only tiny" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert command.main(["tune", "--device", "cpu"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


@WITHOUT_GPU
@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("case", tune.TINY)
def test_every_form_is_right_in_the_interpreter(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert command.main(["tune", "--device", "cpu", "--cases", case, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["status"], row.get("reason")) for row in rows] == [("ok", None)] * 3
    assert {row["figures"]["form"] for row in rows} == {"tma", "pointer", "library"}
    for row in rows:
        assert row["ratio"] == row["median_ms"] / row["floor_ms"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    out = capsys.readouterr().out
    assert "of a plain product at worst" in out
    name = "_TILE_CAPPED" if case == "tiny-capped" else "_TILE"
    assert f"{name} = Tile(16, 32, 16, warps=4" in out or 'form="library"' in out


def _one(monkeypatch: pytest.MonkeyPatch, **broken: object) -> Row:
    for name, value in broken.items():
        monkeypatch.setattr(tune.TritonBackend, name, value)
    work = tune.make_work(tune.TINY["tiny"], torch.device("cpu"))[0]
    candidate = tune.candidates("interpreter", capped=False)[0]
    return measured(tune.row_of(candidate, work), tune.measure, candidate, work)


def test_an_unwritten_entry_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _one(monkeypatch, _exp_logits=lambda *_: None)
    assert (row.status, row.median_ms) == ("wrong", None)
    assert "E has error nan" in row.reason


def test_what_does_not_compile_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such instruction\n" * 100)

    row = _one(monkeypatch, _exp_logits=fail)
    assert row.status == "failed"
    assert row.reason.startswith("ValueError: no such instruction no such")
    assert len(row.reason) <= 300


def test_a_used_up_budget_leaves_rows() -> None:
    case = tune.TINY["tiny"]
    rows = tune.run([case], tune.plan([case], "interpreter"), torch.device("cpu"), 0.0)
    assert {(row.status, row.reason) for row in rows} == {("not reached", "--seconds 0 were used up")}
    assert len(rows) == 3
    assert "more --seconds" in tune.suggestion(rows, "interpreter")


def test_the_suggestion_is_the_smallest_worst_ratio() -> None:
    first, second, third = [one for one in tune.candidates("sm_90", capped=False) if one.form == "tma"][:3]
    ratios = {first: (1.0, 1.5), second: (1.2, 1.3), third: (0.9,)}  # the third did not run everywhere
    work = tune.make_work(tune.TINY["tiny"], torch.device("cpu"))[0]
    rows = [
        tune.row_of(candidate, work).with_(case="llama3-8b", targets=n, ratio=ratio, device="a GPU", date="today")
        for candidate, known in ratios.items()
        for n, ratio in zip((1024, 4096), known, strict=False)
    ]
    text = tune.suggestion(rows, "sm_90")
    assert f"{second.form}, without a softcap: 1.300 of a plain product at worst (llama3-8b, 4096 rows)" in text
    n, v, h, *_ = second.tile
    assert f"_HOPPER = Tile({n}, {v}, {h}, warps={second.tile.warps}" in text


@WITHOUT_GPU
@pytest.mark.parametrize("head", ["trainable", "frozen"])
@pytest.mark.slow
def test_steps_are_parts_of_the_call(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    wanted = ["--case", "tiny-cpu", "--batch", "tiny-cpu", "--head", head]
    assert command.main(["profile", "--device", "cpu", *wanted, "--json", str(path)]) == 0
    call, *steps = json.loads(path.read_text())["rows"]
    assert {"products", "exp gemm", "everything else"} <= {step["provider"] for step in steps}
    assert 0 < sum(step["median_ms"] for step in steps) == pytest.approx(call["figures"]["busy_ms"])
    assert call["figures"]["busy_ms"] <= call["figures"]["total_ms"]
    assert call["figures"]["idle_ms"] == call["figures"]["total_ms"] - call["figures"]["busy_ms"]
    assert [step["median_ms"] for step in steps] == sorted((step["median_ms"] for step in steps), reverse=True)
    assert sum(step["figures"]["share"] for step in steps) <= 1
    assert call["ratio"] == call["median_ms"] / call["floor_ms"]
    assert f"of its products alone ({call['cut']})" in capsys.readouterr().out


def test_kernels_of_a_gpu_find_their_step() -> None:
    names = {
        "exp_gemm_tma_kernel": "exp gemm",
        "exp_pass_kernel": "exp gemm",
        "recompute_overflowed_kernel": "sums and overflow",
        "rescale_kernel": "sums and overflow",
        "reduce_tiles_kernel": "sums and overflow",
        "label_kernel": "label and logps",
        "label_entry_kernel": "label and logps",
        "finalize_kernel": "label and logps",
        "rows_kernel": "rows",
        "odds_ratio_kernel": "odds ratio", "scale_kernel": "scale",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>": "products",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "reductions",
        "void at::native::vectorized_gather_kernel<16, long>": "everything else",
        "Memcpy DtoH (Device -> Pageable)": "everything else",
    }  # fmt: skip
    for name, step in names.items():
        (row,) = profile.steps_of([profile.Kernel(name, 0.0, 2000.0)], Row("any"), 4.0)
        assert (row.provider, row.median_ms, row.figures["share"]) == (step, 2.0, 0.5), name


def test_overlapping_kernels_are_busy_once() -> None:
    kernels = [profile.Kernel("a", 0.0, 10.0), profile.Kernel("b", 8.0, 4.0), profile.Kernel("c", 20.0, 1.0)]
    assert profile.busy_ms(kernels) == 0.013
