"""Losses over pairs for any objective: against float64, against the formulas of their papers, and at the doors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels import explain, orpo_loss, preference_loss, reference
from orpo_kernels.objectives import (
    APO,
    ASFT,
    CPO,
    DPO,
    IPO,
    KTO,
    MMPO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AlphaPO,
    CrossEntropy,
    PairLogps,
    PairTerms,
    ProbabilityRatio,
    SimPO,
    SLiC,
    length_desensitised,
)
from orpo_kernels.pairs import terms_of
from tests.cases import DEVICE, GRAD_FLOOR, VALUE_FLOOR, Case, assert_as_accurate, every_run, make, relative


def hinge(pairs: PairLogps) -> Tensor:
    """A user's own: sums, means, lengths and margins in ordinary torch."""
    assert pairs.margins is not None
    by_length = (pairs.chosen_length - pairs.rejected_length).abs() / 100
    return torch.relu(pairs.margins + by_length - pairs.chosen_mean + 0.1 * pairs.rejected_sum)


OBJECTIVES: dict[str, Any] = {"orpo": ORPO(0.3), "simpo": SimPO(2.5, 0.3), "dpo": DPO(0.2, 0.1), "own": hinge}
OBJECTIVES |= {f"cpo {kind}": CPO(0.2, kind, 0.1, 0.4, 0.05) for kind in CPO.LOSS_TYPES}
FAMILY: list[Any] = [
    *(ORPO(), ProbabilityRatio(), SimPO(), AlphaPO(0.25), AlphaPO(-0.5), DPO(), DPO(0.1, 0.2), DPO(0.1, 0.2, True)),
    DPO(weighting=True),
    *(IPO(), SLiC(), NCA(), SPPO(), APO(), APO(kind="down"), MMPO(), KTO(), ASFT(), SFT()),
    *(CPO(loss_type=kind) for kind in CPO.LOSS_TYPES),
    CPO(alpha=0.25),
]


def given(case: Case, seed: int = 5) -> dict[str, Tensor]:
    pairs = case.labels.shape[0] // 2
    generator = torch.Generator().manual_seed(seed)
    sums = -20 * torch.rand(2 * pairs, generator=generator)
    return {"reference_logps": sums.to(DEVICE), "margins": torch.rand(pairs, generator=generator).to(DEVICE)}


@every_run
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("workspace", [None, "groups", 1])
def test_any_objective_in_any_plan(name: str, workspace: Any, backend: str, dtype: torch.dtype) -> None:
    case = make(dtype, pairs=5, bias=True, vocab=600)
    if workspace == "groups":
        workspace = 4 * 600 * 32 + 25 * (600 + 32 * 3) * 4
    objective, options = OBJECTIVES[name], {**given(case), "nll_weight": 0.5, "bias": case.bias}
    plain = reference.odds_ratio(0.3) if name == "orpo" else objective
    truth_case = case.to(torch.float64)
    truth = reference.preference_loss(
        truth_case.hidden, truth_case.weight, case.labels, plain, **{**options, "bias": truth_case.bias}
    )
    naive = reference.preference_loss(case.hidden, case.weight, case.labels, plain, **options)
    out = preference_loss(
        case.hidden, case.weight, case.labels, objective, backend=backend, workspace_bytes=workspace, **options
    )
    assert_as_accurate("loss", out.loss, naive["loss"], truth["loss"], VALUE_FLOOR[dtype])
    assert_as_accurate("sums", out.pairs.chosen_sum, naive["pairs"].chosen_sum, truth["pairs"].chosen_sum, 1e-2)
    assert torch.equal(out.pairs.chosen_length.double(), truth["pairs"].chosen_length)
    naive_grads, grads = case.grads(naive["loss"]), case.grads(out.loss)
    for tensor, expected in truth_case.grads(truth["loss"]).items():
        assert_as_accurate(f"grad_{tensor}", grads[tensor], naive_grads[tensor], expected, GRAD_FLOOR[dtype])


def test_orpo_is_its_own_case_of_a_preference_loss() -> None:
    case = make(torch.float32, bias=True)
    inputs = (case.hidden, case.weight, case.labels)
    one, other = orpo_loss(*inputs, beta=0.3), preference_loss(*inputs, ORPO(0.3))
    for name in ("loss", "nll_loss", "chosen_rewards", "chosen_logits_mean", "rejected_logits_mean", "valid"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.odds_ratio_loss, other.objective_loss)
    assert torch.equal(one.chosen_logps, other.pairs.chosen_mean)
    assert torch.equal(one.log_odds_chosen, other.objective_metrics["log_odds_chosen"])
    theirs = other.metrics()
    for name, value in one.metrics().items():
        if not name.startswith("logps/"):  # means of tokens there, sums here
            assert torch.equal(value, theirs[name]), name


def test_formulas_of_the_papers() -> None:
    pairs = PairLogps(*torch.tensor([[-6.0], [-9.0], [3.0], [4.0]]), *torch.tensor([[-5.0], [-7.0]]))
    margin = 2.0 * (-6 / 3 + 9 / 4) - 0.5
    torch.testing.assert_close(SimPO(2.0, 0.5)(pairs), -F.logsigmoid(torch.tensor([margin])))
    d = 0.1 * ((-6 + 5) - (-9 + 7))
    torch.testing.assert_close(DPO(0.1)(pairs), -F.logsigmoid(torch.tensor([d])))
    smoothed = -0.8 * F.logsigmoid(torch.tensor([d])) - 0.2 * F.logsigmoid(torch.tensor([-d]))
    torch.testing.assert_close(DPO(0.1, 0.2)(pairs), smoothed)


def test_formulas_without_released_code() -> None:
    w, ell, n, m, a, b = -6.0, -9.0, 3.0, 4.0, -1.0, -2.0  # a and b are the log-ratios
    values = [torch.tensor([value], dtype=torch.float64) for value in (w, ell, n, m, w - a, ell - b, 0.7)]
    pairs, quality = PairLogps(*values), torch.tensor(0.7, dtype=torch.float64)
    sigmoid, log_sigmoid = torch.sigmoid, F.logsigmoid
    bends = [(1 - torch.exp(torch.tensor(-0.3 * x, dtype=torch.float64))) / 0.3 for x in (w / n, ell / m)]
    p, d = sigmoid(2 * quality), torch.tensor(0.1 * (a - b), dtype=torch.float64)
    odds = [x - torch.log(1 - torch.exp(x)) for x in (values[0] / n, values[1] / m)]
    wins = 0.5 * ((a - (quality - 0.5) / 0.1) ** 2 + (b - (0.5 - quality) / 0.1) ** 2)
    expected: list[tuple[Any, Any]] = [
        (ProbabilityRatio(0.3), -0.3 * log_sigmoid(values[0] / n - values[1] / m)),
        (AlphaPO(0.3, 2.0, 0.4), -log_sigmoid(2 * (bends[0] - bends[1]) - 0.4)),
        (MMPO(0.1, 2.0), -p * log_sigmoid(d) - (1 - p) * log_sigmoid(-d)),
        (SPPO(0.1), wins),
        (DPO(0.1, weighting=True), -torch.exp(values[0] / n + values[1] / m) * log_sigmoid(d)),
        (ASFT(0.5), 0.5 * (-log_sigmoid(odds[0]) - log_sigmoid(-odds[1]))),
        (KTO(0.1, 1.5, 0.5), 0.5 * (1.5 * sigmoid(torch.tensor(-0.1 * a)) + 0.5 * sigmoid(torch.tensor(0.1 * b)))),
    ]
    for objective, loss in expected:
        torch.testing.assert_close(objective(pairs), torch.as_tensor(loss, dtype=torch.float64).reshape(1)), objective


def test_ktos_baseline_couples_pairs_and_has_no_gradient() -> None:
    sums = torch.tensor([-6.0, -2.0, -4.0, -3.0], dtype=torch.float64)
    reference = torch.tensor([-9.0, -1.0, -9.0, -4.0], dtype=torch.float64)
    chosen, rejected = (sums - reference).chunk(2)
    pairs = PairLogps(*sums.chunk(2), *torch.ones(2, 2, dtype=torch.float64), *reference.chunk(2))
    expected = 0.5 * (
        torch.sigmoid(-0.5 * (chosen - rejected.mean())) + torch.sigmoid(0.5 * (rejected - chosen.mean()))
    )
    torch.testing.assert_close(KTO(0.5)(pairs), expected)
    terms = terms_of(KTO(0.5), pairs, torch.ones(2, dtype=torch.bool), 2, differentiate=True)
    s = torch.sigmoid(-0.5 * (chosen - rejected.mean()))
    torch.testing.assert_close(terms.d_chosen_sum, -0.25 * s * (1 - s))
    assert KTO.couples_pairs
    assert KTO.baseline(-chosen) == 0
    assert KTO.baseline(chosen[:0]) == 0


def test_sft_is_the_cross_entropy_of_the_chosen_side() -> None:
    case = make(torch.float64, pairs=3)
    out = preference_loss(case.hidden, case.weight, case.labels, SFT())
    logits = (case.hidden[:3] @ case.weight.T).flatten(0, 1)
    naive = F.cross_entropy(logits, case.labels[:3].flatten())
    torch.testing.assert_close(out.loss, naive)
    expected = case.grads(naive)
    for name, grad in case.grads(out.loss).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_cross_entropy_takes_any_number_of_sequences(reduction: str, packed: bool) -> None:
    case = make(torch.float64, pairs=2)
    inputs, options = (case.hidden[:3], case.weight, case.labels[:3]), {"nll_reduction": reduction}
    counts = (inputs[2] != -100).sum(1)
    naive = F.cross_entropy((inputs[0] @ case.weight.T).flatten(0, 1), inputs[2].flatten(), reduction="none")
    naive = naive.view(3, -1).sum(1)
    naive = naive.sum() / counts.sum() if reduction == "token" else (naive / counts).mean()
    if packed:
        kept = inputs[2] != -100
        options["cu_seqlens"] = F.pad(counts.cumsum(0), (1, 0))
        inputs = inputs[0][kept], case.weight, inputs[2][kept]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no pair is skipped, as there is none
        out = preference_loss(*inputs, CrossEntropy(), **options)
    torch.testing.assert_close(out.loss, naive)
    torch.testing.assert_close(out.nll_loss, naive)
    assert out.objective_loss == 0
    assert torch.equal(out.pairs.chosen_length, counts.double())
    expected = case.grads(naive)
    for name, grad in case.grads(out.loss).items():
        torch.testing.assert_close(grad, expected[name])
    assert explain(preference_loss, *inputs, CrossEntropy(), **options).targets == int(counts.sum())


@every_run
@pytest.mark.parametrize("objective", ["orpo", "dpo", "simpo"])
@pytest.mark.parametrize("workspace", [None, "groups", 1])
def test_weights_of_answer_tokens(objective: str, workspace: Any, backend: str, dtype: torch.dtype) -> None:
    """A few are 0, and the NLL, of other labels, knows none of them."""
    case = make(dtype, pairs=5, bias=True, vocab=600)
    if workspace == "groups":
        workspace = 4 * 600 * 32 + 25 * (600 + 32 * 3) * 4
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(case.labels.shape, generator=generator).sub(0.3).clamp(min=0).to(DEVICE)
    nll_labels = torch.where(case.labels[:5] == -100, 3, case.labels[:5])
    options = {**given(case), "nll_weight": 0.5, "nll_labels": nll_labels, "answer_weights": weights}
    plain = reference.odds_ratio(0.3) if objective == "orpo" else OBJECTIVES[objective]
    truth_case = case.to(torch.float64)
    inputs = truth_case.hidden, truth_case.weight, case.labels
    truth = reference.preference_loss(*inputs, plain, bias=truth_case.bias, **options)["loss"]
    inputs, options = (case.hidden, case.weight, case.labels), {**options, "bias": case.bias}
    naive = reference.preference_loss(*inputs, plain, **options)["loss"]
    out = preference_loss(*inputs, OBJECTIVES[objective], backend=backend, workspace_bytes=workspace, **options)
    assert_as_accurate("loss", out.loss, naive, truth, VALUE_FLOOR[dtype])
    naive_grads, grads = case.grads(naive), case.grads(out.loss)
    for tensor, expected in truth_case.grads(truth).items():
        assert_as_accurate(f"grad_{tensor}", grads[tensor], naive_grads[tensor], expected, GRAD_FLOOR[dtype])


def test_a_weight_of_zero_silences_an_impossible_token() -> None:
    """Its log-probability is -inf, which times 0 would be no number."""
    case = make(torch.float64, pairs=1, bias=True, keep=1.0)
    assert case.bias is not None
    with torch.no_grad():
        case.bias[7] = -float("inf")
    labels, weights = case.labels.clone(), torch.ones(case.labels.shape, dtype=torch.float64, device=DEVICE)
    labels[:, 0], weights[:, 0] = 7, 0
    case.labels[:, 0] = case.labels[:, 0].clamp(max=6)
    options = {"bias": case.bias, "nll_labels": case.labels, "answer_weights": weights}
    out = preference_loss(case.hidden, case.weight, labels, SimPO(), **options)
    other = preference_loss(case.hidden, case.weight, case.labels, SimPO(), **options)
    torch.testing.assert_close(out.loss, other.loss)
    assert torch.isfinite(case.grads(out.loss)["hidden"]).all()


def test_length_desensitised_weights() -> None:
    """What an answer is longer than its partner counts alpha times; the reference's sums as well."""
    labels = torch.tensor([[1, -100, 2, 3], [4, 5, 6, 7], [-100, 1, -100, 2], [1, 2, 3, 4]])
    found = length_desensitised(labels, 0.25)
    expected = torch.tensor([[1, 1, 1, 0.25], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(torch.where(labels == -100, 1, found), expected)
    case = make(torch.float64, pairs=3)
    weights = length_desensitised(case.labels, 0.5)
    other = make(torch.float64, pairs=3, seed=9)
    logps = reference.linear_logprobs(other.hidden, other.weight, case.labels).detach()
    sums = (logps * weights).sum(1)
    inputs = case.hidden, case.weight, case.labels, DPO()
    given_sums = preference_loss(*inputs, reference_logps=sums, answer_weights=weights)
    computed = preference_loss(*inputs, reference=(other.hidden, other.weight), answer_weights=weights)
    torch.testing.assert_close(computed.loss, given_sums.loss)
    torch.testing.assert_close(computed.pairs, given_sums.pairs)
    for alpha in (-0.1, 1.5):
        with pytest.raises(ValueError, match="alpha must be"):
            length_desensitised(labels, alpha)
    with pytest.raises(ValueError, match=r"labels must be \[2P, T\], chosen first, got shape \[3\]"):
        length_desensitised(labels[:3, 0], 0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_reference_model_in_one_call(packed: bool) -> None:
    """Of other features and with a bias; without gradients, at one product."""
    case, other = make(torch.float64, pairs=3), make(torch.float64, pairs=3, seed=3, features=24, bias=True)
    options: dict[str, Any] = {"logit_scale": 0.7, "softcap": 5.0}
    sums = reference.linear_logprobs(other.hidden, other.weight, case.labels, bias=other.bias, **options).sum(1)
    inputs, states = (case.hidden, case.weight, case.labels), other.hidden
    expected = reference.preference_loss(*inputs, DPO(), reference_logps=sums.detach(), **options)["loss"]
    if packed:
        kept = case.labels != -100
        options["cu_seqlens"] = F.pad(kept.sum(1).cumsum(0), (1, 0))
        inputs, states = (case.hidden[kept], case.weight, case.labels[kept]), other.hidden[kept]
    out = preference_loss(*inputs, DPO(), reference=(states, other.weight, other.bias), **options)
    torch.testing.assert_close(out.loss, expected)
    grads = case.grads(expected)
    for name, grad in case.grads(out.loss).items():
        torch.testing.assert_close(grad, grads[name])
    assert other.weight.grad is None


@pytest.mark.parametrize("objective", FAMILY, ids=str)
def test_the_family_in_groups_and_at_once(objective: Any) -> None:
    """The same values and gradients as full logits with the class itself in float64, in one group and in several."""
    case = make(torch.float64, pairs=5, vocab=600)
    inputs, extra = (case.hidden, case.weight, case.labels), given(case)
    if isinstance(objective, SFT | ORPO):
        plain = reference.odds_ratio() if isinstance(objective, ORPO) else lambda pairs: 0 * pairs.chosen_sum
    else:
        plain = objective
    options = {**extra, "nll_weight": getattr(objective, "nll_weight", 0.0)}
    truth = reference.preference_loss(*inputs, plain, **options)["loss"]
    expected = case.grads(truth)
    for workspace in (None, 25 * (600 + 32 * 3) * 8):
        out = preference_loss(*inputs, objective, workspace_bytes=workspace, **extra)
        torch.testing.assert_close(out.loss, truth)
        for name, grad in case.grads(out.loss).items():
            torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("objective", FAMILY, ids=str)
def test_closed_forms_agree_with_autograd_and_extremes_are_finite(objective: Any) -> None:
    levels = -torch.tensor([0.0, 1e-30, 1e-9, 1e-4, 0.5, 3.0, 40.0, 900.0], dtype=torch.float64)
    chosen, rejected = (grid.reshape(-1) for grid in torch.meshgrid(levels, levels, indexing="ij"))
    length = torch.full_like(chosen, 7.0)
    nothing = torch.zeros_like(chosen)
    pairs = PairLogps(7 * chosen, 7 * rejected, length, length, nothing, nothing, nothing + 0.5)
    everything = torch.ones_like(chosen, dtype=torch.bool)
    for dtype in (torch.float64, torch.float32):
        of = PairLogps(*(None if value is None else value.to(dtype) for value in pairs))
        terms = terms_of(objective, of, everything, 64, differentiate=True)
        for value in (*terms[:3], *terms.metrics):
            assert torch.isfinite(value).all()
    if isinstance(objective, ORPO):
        closed = terms_of(objective, pairs, everything, 64, differentiate=True)
        by_autograd = terms_of(reference.odds_ratio(objective.beta), pairs, everything, 64, differentiate=True)
        for mine, theirs in zip(closed[:3], by_autograd[:3], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-300)


def test_without_a_number_the_nll_weight_is_the_objectives_own() -> None:
    case = make(torch.float64)
    inputs = (case.hidden, case.weight, case.labels)
    for objective, own in ((ORPO(), 1.0), (SimPO(), 0.0)):
        out = preference_loss(*inputs, objective)
        torch.testing.assert_close(out.loss, own * out.nll_loss + out.objective_loss)
        out = preference_loss(*inputs, objective, nll_weight=0.25)
        torch.testing.assert_close(out.loss, 0.25 * out.nll_loss + out.objective_loss)


def test_rewards_and_metrics() -> None:
    case = make(torch.float32, pairs=3)
    case.labels[4] = -100
    extra = given(case)
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        out = preference_loss(case.hidden, case.weight, case.labels, DPO(0.1), **extra)
    chosen = 0.1 * (out.pairs.chosen_sum - extra["reference_logps"][:3])
    torch.testing.assert_close(out.chosen_rewards, chosen)
    assert out.valid.tolist() == [True, False, True]
    metrics = out.metrics()
    torch.testing.assert_close(metrics["rewards/chosen"], chosen[[0, 2]].mean())
    assert not any(value.requires_grad for value in metrics.values())
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        own = preference_loss(case.hidden, case.weight, case.labels, lambda pairs: -pairs.chosen_mean)
    assert torch.equal(own.chosen_rewards, own.pairs.chosen_sum)  # an objective without rewards of its own


def test_skipped_pairs_leave_any_objective_finite() -> None:
    """What an objective makes of a pair without an answer is NaN here, and does not count."""
    case = make(torch.float32, pairs=3)
    case.labels[4] = -100
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        out = preference_loss(
            case.hidden, case.weight, case.labels, lambda pairs: -pairs.rejected_sum / pairs.rejected_length
        )
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(grad).all() for grad in case.grads(out.loss).values())


@dataclass(frozen=True)
class AgainstTheMean:
    """A pair's margin against the batch's mean margin: couples pairs."""

    couples_pairs: bool = True

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin = pairs.chosen_sum - pairs.rejected_sum
        return -F.logsigmoid(margin - margin.mean())


def test_an_objective_that_couples_pairs_sees_them_all() -> None:
    case = make(torch.float64, pairs=6, vocab=600)
    groups = 25 * (600 + 32 * 3) * 8
    inputs = (case.hidden, case.weight, case.labels)
    truth = reference.preference_loss(*inputs, AgainstTheMean())["loss"]
    out = preference_loss(*inputs, AgainstTheMean(), workspace_bytes=groups)
    torch.testing.assert_close(out.loss, truth)
    expected = case.grads(truth)
    for name, grad in case.grads(out.loss).items():
        torch.testing.assert_close(grad, expected[name])
    split = preference_loss(*inputs, AgainstTheMean(couples_pairs=False), workspace_bytes=groups)
    assert not torch.isclose(split.loss, truth)  # the groups are there, so saying so matters


def test_an_objective_that_couples_pairs_sees_those_that_count_alone() -> None:
    """What a pair without an answer holds would reach the loss through the others, and no gradient back."""
    case = make(torch.float64, pairs=4)
    case.labels[1] = -100
    inputs = (case.hidden, case.weight, case.labels)
    with pytest.warns(UserWarning, match="1 of 4 pairs"):
        out = preference_loss(*inputs, AgainstTheMean())
    truth = reference.preference_loss(*inputs, AgainstTheMean())["loss"]
    torch.testing.assert_close(out.loss, truth)
    expected = case.grads(truth)
    for name, grad in case.grads(out.loss).items():
        torch.testing.assert_close(grad, expected[name])
    assert torch.equal(expected["hidden"][5], torch.zeros_like(expected["hidden"][5]))


def test_what_an_objective_sees_is_its_own_to_change() -> None:
    case = make(torch.float64)
    extra = given(case)
    kept = {name: value.clone() for name, value in extra.items()}

    def changes(pairs: PairLogps) -> Tensor:
        assert pairs.margins is not None
        pairs.chosen_length.add_(100)
        pairs.margins.mul_(0)
        return -pairs.chosen_sum.mul_(2.0) + pairs.rejected_sum

    inputs = (case.hidden, case.weight, case.labels)
    out = preference_loss(*inputs, changes, **extra)
    with torch.no_grad():
        plain = preference_loss(*inputs, changes, **extra)
    own = preference_loss(*inputs, lambda pairs: -2 * pairs.chosen_sum + pairs.rejected_sum)
    for found in (out, plain):
        torch.testing.assert_close(found.loss, own.loss)
        for mine, theirs in zip(found.pairs[:4], own.pairs[:4], strict=True):
            assert torch.equal(mine, theirs)
    assert all(torch.equal(extra[name], value) for name, value in kept.items())
    expected = case.grads(own.loss)
    for name, grad in case.grads(out.loss).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("objective", [ORPO(), SimPO(), DPO()], ids=["orpo", "simpo", "dpo"])
def test_a_masked_rejected_answer_is_every_objectives_best_case(objective: Any) -> None:
    case = make(torch.float32, vocab=100, bias=True, keep=1.0)
    with torch.no_grad():
        case.bias[90:] = -torch.inf  # type: ignore[index]
    case.labels[case.labels >= 90] = 3
    case.labels[2:, 1] = 95
    extra = given(case)["reference_logps"] if isinstance(objective, DPO) else None
    out = preference_loss(
        case.hidden, case.weight, case.labels, objective, bias=case.bias, reference_logps=extra, nll_weight=0.0
    )
    assert out.loss == 0
    assert all(torch.isfinite(grad).all() for grad in case.grads(out.loss).values())


def test_sums_over_long_answers_keep_their_precision() -> None:
    case = make(torch.float32, pairs=1, length=60_000, features=1, vocab=3, keep=1.0)
    truth = case.to(torch.float64).reference()
    assert relative(case.ours(backend="torch").nll_loss, truth["nll_loss"]) < 2e-7


def foreign(pairs: PairLogps) -> Tensor:
    return TEMPERATURE * (pairs.rejected_sum - pairs.chosen_sum)


TEMPERATURE = torch.tensor(1.5, requires_grad=True)


class NamesItsMetricsInOne(SimPO):
    metric_names = "margin"  # type: ignore[assignment]


class NegativeNll(SimPO):
    nll_weight = -3.0


class Neither(SFT):
    paired = None


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"objective": None}, TypeError, "objective must be callable on PairLogps.*got NoneType"),
    "a class": ({"objective": SimPO}, TypeError, "got the class SimPO: pass an instance or a function"),
    "a parameter of its own": ({"objective": foreign}, ValueError, "asks for a gradient of its own"),
    "nothing of ours": ({"objective": lambda _: TEMPERATURE.expand(2)}, ValueError, "do not depend on chosen_sum"),
    "complex losses": ({"objective": lambda p: p.chosen_sum + 1j}, ValueError, "its loss is torch.complex64"),
    "derivatives of another shape": (
        {"objective": lambda p: PairTerms(p.chosen_sum, p.chosen_sum[:1], p.chosen_sum)},
        ValueError,
        r"its d_chosen_sum is torch.float32 \[1\]",
    ),
    "one name for metrics": ({"objective": NamesItsMetricsInOne()}, TypeError, "metric_names must be a tuple of names"),
    "negative nll weight": (
        {"objective": NegativeNll()},
        ValueError,
        r"objective.nll_weight must be finite and not negative, got -3.0",
    ),
    "no callable": ({"objective": 0.1}, TypeError, "objective must be callable on PairLogps.*got float"),
    "a mean": (
        {"objective": lambda pairs: pairs.chosen_sum.mean()},
        ValueError,
        r"one floating-point number for each of the 2 pairs, but its loss is torch.float32 \[\]: do not take a mean",
    ),
    "no tensor": ({"objective": lambda _: 1.0}, TypeError, "must return a tensor of losses or PairTerms, got float"),
    "detached": (
        {"objective": lambda pairs: -pairs.chosen_sum.detach()},
        ValueError,
        "do not depend on chosen_sum, rejected_sum or their means",
    ),
    "metrics without names": (
        {"objective": lambda pairs: PairTerms(*pairs[:3], (pairs.chosen_sum,))},
        ValueError,
        "names 0 metrics in metric_names but returned 1",
    ),
    "mmpo without margins": (
        {"objective": MMPO(), "reference_logps": torch.zeros(4)},
        ValueError,
        "this objective needs margins",
    ),
    "kto without a reference": ({"objective": KTO()}, ValueError, "needs reference_logps"),
    "dpo without a reference": ({"objective": DPO()}, ValueError, "needs reference_logps"),
    "reference of another shape": (
        {"objective": DPO(), "reference_logps": torch.zeros(2)},
        ValueError,
        r"reference_logps must be \[4\], a sum for each sequence, chosen first, got shape \[2\]",
    ),
    "reference of integers": (
        {"objective": DPO(), "reference_logps": torch.zeros(4, dtype=torch.int64)},
        TypeError,
        "reference_logps must be a floating-point tensor, got torch.int64",
    ),
    "reference with a gradient": (
        {"objective": DPO(), "reference_logps": torch.zeros(4, requires_grad=True)},
        ValueError,
        r"asks for a gradient.*under torch.no_grad\(\)",
    ),
    "reference twice": (
        {"objective": DPO(), "reference_logps": torch.zeros(4), "reference": (torch.ones(4, 6, 8), torch.ones(20, 8))},
        ValueError,
        "reference and reference_logps say the same twice",
    ),
    "a reference that is a model": (
        {"objective": DPO(), "reference": torch.nn.Linear(8, 20)},
        TypeError,
        r"reference must be \(hidden, weight\) or \(hidden, weight, bias\).*got Linear",
    ),
    "a reference of other tokens": (
        {"objective": DPO(), "reference": (torch.ones(4, 5, 8), torch.ones(20, 8))},
        ValueError,
        r"reference's hidden must be \[4, 6, H\], one state for each label, got shape \[4, 5, 8\]",
    ),
    "weights of another shape": (
        {"objective": SimPO(), "answer_weights": torch.ones(4, 5)},
        ValueError,
        r"answer_weights must be \[4, 6\], one for each label, got shape \[4, 5\]",
    ),
    "weights of integers": (
        {"objective": SimPO(), "answer_weights": torch.ones(4, 6, dtype=torch.int64)},
        TypeError,
        "answer_weights must be a floating-point tensor, got torch.int64",
    ),
    "weights with a gradient": (
        {"objective": SimPO(), "answer_weights": torch.ones(4, 6, requires_grad=True)},
        ValueError,
        "answer_weights asks for a gradient, which the loss does not give",
    ),
    "pairs that are neither": (
        {"objective": Neither()},
        TypeError,
        "objective.paired must be True or False, got None",
    ),
    "margins of another shape": (
        {"objective": SimPO(), "margins": torch.zeros(3)},
        ValueError,
        r"margins must be \[2\], one for each pair, got shape \[3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, error, message = BAD[case]
    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels = torch.zeros(4, 6, dtype=torch.int64)
    with pytest.raises(error, match=message):
        preference_loss(hidden, weight, labels, **arguments)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: ORPO(-1.0), "beta must be finite and not negative, got -1.0"),
        (lambda: SimPO(2.0, float("nan")), "gamma must be finite"),
        (lambda: DPO(0.1, 0.5), "label_smoothing must be below 0.5, got 0.5"),
        (lambda: AlphaPO(float("inf")), "alpha must be finite, got inf"),
        (lambda: IPO(0.0), "beta must be finite and positive, got 0.0"),
        (lambda: SPPO(0.0), "beta must be finite and positive, got 0.0"),
        (lambda: APO(kind="up"), r"kind must be one of \('zero', 'down'\), got 'up'"),
        (lambda: KTO(desirable_weight=-1.0), "desirable_weight must be finite and not negative, got -1.0"),
        (lambda: DPO(nll_weight=-1.0), "nll_weight must be finite and not negative, got -1.0"),
        (lambda: CPO(loss_type="kto"), r"loss_type must be one of \('sigmoid', 'hinge', 'ipo', 'simpo'\), got 'kto'"),
        (lambda: CPO(0.0, "ipo"), "beta must be finite and positive, got 0.0"),
        (lambda: CPO(label_smoothing=1.1), "label_smoothing must be at most 1, got 1.1"),
        (lambda: CPO(alpha=float("inf")), "alpha must be finite, got inf"),
        (lambda: CPO(nll_weight=-1.0), "nll_weight must be finite and not negative, got -1.0"),
    ],
)
def test_bad_numbers_of_an_objective(make_one: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_one()


def test_bad_input_of_ktos_answers() -> None:
    logps, desirable = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"desirable must be boolean, got torch.int64"):
        KTO().of_answers(logps, logps, desirable.long(), 0.0)
    with pytest.raises(ValueError, match=r"must have one shape, got \[\[4\], \[1\], \[4\]\]"):
        KTO().of_answers(logps, logps[:1], desirable, 0.0)
    with pytest.raises(TypeError, match="robust must be True or False, got 1"):
        DPO(robust=1)  # type: ignore[arg-type]
