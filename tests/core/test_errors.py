"""Every bad input is an error that names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_kernels import OrpoLoss, explain, linear_logprobs, orpo_loss

HIDDEN, WEIGHT, LABELS = torch.randn(4, 6, 8), torch.randn(20, 8), torch.zeros(4, 6, dtype=torch.int64)

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unshifted labels": (
        {"labels": torch.zeros(4, 7, dtype=torch.int64)},
        ValueError,
        r"labels has 7 columns but hidden has 6: labels must be shifted; pass labels\[:, 1:\] with hidden\[:, :-1\]",
    ),
    "labels of another shape": ({"labels": LABELS[:3]}, ValueError, r"labels must be \[4, 6\].*got shape \[3, 6\]"),
    "float labels": ({"labels": LABELS.float()}, TypeError, "labels must hold integers.*got torch.float32"),
    "labels no tensor": ({"labels": [[1]]}, TypeError, "labels must be a torch.Tensor, got list"),
    "label too large": ({"labels": LABELS + 20}, ValueError, r"labels holds 20.*\[0, 20\)"),
    "label negative": ({"labels": LABELS - 1}, ValueError, r"labels holds -1.*ignore_index \(-100\)"),
    "nll label too large": ({"nll_labels": LABELS + 99}, ValueError, "nll_labels holds 99"),
    "nll labels of another shape": ({"nll_labels": LABELS[:, :3]}, ValueError, r"nll_labels must be \[4, 6\]"),
    "unshifted nll labels": (
        {"nll_labels": torch.zeros(2, 7, dtype=torch.int64)},
        ValueError,
        "nll_labels has 7 columns but hidden has 6: labels must be shifted",
    ),
    "odd sequences": (
        {"hidden": HIDDEN[:3], "labels": LABELS[:3]},
        ValueError,
        "hidden has 3 sequences but pairs need an even number",
    ),
    "no sequences": ({"hidden": HIDDEN[:0], "labels": LABELS[:0]}, ValueError, "hidden has 0 sequences"),
    "packed without offsets": ({"hidden": HIDDEN[0], "labels": LABELS[0]}, ValueError, "pass cu_seqlens"),
    "hidden no tensor": ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
    "integer hidden": ({"hidden": LABELS}, TypeError, "hidden must be float32.*got torch.int64"),
    "quantised weight": ({"weight": WEIGHT.to(torch.int8)}, TypeError, "weight must be.*int8: dequantise"),
    "transposed weight": ({"weight": torch.randn(8, 20)}, ValueError, "weight looks transposed; pass weight.T"),
    "another head": ({"weight": torch.randn(20, 9)}, ValueError, "hidden has 8 features but weight has 9 columns"),
    "flat weight": ({"weight": torch.randn(8)}, ValueError, r"weight must be \[V, H\], got shape \[8\]"),
    "empty weight": ({"weight": torch.empty(0)}, ValueError, r"weight is empty.*ZeRO-3.*a head derived from nn.Linear"),
    "meta weight": ({"weight": torch.empty(20, 8, device="meta")}, ValueError, "meta device"),
    "mixed dtypes": ({"weight": WEIGHT.bfloat16()}, TypeError, "weight is torch.bfloat16 but hidden is torch.float32"),
    "bias of another shape": ({"bias": torch.zeros(8)}, ValueError, r"bias must be \[20\].*got shape \[8\]"),
    "bias of another dtype": ({"bias": torch.zeros(20).double()}, TypeError, "bias is torch.float64"),
    "negative beta": ({"beta": -0.1}, ValueError, "beta must be finite and not negative, got -0.1"),
    "nan beta": ({"beta": float("nan")}, ValueError, "beta must be finite"),
    "beta a string": ({"beta": "0.1"}, TypeError, "beta must be a number, got str"),
    "infinite nll weight": ({"nll_weight": float("inf")}, ValueError, "nll_weight must be finite"),
    "zero scale": ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and positive, got 0.0"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap must be finite and positive, or None"),
    "unknown reduction": ({"nll_reduction": "sum"}, ValueError, "'token' or 'sequence', got 'sum'"),
    "unknown backend": ({"backend": "cuda"}, ValueError, r"must be 'auto' or one of \['torch', 'triton'\], got 'cuda'"),
    "no workspace": ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be a positive number of bytes"),
    "no backend": ({"backend": None}, ValueError, r"must be 'auto' or one of.*got None: or pass a Backend of your own"),
    "endless beta": ({"beta": 10**400}, ValueError, "beta must be finite and not negative, got inf"),
    "a module for its weight": ({"weight": torch.nn.Linear(8, 20)}, TypeError, "got Linear: pass its .weight"),
    "beta a tensor": ({"beta": torch.tensor(0.1)}, TypeError, r"beta must be a number, got a tensor.*float\(beta\)"),
    "scale a parameter": (
        {"logit_scale": torch.nn.Parameter(torch.ones(()))},
        TypeError,
        "logit_scale must be a number, got a tensor, whose gradient would be lost.*multiply hidden by it",
    ),
    "softcap a string": ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    "scale a string": ({"logit_scale": "1"}, TypeError, "logit_scale must be a number, got str"),
    "ignore index a float": ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, as -100, got float"),
    "workspace a float": ({"workspace_bytes": 1e9}, ValueError, "workspace_bytes must be a positive number of bytes"),
    "sparse hidden": ({"hidden": HIDDEN.to_sparse()}, TypeError, "hidden must be a dense, strided tensor.*to_dense"),
    "nested hidden": (
        {"hidden": torch.nested.nested_tensor([HIDDEN[0], HIDDEN[1]])},
        TypeError,
        "hidden is a nested tensor: pass the packed form, with cu_seqlens",
    ),
    "mkldnn weight": ({"weight": WEIGHT.to_mkldnn()}, TypeError, "weight must be a dense, strided tensor"),
    "meta hidden": ({"hidden": HIDDEN.to("meta")}, ValueError, "hidden is on the meta device"),
    "offsets for padded": ({"cu_seqlens": torch.tensor([0, 3, 6])}, ValueError, "with cu_seqlens hidden must be"),
}  # fmt: skip

PACKED: dict[str, tuple[Any, type[Exception], str]] = {
    "one sequence": (torch.tensor([0, 6]), ValueError, r"cu_seqlens must be \[2P \+ 1\].*got shape \[2\]"),
    "odd sequences": (torch.tensor([0, 2, 4, 6]), ValueError, "every chosen sequence its rejected one"),
    "does not start at 0": (torch.tensor([1, 3, 6]), ValueError, "must rise from 0 to the 6 rows"),
    "does not end at N": (torch.tensor([0, 3, 5]), ValueError, "must rise from 0 to the 6 rows"),
    "falls": (torch.tensor([0, 7, 6]), ValueError, "must rise"),
    "floats": (torch.tensor([0.0, 3.0, 6.0]), TypeError, "integer tensor of offsets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, error, message = BAD[case]
    for function in (orpo_loss, explain):
        with pytest.raises(error, match=message):
            function(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **arguments})


@pytest.mark.parametrize("case", PACKED)
def test_bad_offsets(case: str) -> None:
    offsets, error, message = PACKED[case]
    with pytest.raises(error, match=message):
        orpo_loss(HIDDEN[0], WEIGHT, LABELS[0], cu_seqlens=offsets)


@pytest.mark.parametrize("case", ["unshifted labels", "label too large", "transposed weight", "mixed dtypes"])
def test_bad_input_of_linear_logprobs(case: str) -> None:
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_logprobs(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **arguments})


def test_sharded_weight_is_refused() -> None:
    class Sharded(torch.nn.Parameter):  # what a DTensor is known by, without a process group
        def full_tensor(self) -> torch.Tensor:
            return self.data

    with pytest.raises(ValueError, match=r"weight is a sharded DTensor.*full_tensor\(grad_placements"):
        orpo_loss(HIDDEN, Sharded(WEIGHT), LABELS)


def test_a_weight_whose_memory_is_gone_is_refused() -> None:
    """As one is that was kept from inside a forward of FSDP: reading it would be reading anything."""
    weight = WEIGHT.clone()
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"weight has no memory any more.*in the forward of the module that owns"):
        orpo_loss(HIDDEN, weight, LABELS)


def test_a_module_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="nll_reduction must be 'token' or 'sequence', got 'mean'"):
        OrpoLoss(nll_reduction="mean")
    with pytest.raises(ValueError, match="softcap must be finite and positive"):
        OrpoLoss(softcap=0.0)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        OrpoLoss(backend="tritn")
    with pytest.raises(TypeError, match=r"OrpoLoss takes beta, .*; got alpha"):
        OrpoLoss(alpha=0.1)


def test_a_single_position_has_a_log_probability() -> None:
    weight, hidden = WEIGHT.double(), HIDDEN[0, 0].double()
    found = linear_logprobs(hidden, weight, torch.tensor(3))
    torch.testing.assert_close(found, torch.log_softmax(hidden @ weight.T, -1)[3])
    with pytest.raises(ValueError, match=r"hidden must be \[..., H\], got shape \[\]"):
        linear_logprobs(hidden.sum(), weight, torch.tensor(3))
