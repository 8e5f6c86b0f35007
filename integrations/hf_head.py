"""The head of a Hugging Face model: where it is, and what the model does to the logits that the head returns.

The head module is intercepted during one ordinary forward of the model, so whatever a model does to hidden states
before its head (a projection, a division) has happened by then. What it does to the logits afterwards is asked of the
model itself: for one batch the head returns known numbers (``probes``), and ``read`` takes the scale, the softcap, the
columns kept, the offset of each column and the masked columns off what comes out of the model's forward. No list of
model types stands behind it, and what it cannot express it refuses in a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.integrations.adapters import callees, is_of_a_wrapper, refusal
from orpo_kernels.integrations.detours import uncompiled
from orpo_kernels.settings import Head

# A column whose logit is below this for a head output of 0 is masked: no softmax of logits of any size that a trained
# model has leaves it a probability. Models mask with -1e4, -1e9, finfo.min or -inf.
MASKED = -5e3
# The constants that the probes hold, beside rows of random numbers. A softcap turns FAR into itself.
FAR = 2.0**60
LADDER = (2.0**-8, 2.0**-4, 1.0, 2.0**4, 2.0**8)
CONSTANTS = (0.0, FAR, -FAR, *LADDER)
SPREADS = (1.0, 30.0)  # standard deviations of the random rows
PROBES = len(CONSTANTS) + len(SPREADS)


def head_module(model: nn.Module) -> nn.Module | str:
    """The module that turns hidden states into logits, or the reason why it cannot be replaced.

    An ``nn.Linear``, or peft's layer around one that ``adapters.linear_head`` reads.
    """
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        return f"{type(model).__name__} names no output embeddings"
    found: nn.Module = uncompiled(callees(head)[0])
    found = getattr(found, "_fsdp_wrapped_module", found)  # where FSDP1 has it in a unit of its own
    return _refusal_of_forward(found) or found


def _refusal_of_forward(head: nn.Module) -> str | None:
    why: str | None = refusal(head)
    if why is not None:
        return why
    hooks = *head._forward_hooks.values(), *head._forward_pre_hooks.values()
    if hasattr(head, "_hf_hook") or not all(map(is_of_a_wrapper, hooks)):
        return "its head has forward hooks, which a fused loss would pass by"
    if head._backward_hooks or head._backward_pre_hooks:
        return "its head has backward hooks, which a fused loss would pass by"
    if not getattr(vars(head).get("forward"), "ours", "forward" not in vars(head)):
        return "its head's forward was replaced, which a fused loss would pass by"
    weight: Any = head.weight
    return "its head's weight is offloaded" if weight.is_meta else None


@dataclass(frozen=True)
class Reading:
    """What a model makes of its head's output ``z``: ``cap(logit_scale * (z + bias)) + shift`` of the first columns.

    No log-probability depends on ``shift``, and as a part of the bias it would round all of them in narrow dtypes.
    """

    vocab: int
    logit_scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # [vocab] float64 on the host, beside the head's own
    shift: float = 0.0

    def head(self, own: Head) -> Head:
        """The map from hidden states to the model's logits but for ``shift``, from the one to its head's output."""
        weight, bias, tail = own.weight, own.bias, own.tail
        if self.vocab < own.vocab:
            weight = weight[: self.vocab]
            bias, tail = (None if tensor is None else tensor[: self.vocab] for tensor in (bias, tail))
        if self.bias is not None:
            # Sums of a few masked columns stay finite, in float16 too.
            lowest = max(-1e30, torch.finfo(weight.dtype).min / 2)
            added = self.bias.clamp(min=lowest).to(weight.device, weight.dtype)
            bias = added if bias is None else bias + added
        return Head(weight, bias, self.logit_scale, self.softcap, tail=tail)

    def __str__(self) -> str:
        said = [f"{self.vocab} columns"]
        if self.logit_scale != 1.0:
            said.append(f"scale {self.logit_scale:.6g}")
        if self.softcap is not None:
            said.append(f"softcap {self.softcap:.6g}")
        if self.bias is not None:
            masked = self.bias * self.logit_scale <= MASKED
            said += [f"{int(masked.sum())} of them masked"] if masked.any() else []
            said += ["an offset of each"] if self.bias[~masked].any() else []
        if self.shift != 0.0:
            said.append(f"all shifted by {self.shift:.6g}")
        return ", ".join(said)


def probes(vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the head returns when the model is asked, ``[PROBES, vocab]``: the same numbers on every rank."""
    constant = torch.tensor(CONSTANTS, dtype=torch.float32, device="cpu")[:, None].expand(-1, vocab)
    chance = torch.Generator("cpu").manual_seed(0)
    random = torch.randn(len(SPREADS), vocab, generator=chance, dtype=torch.float32, device="cpu")
    spreads = torch.tensor(SPREADS, dtype=torch.float32, device="cpu")[:, None]
    return torch.cat([constant, spreads * random]).to(device, dtype)


def read(given: Tensor, logits: Tensor) -> Reading | str:
    """What the model does, from ``probes`` and the logits it made of them ``[PROBES, V']``; or why it cannot be told.

    A softcap shows in ``FAR``, the scale where the slope is best conditioned, offsets in the row of zeros; the random
    rows then decide whether that is all. Each of their entries is its own, so a map that mixes columns fails there.
    """
    if logits.requires_grad:
        return "it scales or shifts its logits by trained parameters after the head"
    vocab = logits.shape[-1]
    if vocab > given.shape[-1]:
        return f"it makes {vocab} logits of its head's {given.shape[-1]}"
    given, out = given[:, :vocab].cpu().double(), logits.detach().cpu().double()
    if out.isnan().any():
        return "its logits are NaN where its head's output is finite"
    live = out[0] > MASKED
    if not live.any():
        return f"every one of its logits is below {MASKED:g} where its head's output is 0"
    ours, theirs = given[-len(SPREADS) :], out[-len(SPREADS) :]
    zero, far, near, *ladder = out[: len(CONSTANTS), live]

    top = far.median().item()
    softcap = None if top > 2.0**30 else _rounded(top)
    if softcap is not None and not softcap > 0:
        return f"it turns {FAR:.0e} into {top:.6g}, which is neither a positive scale nor a softcap"

    def uncapped(values: Tensor) -> Tensor:
        return values if softcap is None else softcap * torch.atanh(values / softcap)

    offset = uncapped(zero)
    if softcap is None:
        scale = ((far - near) / (2 * FAR)).median().item()
    else:
        swings = torch.stack([(row - zero).abs().median() / softcap for row in ladder])
        best = int((swings - 0.5).abs().argmin())
        scale = ((uncapped(ladder[best]) - offset) / LADDER[best]).median().item()

    eps = _rounding(theirs[:, live], logits.dtype)
    moderate = theirs[:, live].abs() < (0.9 * softcap if softcap is not None else math.inf)
    if eps > 1e-6 and moderate.any():  # one probe rounds the scale with everything else; the mean of many does not
        z, z_out = ours[:, live][moderate], (uncapped(theirs[:, live]) - offset)[moderate]
        many = ((z * z_out).sum() / (z * z).sum()).item()
        scale = many if abs(many - scale) > 8 * eps * abs(scale) / math.sqrt(len(z)) else scale
    scale = _rounded(scale)
    if not (scale > 0 and math.isfinite(scale) and offset.isfinite().all()):
        return f"it multiplies its logits by {scale:.6g}, expected a positive number"

    straight = scale * ours[:, live]
    expected = straight + offset
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    tolerance = 8 * eps * (straight.abs() + offset.abs() + expected.abs()) + 1e-30
    wrong = (theirs[:, live] - expected).abs() - tolerance
    if not (wrong <= 0).all():
        worst = int(wrong.nan_to_num(math.inf).argmax())
        return (
            "it does something to its logits that is no scale, softcap, offset or mask of columns: it turns "
            f"{ours[:, live].flatten()[worst].item():.6g} into {theirs[:, live].flatten()[worst].item():.6g}, where "
            f"scale {scale:.6g} and softcap {softcap and format(softcap, '.6g')} give "
            f"{expected.flatten()[worst].item():.6g}"
        )
    if not live.all() and softcap is not None:
        return "it masks columns of its logits after a softcap"
    if (theirs[:, ~live] > MASKED / 2).any():
        return f"it masks columns of its logits by the head's own output (below {MASKED:g} at 0 and not elsewhere)"
    shift = offset.median().item() if softcap is None else 0.0
    every = out[0].clone()
    every[live] = offset - shift
    return Reading(vocab, scale, softcap, every / scale if every.any() else None, shift)


def fingerprint(model: nn.Module, module: nn.Module) -> tuple[Any, ...]:
    """Whatever a model's treatment of its logits may depend on: a change asks for another reading.

    Numbers of its configuration and of the model itself, buffers of its own by their version, the head's size. The
    weight has another shape and dtype while it is sharded.
    """
    linear: Any = module
    found: list[Any] = [linear.out_features, linear.in_features]
    config: Any = getattr(model, "config", None)
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in {id(each): each for each in (config, texts) if each is not None}.values():
        found += [item for item in vars(holder).items() if isinstance(item[1], int | float | None)]
    found += [item for item in vars(model).items() if isinstance(item[1], float)]
    found += [
        (name, id(tensor), tensor._version)
        for name, tensor in (*model._buffers.items(), *model._parameters.items())
        if tensor is not None and not tensor.is_inference()
    ]
    return tuple(found)


def _rounded(value: float) -> float:
    """The number of four digits that a reading in float32 stands for, if it stands for one."""
    short = float(f"{value:.4g}")
    return short if abs(short - value) <= 2e-6 * abs(value) else value


def _rounding(logits: Tensor, dtype: torch.dtype) -> float:
    """eps of the narrowest dtype that holds all of these logits: a model may round them and widen them again."""
    for narrow in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(narrow).double(), logits):
            return torch.finfo(narrow).eps
    return torch.finfo(dtype).eps
