"""``patch_trl(objective=...)``: TRL's trainers on an objective of one's own, against the same loss of full logits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from orpo_kernels.integrations import patch_trl, patched_trl, unpatch_trl
from orpo_kernels.integrations.trl_cpo import PATCH, CPOTrainer
from orpo_kernels.integrations.trl_orpo import ORPOTrainer
from orpo_kernels.objectives import DPO, MMPO, ORPO, CrossEntropy, PairLogps, SimPO
from tests.integrations.stock_script import pairs
from tests.integrations.test_trl import CONFIGS, model
from tests.integrations.test_trl import trainer as orpo_trainer
from tests.integrations.test_trl_cpo import trainer as cpo_trainer

pytestmark = pytest.mark.slow  # whole trainers


@pytest.fixture(autouse=True)
def _settings() -> Any:
    torch.use_deterministic_algorithms(False)
    yield
    unpatch_trl()


def hinge(of: PairLogps) -> torch.Tensor:
    return F.relu(1.5 - of.chosen_mean + of.rejected_mean)


class StockHinge(ORPOTrainer):
    """What its owner would write over TRL's full logits."""

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        chosen, rejected, _, _, nll, *_ = self.concatenated_forward(model, batch)
        return 0.5 * nll + F.relu(1.5 - chosen + rejected).mean(), {}


class StockReference(CPOTrainer):
    """DPO and MMPO from the dataset's columns over TRL's full logits."""

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        chosen, rejected, *_ = self.concatenated_forward(model, batch)
        of_reference = [torch.as_tensor(batch[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")]
        margin = 0.3 * (chosen - of_reference[0] - rejected + of_reference[1])
        p = torch.sigmoid(torch.as_tensor(batch["margin"])) if self.args.run_name == "mmpo" else torch.ones(())
        return (-p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)).mean(), {}


def with_reference() -> Dataset:
    chance = random.Random(1)
    data = pairs(16)
    for name, low in (("ref_chosen_logps", -40.0), ("ref_rejected_logps", -40.0), ("margin", -2.0)):
        data = data.add_column(name, [chance.uniform(low, -low if name == "margin" else 0.0) for _ in data])
    return data


def steps(run: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, {name: value.detach() for name, value in run.model.named_parameters()}


def assert_same_steps(stock: Any, fused: Any) -> None:
    (expected, parameters), (losses, own) = stock, fused
    assert len(losses) == 2
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4)  # logged rounded
    for name, value in parameters.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5)


class OwnWeight:
    """An objective with an NLL of its own weight."""

    nll_weight = 0.5

    def __call__(self, of: PairLogps) -> torch.Tensor:
        return hinge(of)


@pytest.mark.works("an objective of your own", by="ORPO patch")
def test_an_objective_of_a_readers_own_under_orpo_trainer(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"eval_strategy": "no"}
    stock = steps(orpo_trainer(model(CONFIGS["llama"]()), tmp_path, cls=StockHinge, **quiet))
    patch_trl(objective=OwnWeight())
    fused = steps(orpo_trainer(model(CONFIGS["llama"]()), tmp_path, **quiet))
    assert_same_steps(stock, fused)


@pytest.mark.works("an objective of your own", by="CPO patch")
@pytest.mark.parametrize(("objective", "name"), [(DPO(0.3), "dpo"), (MMPO(0.3), "mmpo")])
def test_a_reference_in_the_datasets_columns_under_cpo_trainer(objective: Any, name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "no", "run_name": name, "data": with_reference()}
    options |= {"remove_unused_columns": False}
    stock = steps(cpo_trainer(model(CONFIGS["llama"]()), tmp_path, cls=StockReference, **options))
    patch_trl(objective=objective)
    fused = steps(cpo_trainer(model(CONFIGS["llama"]()), tmp_path, **options))
    assert_same_steps(stock, fused)


def test_a_block_gives_the_objective_back(tmp_path: Path) -> None:
    patch_trl(objective=SimPO())
    with patched_trl(objective=ORPO(0.3)):
        assert PATCH.objective == ORPO(0.3)
    assert PATCH.objective == SimPO()
    patch_trl()
    assert PATCH.objective is None
    with pytest.raises(ValueError, match=r"CrossEntropy\(\) trains sequences without partners.*take objectives.SFT"):
        patch_trl(objective=CrossEntropy())
    with pytest.raises(TypeError, match="objective must be callable on PairLogps"):
        patch_trl(objective=SimPO)  # type: ignore[arg-type]


class OwnLoss(ORPOTrainer):
    def odds_ratio_loss(self, *values: Any) -> Any:
        return super().odds_ratio_loss(*values)


class OwnBatch(ORPOTrainer):
    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        return self.concatenated_forward(model, batch)[4], {}


@pytest.mark.parametrize(
    ("cls", "objective", "error", "message"),
    [
        (OwnLoss, SimPO(), RuntimeError, "another loss would be trained: OwnLoss overrides odds_ratio_loss"),
        (OwnBatch, SimPO(), RuntimeError, "another loss would be trained: OwnBatch makes its own"),
        (ORPOTrainer, DPO(), ValueError, "needs reference_logps"),
    ],
)
def test_what_would_train_another_loss_is_an_error(
    cls: Any, objective: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    patch_trl(objective=objective)
    run = orpo_trainer(model(CONFIGS["llama"]()), tmp_path, cls=cls, eval_strategy="no")
    with pytest.raises(error, match=message):
        run.train()


def test_a_trainer_that_is_not_fused_is_an_error(tmp_path: Path) -> None:
    patch_trl(objective=SimPO())
    run = orpo_trainer(model(CONFIGS["llama"]()), tmp_path, eval_strategy="no")
    run.is_encoder_decoder = True
    with pytest.raises(RuntimeError, match="encoder-decoder models are not supported"):
        run.train()
