"""The family against released code: TRL's trainers and Liger's chunked losses on the same log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.objectives import (
    APO,
    CPO,
    DPO,
    IPO,
    KTO,
    NCA,
    ORPO,
    SPPO,
    AlphaPO,
    PairLogps,
    SimPO,
    SLiC,
)
from orpo_kernels.pairs import terms_of

PAIRS, LENGTH = 6, 9
AGREES = {"rtol": 1e-5, "atol": 1e-6}


class Answers:
    """Token log-probabilities of pairs of answers of several lengths, and a reference model's sums."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logps = -3 * torch.rand(2 * PAIRS, LENGTH, generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (2 * PAIRS,), generator=generator)
        self.mask = torch.arange(LENGTH) < lengths[:, None]
        self.logps = (self.logps * self.mask).requires_grad_()
        self.reference = -12 * torch.rand(2 * PAIRS, generator=generator)

    @property
    def pairs(self) -> PairLogps:
        sums, lengths = self.logps.detach().sum(-1), self.mask.sum(-1).float()
        return PairLogps(*sums.chunk(2), *lengths.chunk(2), *self.reference.chunk(2))

    def ours(self, objective: Any) -> tuple[Tensor, Tensor]:
        """The mean over pairs, and its gradient in the token log-probabilities of the answers."""
        terms = terms_of(objective, self.pairs, torch.ones(PAIRS, dtype=torch.bool), PAIRS, differentiate=True)
        g = torch.cat([terms.d_chosen_sum, terms.d_rejected_sum]) / PAIRS
        return terms.loss.mean(), g[:, None] * self.mask

    def theirs(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad(loss, self.logps)
        return loss.detach(), gradient * self.mask

    def sums(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.logps.sum(-1).chunk(2)
        return chosen, rejected

    def means(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.logps.sum(-1) / self.mask.sum(-1)).chunk(2)
        return chosen, rejected


def agree(answers: Answers, objective: Any, loss: Tensor, factor: float = 1.0) -> None:
    """``loss`` is theirs: ``factor`` times the mean of ours."""
    (ours, d_ours), (theirs, d_theirs) = answers.ours(objective), answers.theirs(loss)
    torch.testing.assert_close(factor * ours, theirs, **AGREES)
    torch.testing.assert_close(factor * d_ours, d_theirs, **AGREES)


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def trainer(**options: Any) -> Any:
    """What TRL's loss methods read of a trainer."""
    shared = {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "beta": 0.2,
        "label_smoothing": 0.0,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**shared, **options})


def forward_of(answers: Answers) -> Any:
    """A model whose fused head makes these log-probabilities; the first position predicts nothing of the answer."""
    zeros = torch.zeros_like(answers.logps.detach())

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=answers.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
        )

    return model


def batch_of(answers: Answers) -> dict[str, Tensor]:
    mask = F.pad(answers.mask.long(), (1, 0))
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


OF_DPO = {
    "sigmoid": (DPO(0.2), 1.0, 0.0),
    "robust": (DPO(0.2, 0.15, robust=True), 1.0, 0.15),
    "hinge": (SLiC(0.2), 1.0, 0.0),
    "ipo": (IPO(0.2), 1.0, 0.0),
    "nca_pair": (NCA(0.2), 1.0, 0.0),
    "sppo_hard": (SPPO(0.2), 2.0, 0.0),  # TRL leaves the paper's factor of a half out
    "apo_zero": (APO(0.2), 1.0, 0.0),
    "apo_down": (APO(0.2, "down"), 1.0, 0.0),
}


@pytest.mark.parametrize("kind", OF_DPO)
def test_trls_dpo_losses(kind: str) -> None:
    from trl import DPOTrainer

    if not hasattr(DPOTrainer, "_compute_loss"):
        pytest.skip("this TRL has no DPOTrainer._compute_loss")
    objective, factor, smoothing = OF_DPO[kind]
    answers = Answers()
    chosen, rejected = answers.reference.chunk(2)
    own = trainer(
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    inputs = {**batch_of(answers), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = DPOTrainer._compute_loss(own, forward_of(answers), inputs, False)
    agree(answers, objective, loss, factor)


@pytest.mark.parametrize("kind", CPO.LOSS_TYPES)
def test_trls_cpo_losses(kind: str) -> None:
    from orpo_kernels.integrations import TRL_CPO

    answers = Answers()
    values = answers.means() if kind in ("ipo", "simpo") else answers.sums()
    options: dict[str, Any] = {"loss_type": kind, "simpo_gamma": 0.4, "alpha": 0.05, "label_smoothing": 0.1}
    losses, *_ = TRL_CPO.find_class().cpo_loss(trainer(**options), *values)
    agree(answers, CPO(0.2, kind, 0.1, 0.4, 0.05), losses.mean())
    if kind == "simpo":
        for objective, alpha in ((SimPO(0.2, 0.4), 0.0), (AlphaPO(0.3, 0.2, 0.4), 0.3)):
            plain = trainer(**{**options, "label_smoothing": 0.0, "alpha": alpha})
            losses, *_ = TRL_CPO.find_class().cpo_loss(plain, *answers.means())
            agree(answers, objective, losses.mean())


def test_trls_orpo_loss() -> None:
    from orpo_kernels.integrations import TRL_ORPO

    answers = Answers()
    losses, *_ = TRL_ORPO.find_class().odds_ratio_loss(trainer(), *answers.means())
    agree(answers, ORPO(0.2), -losses.mean())  # which TRL subtracts


def test_trls_kto_loss_of_answers_without_partners() -> None:
    from trl import KTOTrainer

    if not hasattr(KTOTrainer, "_compute_kl_logps"):
        pytest.skip("this TRL has no KTOTrainer._compute_kl_logps")
    answers = Answers()
    desirable = torch.tensor([True, False, False, True, True, True, False, True, False, True, True, False])
    of_others = torch.linspace(-9, -3, 2 * PAIRS), torch.linspace(-10, -5, 2 * PAIRS)
    own = trainer(
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.3,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: of_others[0],
    )
    inputs = {**batch_of(answers), "label": desirable, "ref_logps": answers.reference, "ref_KL_logps": of_others[1]}
    loss = KTOTrainer._compute_loss(own, forward_of(answers), inputs, False)
    objective = KTO(0.2, 1.3, 0.7)
    sums = answers.logps.sum(-1)
    ours = objective.of_answers(sums, answers.reference, desirable, objective.baseline(of_others[0] - of_others[1]))
    assert objective.baseline(of_others[0] - of_others[1]) > 0
    (gradient,) = torch.autograd.grad(ours.mean(), answers.logps)
    theirs, d_theirs = answers.theirs(loss)
    torch.testing.assert_close(ours.mean(), theirs, **AGREES)
    torch.testing.assert_close(gradient * answers.mask, d_theirs, **AGREES)


OF_LIGER: dict[str, tuple[Any, dict[str, Any], float]] = {
    "dpo sigmoid": (DPO(0.2), {}, 1.0),
    "dpo hinge": (SLiC(0.2), {"loss_type": "hinge"}, 1.0),
    "dpo robust": (DPO(0.2, 0.15, robust=True), {"loss_type": "robust", "label_smoothing": 0.15}, 1.0),
    "dpo nca_pair": (NCA(0.2), {"loss_type": "nca_pair"}, 1.0),
    "dpo sppo_hard": (SPPO(0.2), {"loss_type": "sppo_hard"}, 2.0),
    "dpo apo_zero": (APO(0.2), {"loss_type": "apo_zero"}, 1.0),
    "dpo apo_down": (APO(0.2, "down"), {"loss_type": "apo_down"}, 1.0),
    "cpo": (CPO(0.2, label_smoothing=0.1), {"label_smoothing": 0.1}, 1.0),
    "simpo": (SimPO(0.2, 0.4), {"gamma": 0.4}, 1.0),
    "orpo": (ORPO(0.2), {}, 1.0),
}


@pytest.mark.parametrize("name", OF_LIGER)
def test_ligers_losses(name: str) -> None:
    from liger_kernel.chunked_loss import cpo_loss, dpo_loss, orpo_loss, simpo_loss

    functions = {
        "dpo": dpo_loss.LigerFusedLinearDPOFunction,
        "cpo": cpo_loss.LigerFusedLinearCPOFunction,
        "simpo": simpo_loss.LigerFusedLinearSimPOFunction,
        "orpo": orpo_loss.LigerFusedLinearORPOFunction,
    }
    objective, options, factor = OF_LIGER[name]
    family = name.split()[0]
    answers = Answers()
    values = answers.means() if family in ("simpo", "orpo") else answers.sums()
    if family == "dpo":
        options = {**options, "ref_chosen_logps": answers.reference[:PAIRS]}
        options |= {"ref_rejected_logps": answers.reference[PAIRS:]}
    loss, *_ = functions[family].preference_loss_fn(*values, torch.zeros(2 * PAIRS), beta=0.2, **options)
    agree(answers, objective, loss, factor)


def test_ligers_kto_loss_of_answers_without_partners() -> None:
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

    answers = Answers()
    desirable = torch.arange(2 * PAIRS) % 3 == 0
    loss, *_ = LigerFusedLinearKTOFunction.preference_loss_fn(
        answers.logps.sum(-1), desirable, torch.zeros(2 * PAIRS), answers.reference, beta=0.2, kl=torch.tensor(0.7)
    )
    ours = KTO(0.2).of_answers(answers.logps.sum(-1), answers.reference, desirable, 0.7).mean()
    torch.testing.assert_close(ours, loss, **AGREES)
    torch.testing.assert_close(answers.theirs(ours), answers.theirs(loss), **AGREES)
