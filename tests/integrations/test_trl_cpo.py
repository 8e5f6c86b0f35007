"""Real CPOTrainers on tiny random models: the patch changes no loss, no gradient and no metric of any loss type."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig

from orpo_kernels import integrations
from orpo_kernels.integrations import patch_trl, patched_trl, unpatch_trl
from orpo_kernels.integrations.trl_cpo import PATCH, CPOTrainer
from orpo_kernels.objectives import CPO, PairLogps
from tests.integrations import test_trl as orpo
from tests.integrations.stock_script import pairs
from tests.integrations.test_trl import CONFIGS, ROWS, assert_no_logits, model, said

pytestmark = pytest.mark.slow  # whole trainers

CPOConfig = importlib.import_module("trl.experimental.cpo").CPOConfig
OPTIONS: dict[str, dict[str, Any]] = {
    "CPO": {},
    "CPO, smoothed labels and another NLL": {"label_smoothing": 0.2, "cpo_alpha": 0.3},
    "CPO without its NLL": {"cpo_alpha": 0.0},
    "CPO, hinge": {"loss_type": "hinge", "beta": 0.05},
    "CPO, IPO's square": {"loss_type": "ipo"},
    "SimPO": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4, "beta": 2.0},
    "CPO-SimPO": {"loss_type": "simpo", "cpo_alpha": 1.0, "label_smoothing": 0.1},
    "AlphaPO": {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0},
    "AlphaPO, negative alpha": {"loss_type": "alphapo", "alpha": -0.3},
}


@pytest.mark.parametrize("kind", CPO.LOSS_TYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.3])
def test_cpo_is_trls(kind: str, alpha: float) -> None:
    """Losses and rewards of TRL's own method, of sums and lengths instead of what it takes."""
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=alpha,
        beta=0.7,
        label_smoothing=0.2,
        loss_type=kind,
        simpo_gamma=0.3,
    )
    sums, lengths = -20 * torch.rand(2, 8, dtype=torch.float64), torch.randint(1, 9, (2, 8)).double()
    given = sums / lengths if kind in ("ipo", "simpo") else sums
    objective = CPO(0.7, kind, 0.2, 0.3, alpha)
    pairs = PairLogps(*sums, *lengths)
    for mine, theirs in zip(
        (objective(pairs), *objective.rewards(pairs)), CPOTrainer.cpo_loss(stand_in, *given), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def _settings() -> Any:
    """Trainers seed themselves, and poisoned memory is none of their business."""
    torch.use_deterministic_algorithms(False)
    assert not PATCH.applied
    yield
    unpatch_trl()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="orpo_kernels")
    return caplog


def trainer(of: Any, folder: Path, cls: Any = None, **options: Any) -> Any:
    return orpo.trainer(of, folder, cls=cls or CPOTrainer, config_class=CPOConfig, **options)


def assert_same(config: Any, folder: Path, cls: Any = None, **options: Any) -> None:
    orpo.assert_same(config, folder, cls=cls or CPOTrainer, config_class=CPOConfig, logged="nll_loss", **options)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.works(f"TRL {name}", by="CPO patch")) for name in OPTIONS]
)
def test_every_loss_type(name: str, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Several steps with accumulation, and evaluations whose last batch is a part of one."""
    assert_same(CONFIGS["llama"](), tmp_path, max_steps=4, **OPTIONS[name])
    (line,) = said(log)
    assert "fused the loss of this CPOTrainer: plan" in line
    assert "3 passes over" in line


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.works(row, by="CPO patch")) for name, row in ROWS.items()]
)
def test_models(name: str, tmp_path: Path) -> None:
    assert_same(CONFIGS[name](), tmp_path)


@pytest.mark.works("bf16 autocast", by="CPO patch")
def test_mixed_precision(tmp_path: Path) -> None:
    """TRL's default is bfloat16 autocast, where both round; a step so large that it multiplies that says nothing."""
    assert_same(CONFIGS["llama"](), tmp_path, rtol=2e-2, atol=2e-2, bf16=True, learning_rate=1e-2)


@pytest.mark.works("gradient checkpointing", by="CPO patch")
@pytest.mark.works("gradient accumulation", by="CPO patch")
def test_checkpointing(tmp_path: Path) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, gradient_checkpointing=True)


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(None, marks=pytest.mark.works("LoRA beside the head", by="CPO patch")),
        pytest.param(["lm_head"], marks=pytest.mark.works("LoRA, head in modules_to_save", by="CPO patch")),
    ],
)
def test_lora(kept: list[str] | None, tmp_path: Path) -> None:
    """A frozen head, and peft's trained copy of one."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=kept)
    assert_same(CONFIGS["llama"](), tmp_path, peft_config=adapter)


@pytest.mark.works("evaluation", by="CPO patch")
def test_no_logits_in_training_and_evaluation(tmp_path: Path) -> None:
    class Plain(CPOTrainer):  # type: ignore[misc]
        pass

    with patched_trl():
        assert_no_logits(trainer(model(CONFIGS["llama"]()), tmp_path, cls=Plain))


class OwnLoss(CPOTrainer):  # type: ignore[misc]
    """A subclass with its own loss over the log-probabilities, under a name that TRL does not know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.loss_type = "mine"

    def cpo_loss(self, chosen: Any, rejected: Any) -> Any:
        losses = -F.logsigmoid(0.1 * (chosen - rejected)) - 0.05 * chosen
        return losses, chosen.detach(), rejected.detach()


class OwnMeans(CPOTrainer):  # type: ignore[misc]
    """A subclass that changes TRL's, over means and without an NLL."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.loss_type, self.cpo_alpha = "ipo", 0.0

    def cpo_loss(self, chosen: Any, rejected: Any) -> Any:
        losses, *rewards = super().cpo_loss(chosen, rejected)
        return 2 * losses, *rewards


@pytest.mark.works("subclass with its own loss", by="CPO patch")
@pytest.mark.parametrize("cls", [OwnLoss, OwnMeans])
def test_subclasses_keep_what_they_override(cls: Any, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, cls=cls)
    (line,) = said(log)
    assert f"fused the loss of this {cls.__name__}: log-probabilities, plan" in line


class OwnLogps(CPOTrainer):  # type: ignore[misc]
    @staticmethod
    def get_batch_logps(*args: Any, **options: Any) -> Any:
        return 2 * CPOTrainer.get_batch_logps(*args, **options)


def test_a_method_of_logits_keeps_trls_path(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, cls=OwnLogps)
    (line,) = said(log)
    assert line.endswith("OwnLogps overrides get_batch_logps, which a fused loss would pass by")


def test_options_that_are_not_known_keep_trls_loss(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, cpo_alpha=-0.5)
    (line,) = said(log)
    assert "fused the loss of this CPOTrainer: log-probabilities, plan" in line


@pytest.mark.works("encoder-decoder models", by="CPO patch", outcome="refused")
def test_encoder_decoder_keeps_trls_path(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    patch_trl()
    of = transformers.T5ForConditionalGeneration(config)
    trainer(of, tmp_path, max_completion_length=16, max_steps=1).train()
    (message,) = said(log)
    assert "does not fuse the loss of this CPOTrainer: encoder-decoder models are not supported" in message


@pytest.mark.works("answer truncated to nothing", by="CPO patch")
def test_a_pair_with_an_empty_answer_leaves_the_mean_over_pairs(tmp_path: Path) -> None:
    """TRL counts it as an answer of probability 1, or where it takes means divides by zero."""
    words = " ".join(f"w{index}" for index in range(40))
    broken = datasets.Dataset.from_list([{"prompt": words, "chosen": " w1 w2", "rejected": " w3"}])
    data = datasets.concatenate_datasets([broken, pairs(15)])
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "cls": CPOTrainer, "config_class": CPOConfig, "data": data}
    _, ruined = orpo.train(model(CONFIGS["llama"]()), tmp_path, False, **options)
    assert not all(torch.isfinite(weight).all() for weight in ruined.values())
    with pytest.warns(UserWarning, match="have an answer without a token"):
        logs, weights = orpo.train(model(CONFIGS["llama"]()), tmp_path, True, **options)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(value == value for entry in logs for value in entry.values())


def test_patching_is_idempotent_and_reversible(tmp_path: Path) -> None:
    """For both of TRL's trainers of pairs at once."""
    owners = (CPOTrainer, orpo.ORPOTrainer)
    names = ("get_batch_loss_metrics", "concatenated_forward")
    stock = [[owner.__dict__[name] for name in names] for owner in owners]
    existing = trainer(model(CONFIGS["llama"]()), tmp_path)
    patch_trl(workspace_bytes=1_000_000)
    patch_trl()
    with patched_trl(backend="torch"):
        assert PATCH.settings.backend == orpo.PATCH.settings.backend == "torch"
    assert PATCH.applied
    assert orpo.PATCH.applied
    assert PATCH.settings.backend == orpo.PATCH.settings.backend == "auto"
    assert_no_logits(existing)  # a trainer built before the patch
    unpatch_trl()
    unpatch_trl()
    assert [[owner.__dict__[name] for name in names] for owner in owners] == stock


def test_one_trainer_that_is_missing_leaves_the_other_patched(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    lost = dataclasses.replace(integrations.TRL_ORPO, homes=("trl.no_such_home",), integration="trl.no_such_patch")
    monkeypatch.setattr(integrations, "TRL", (lost, integrations.TRL_CPO))
    patch_trl()
    assert PATCH.applied
    (line,) = said(log)
    assert line.startswith("orpo_kernels: leaves trl ORPOTrainer alone: No module named 'trl.no_such_patch'")
    unpatch_trl()
    monkeypatch.setattr(integrations, "TRL", (lost,))
    with pytest.raises(ImportError, match="no_such_patch"):
        patch_trl()
