"""What other packages released, called as their own trainers call it: Liger's chunked losses, CCE, and TRL."""

import importlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.measure import UnsupportedError
from benchmarks.problems.cases import IGNORE
from benchmarks.problems.chains import float32
from benchmarks.problems.inputs import Problem
from benchmarks.problems.objectives import AGAINST_REFERENCE, KL, OBJECTIVES, desirable
from orpo_kernels.integrations import TRL_CPO, TRL_ORPO
from orpo_kernels.objectives import KTO, ORPO, SimPO

Step = Callable[[], Tensor]  # one forward
SIDES = ("chosen", "rejected")


def stock(problem: Problem) -> Step:
    """A model's last lines: the head, and a softcap where it has one."""
    cap = problem.softcap

    def logits() -> Tensor:
        out = F.linear(problem.hidden, problem.weight)
        return out if cap is None else torch.tanh(out / cap) * cap

    return logits


def liger(problem: Problem, task: str, *, compiled: bool) -> Step:
    """Liger's losses take the padded batch: nll_target sums over its chosen half and divides by that half's labels,
    means of answers are per sequence, the loss is a mean over pairs. One difference, not seen here: it divides by an
    empty answer's count without a guard."""
    objective = OBJECTIVES[task]
    name = f"LigerFusedLinear{type(objective).__name__}Loss"
    if problem.softcap is not None:
        raise UnsupportedError(f"{name} has no softcap")
    options: dict[str, Any] = {"beta": objective.beta, "compiled": compiled}
    inputs = {"lin_weight": problem.weight, "_input": problem.hidden, "target": problem.labels}
    if task in AGAINST_REFERENCE:  # it takes no log-probabilities of a reference, only its hidden states and head
        options["use_ref_model"] = True
        reference = problem.of_reference()
        inputs |= {"ref_input": reference.hidden, "ref_weight": reference.weight}
    if isinstance(objective, ORPO):
        inputs["nll_target"] = problem.nll_labels
    if isinstance(objective, SimPO):
        options |= {"gamma": objective.gamma, "compute_nll_loss": False}
    if isinstance(objective, KTO):
        kl = torch.tensor(KL, device=problem.device)
        inputs |= {"preference_labels": desirable(problem), "kl": kl}
    loss = getattr(imported("liger_kernel.chunked_loss"), name)(**options)
    return lambda: cast(Tensor, loss(**inputs)[0])


def cce(problem: Problem, *, impl: str) -> Step:
    if problem.device.type == "cpu":
        raise UnsupportedError(
            "cut-cross-entropy's kernels need a GPU; its CPU path is torch.compile of the plain loss"
        )
    nll = imported("cut_cross_entropy").linear_cross_entropy
    inputs = problem.hidden, problem.weight, problem.targets
    options = {"softcap": problem.softcap, "ignore_index": IGNORE, "reduction": "none", "impl": impl}
    return lambda: -nll(*inputs, **options).float()


def quack(problem: Problem) -> Step:
    """QuACK's chunked linear cross-entropy, which makes all gradients in forward and so gives nothing but their mean or
    sum. It takes flat rows, here the target rows alone, and asks for a multiple of 8 of them."""
    if problem.device.type == "cpu":
        raise UnsupportedError("quack-kernels' kernels need a GPU")
    if problem.softcap is not None:
        raise UnsupportedError("chunked_linear_cross_entropy has no softcap")
    loss = imported("quack.linear_cross_entropy").chunked_linear_cross_entropy
    targets = problem.targets[problem.targets != IGNORE]
    missing = -len(targets) % 8
    targets = F.pad(targets, (0, missing), value=IGNORE)
    return lambda: loss(F.pad(problem.target_rows(), (0, 0, 0, missing)), problem.weight, targets, ignore_index=IGNORE)


class _HeadOnly(nn.Module):
    """As much of a causal language model as TRL asks for, around hidden states that are already there. ``padded``: a
    trainer's labels name each position's own token, so there is one position more, which predicts nothing."""

    is_gradient_checkpointing = False

    def __init__(self, problem: Problem, *, padded: bool) -> None:
        super().__init__()
        self.problem, self.padded = problem, padded
        self.config = SimpleNamespace(final_logit_softcapping=problem.softcap)
        self.config.get_text_config = lambda: self.config
        self.head = SimpleNamespace(weight=problem.weight, bias=None)

    def base_model(self, **_: Any) -> SimpleNamespace:
        hidden = self.problem.hidden
        return SimpleNamespace(last_hidden_state=F.pad(hidden, (0, 0, 0, 1)) if self.padded else hidden)

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        logits = stock(replace(self.problem, hidden=self.base_model().last_hidden_state))()
        return SimpleNamespace(logits=float32(logits))  # accelerate casts a model's output

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head


def _fused(problem: Problem, *, padded: bool = True, **options: Any) -> Any:
    """With TRL's fused head, as its own trainers add it: it compacts to the target rows on a GPU and not on a CPU."""
    model: Any = _HeadOnly(problem, padded=padded)
    imported("trl.trainer.utils").add_fused_lm_head(model, **options)
    return model


def trl_fused(problem: Problem) -> Step:
    """TRL's fused head alone."""
    model = _fused(problem, padded=False)
    return lambda: model(shift_labels=problem.targets, fused_lm_head=True).log_probs


class _Accelerator:
    """One process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def trl(problem: Problem, task: str) -> Step:
    """What TRL's trainers make of a model's output, by their own methods and with all that they log: of its logits for
    ORPO and CPO, of its fused head for DPO and KTO. Only their constructors, which want a data set, do not run."""
    objective = OBJECTIVES[task]
    known: dict[str, Any] = {"beta": objective.beta, "label_smoothing": 0.0, "aux_loss_enabled": False}
    known["accelerator"] = _Accelerator(problem.device)
    targets, labels = (F.pad(ids, (1, 0), value=IGNORE) for ids in (problem.targets, problem.labels))
    batch = {"input_ids": targets.clamp(min=0), "attention_mask": (targets != IGNORE).long()}
    if task in AGAINST_REFERENCE:
        batch["completion_mask"] = (labels != IGNORE).long()
        return _trl_against_reference(problem, objective, known, batch)
    batch["labels"] = labels
    sides = [
        (f"{side}_{name}", half) for name, ids in batch.items() for side, half in zip(SIDES, ids.chunk(2), strict=True)
    ]
    if isinstance(objective, SimPO):
        known |= {"loss_type": "simpo", "simpo_gamma": objective.gamma}
    known = {"loss_type": "sigmoid", "cpo_alpha": getattr(objective, "nll_weight", 0.0), "alpha": 0.0, **known}
    known |= {"is_encoder_decoder": False, "padding_value": 0, "pad_token_id": 0}
    try:
        trainer = _bare((TRL_ORPO if isinstance(objective, ORPO) else TRL_CPO).find_class(), known)
    except ImportError as missing:
        raise UnsupportedError(str(missing)) from missing
    model, batch = _HeadOnly(problem, padded=True), dict(sides)
    return lambda: cast(Tensor, trainer.get_batch_loss_metrics(model, batch)[0])


def _trl_against_reference(problem: Problem, objective: Any, known: dict[str, Any], batch: dict[str, Tensor]) -> Step:
    name, logged = f"{type(objective).__name__}Trainer", ["log_probs", "entropy", "mean_logits"]
    if not hasattr(trainer := getattr(imported("trl"), name), "_compute_loss"):
        raise UnsupportedError(f"the {name} of this TRL has no _compute_loss")
    reference = _fused(problem.of_reference())
    if isinstance(objective, KTO):
        batch["label"] = desirable(problem)
        weights = {f"{kind}_weight": getattr(objective, f"{kind}_weight") for kind in ("desirable", "undesirable")}
        known |= {"calculate_KL": True, "loss_type": "kto", **weights}
        known["_compute_kl_logps"] = lambda of, _: torch.tensor(0.0 if of is reference else KL, device=problem.device)
    else:
        logged.append("is_top1")
        known |= {"loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None, "use_weighting": False}
    model = _fused(problem, outputs=tuple(logged))
    known |= {"model": model, "ref_model": reference, "precompute_ref_logps": False, "f_divergence_type": "reverse_kl"}
    known |= {"args": SimpleNamespace(gradient_checkpointing_kwargs=None), "_tp_size": 1, "_total_train_tokens": 0}
    trained = _bare(trainer, {**known, "_metrics": defaultdict(lambda: defaultdict(list))})
    return lambda: cast(Tensor, trained._compute_loss(model, batch, False))


def _bare(trainer_class: Any, attributes: dict[str, Any]) -> Any:
    """A trainer that was never constructed."""
    trainer = object.__new__(trainer_class)
    vars(trainer).update(attributes)
    return trainer


def imported(module: str) -> ModuleType:
    """An optional competitor's module. Its absence is a reason; an error inside it is not."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or module.split(".")[0] != missing.name.split(".")[0]:
            raise
        raise UnsupportedError(f"{missing.name} is not installed") from missing
