"""LLaMA-Factory's ORPO and SimPO under the patch, on a stand-in for its trainer: nothing changes."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from orpo_kernels.integrations import LLAMA_FACTORY
from tests.integrations.models import llama
from tests.integrations.test_trl import said

pytestmark = pytest.mark.slow  # whole trainers

HOME = "llamafactory.train.dpo.trainer"
FILE = Path(__file__).parent / "llamafactory_stand_in.py"


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our patch of the stand-in under LLaMA-Factory's name, not applied."""
    torch.use_deterministic_algorithms(False)  # trainers seed themselves
    *parents, _ = HOME.split(".")
    for depth in range(len(parents)):
        name = ".".join(parents[: depth + 1])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    spec = importlib.util.spec_from_file_location(HOME, FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, HOME, module)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, LLAMA_FACTORY.integration, raising=False)
    found = LLAMA_FACTORY.load()
    yield found
    found.undo()
    monkeypatch.delitem(sys.modules, LLAMA_FACTORY.integration, raising=False)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="orpo_kernels")
    return caplog


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Chosen sequences, then rejected ones, padded, with unshifted labels."""
    found: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for side in ("chosen", "rejected"):
        for row in rows:
            ids = torch.tensor(row["prompt"] + row[side])
            labels = ids.clone()
            labels[: len(row["prompt"])] = -100
            for name, value in zip(found, (ids, labels, torch.ones_like(ids)), strict=True):
                found[name].append(value)
    pads = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=pads[name])
        for name, values in found.items()
    }


def trained(cls: Any, folder: Path, **options: Any) -> tuple[dict[str, list[float]], dict[str, Tensor], float]:
    chance = torch.Generator().manual_seed(0)

    def words(longest: int) -> list[int]:
        return torch.randint(3, 90, (int(torch.randint(1, longest, (), generator=chance)),), generator=chance).tolist()

    rows = [{"prompt": words(6), "chosen": words(9), "rejected": words(9)} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        optim="sgd",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    run = cls(model=llama(), args=arguments, train_dataset=rows, data_collator=collate, **options)
    loss = run.train().training_loss
    return dict(run.kept), dict(run.model.named_parameters()), loss


def assert_same(patch: Any, folder: Path, cls: Any = None, **options: Any) -> None:
    cls = cls or patch.owner
    stock, weights, loss = trained(cls, folder, **options)
    LLAMA_FACTORY.patch()
    ours, our_weights, our_loss = trained(cls, folder, **options)
    assert list(ours) == list(stock)
    assert our_loss == pytest.approx(loss, rel=1e-4)
    for name, values in stock.items():
        assert ours[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=1e-3, atol=1e-4)


ROW = "LLaMA-Factory's ORPO and SimPO (its trainer written anew)"


@pytest.mark.works(ROW, by="ORPO patch")
@pytest.mark.parametrize("options", [{}, {"ftx": 0.3}, {"loss_type": "simpo"}, {"loss_type": "simpo", "ftx": 0.2}])
def test_nothing_changes(options: dict[str, Any], patch: Any, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(patch, tmp_path, **{"loss_type": "orpo", **options})
    (line,) = said(log)
    assert "fused the loss of this CustomDPOTrainer: plan" in line


def test_a_loss_with_a_reference_keeps_its_path(patch: Any, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(patch, tmp_path, loss_type="sigmoid")
    assert not said(log)


def test_a_subclass_with_its_own_loss_keeps_it(patch: Any, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    class Own(patch.owner):  # type: ignore[misc, name-defined]
        def odds_ratio_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
            return -2 * chosen + 0.1 * rejected

    assert_same(patch, tmp_path, cls=Own, loss_type="orpo")
    (line,) = said(log)
    assert line.endswith("Own overrides odds_ratio_loss, which a fused loss would pass by")


def test_the_evaluation_prefix(patch: Any, tmp_path: Path) -> None:
    LLAMA_FACTORY.patch()
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    run = patch.owner(model=llama(), args=transformers.TrainingArguments(**options), loss_type="orpo")
    batch = collate([{"prompt": [3, 4], "chosen": [5, 6], "rejected": [7]}])
    _, metrics = run.get_batch_loss_metrics(run.model, batch, train_eval="eval")
    assert {name.partition("_")[0] for name in metrics} == {"eval"}
    assert metrics["eval_sft_loss"] == pytest.approx(-metrics["eval_logps/chosen"], rel=1e-6)
