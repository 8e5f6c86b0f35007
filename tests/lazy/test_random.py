"""Random strings of operations on lazy logits against the same on stock ones, and the examples that have failed."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels.integrations.lazy.stand_in import LazyLogits
from tests.lazy.programs import REFUSALS, SETTINGS, Both, Setting, check

EXAMPLES = int(os.environ.get("ORPO_KERNELS_RANDOM_EXAMPLES", "300"))


class Writer:
    """Draws lines that fit the tensors there are."""

    def __init__(self, draw: Callable[..., Any], both: Both) -> None:
        self.draw, self.both, self.count = draw, both, 0

    def one_of(self, *items: Any) -> Any:
        return self.draw(st.sampled_from(items))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def seed(self) -> int:
        return self.number(0, 20)

    def tensor(self) -> tuple[str, Tensor]:
        """A variable with its stock value; stand-ins are likelier."""
        floats = [
            name
            for name, x in self.both.of_stock.items()
            if isinstance(x, Tensor) and x.is_floating_point() and name in self.both.of_lazy
        ]
        lazies = [name for name in floats if isinstance(self.both.of_lazy[name], LazyLogits)]
        name = self.one_of(*(lazies[::-1] if lazies and self.number(0, 7) else floats[::-1]))
        return name, self.both.of_stock[name]

    def dim(self, x: Tensor, last: bool = True) -> int:
        return self.number(-x.dim() if last else 0, x.dim() - (1 if last else 2)) if x.dim() > (not last) else 0

    # Each gives an expression, or None where nothing fits.

    def index(self, name: str, x: Tensor) -> str | None:
        items, at = [], 0
        lead = x.shape[:-1]
        some = self.number(0, len(lead))
        for at, size in enumerate(max(size, 1) for size in lead[:some]):
            kind = self.one_of("slice", "int", "none", "list", "mask", "step", "tensor", "flags", "zero")
            if kind in ("slice", "step"):
                a, b = self.one_of("", 0, 1, -1, -2), self.one_of("", 1, 2, -1)
                items.append(f"{a}:{b}" + (":2" if kind == "step" else ""))
            elif kind in ("int", "zero"):
                items.append(
                    str(self.number(-size, size - 1)) if kind == "int" else f"torch.tensor({self.number(0, size - 1)})"
                )
            elif kind == "none":
                items += ["None", ":"]
            elif kind in ("list", "tensor"):
                items.append(str([self.number(-size, size - 1) for _ in range(self.number(1, 3))]))
                items[-1] = f"torch.tensor({items[-1]})" if kind == "tensor" else items[-1]
            elif kind == "flags":
                items.append(str([bool(self.number(0, 1)) for _ in range(size)]))
            elif at + 1 == some:
                items.append(f"flags({self.seed()}, *{name}.shape[{at}:{len(lead)}])")
            else:
                items.append(":")
        end = self.one_of("", "", "", "...", "to", "to", "from", "id", "ids", "none", "whole", "labels", "step")
        width = max(x.shape[-1], 1)
        if end == "labels" and len(lead) == 1:
            return f"{name}[torch.arange({lead[0]}), ids({self.seed()}, {width}, {lead[0]})]"
        if end:
            items.append("...")
        ends = {
            "to": f":{self.number(1, width)}",
            "from": f"{self.number(0, width - 1)}:",
            "id": str(self.number(-width, width - 1)),
            "ids": f"ids({self.seed()}, {width}, {self.number(1, 4)})",
            "none": "None",
            "whole": ":",
            "step": "::2",
        }
        if end in ends:
            items.append(ends[end])
        return f"{name}[{', '.join(items)}]" if items else None

    def view(self, name: str, x: Tensor) -> str | None:
        v, dims = name, x.dim()
        d, e = self.dim(x), self.dim(x)
        size = max(x.shape[d], 1)
        piece = self.number(1, size)
        width = x.shape[-1]
        return self.one_of(
            f"{v}.view(-1, {width})",
            f"{v}.reshape(-1, {v}.size(-1))",
            f"{v}.reshape(-1)",
            f"torch.reshape({v}, {(1, *x.shape)})",
            f"{v}.view({', '.join(map(str, (*x.shape[:-1], 1, -1)))})",
            f"{v}.view({', '.join(map(str, (*x.shape[:-1], -1)))})",
            f"{v}.view(*{v}.shape)",
            f"{v}.flatten({d}, {e})",
            f"torch.flatten({v}, end_dim=-2)",
            f"{v}.flatten(0, -2)",
            f"{v}.squeeze({d})",
            f"{v}.squeeze()",
            f"{v}.unsqueeze({self.number(-dims - 1, dims)})",
            f"{v}.transpose({d}, {e})",
            f"{v}.transpose(0, {min(1, dims - 1)})",
            f"{v}.permute({', '.join(map(str, self.draw(st.permutations(range(dims)))))})",
            f"{v}.mT",
            f"{v}.T",
            f"{v}.movedim({d}, {e})",
            f"{v}.chunk({piece}, dim={d})[0]",
            f"{v}.chunk(2)[-1]",
            f"{v}.split({piece}, dim={d})[-1]",
            f"torch.split({v}, {[piece, size - piece]}, {d})[0]",
            f"{v}.tensor_split({piece}, dim={d})[-1]",
            f"{v}.unbind({d})[{self.number(-size, size - 1)}]",
            f"list({v})[-1]",
            f"torch.stack([row * 2 for row in {v}])",
            f"{v}.narrow({d}, {size - piece}, {piece})",
            f"{v}.select({d}, {self.number(-size, size - 1)})",
            f"{v}.index_select({d}, ids({self.seed()}, {size}, {self.number(1, 4)}))",
            f"torch.swapaxes({v}, {d}, {e})",
            f"{v}.expand(2, *{v}.shape)",
        )

    def copied(self, name: str, x: Tensor) -> str | None:
        v = name
        return self.one_of(
            f"{v}.contiguous()",
            f"{v}.clone()",
            f"{v}.detach()",
            f"{v}.double()",
            f"{v}.to(torch.float64)",
            f"{v}.float()",
            f"{v}.to(z)",
            f"{v}.to('cpu', torch.float32)",
            f"{v}.type(torch.float64)",
            f"{v}.nan_to_num()",
            f"{v}.data.clone()",
            f"{v}.cpu()",
            f"{v}.bfloat16()",
            f"{v}.clamp(min=torch.finfo({v}.dtype).min)",
            f"{v}.to(torch.float64, copy=True)",
        )

    def rows(self, name: str, x: Tensor) -> str:
        dtype = self.one_of("", "", ", dtype=torch.float32")
        return f"positive({self.seed()}, *{name}.shape[:-1], 1{dtype})"

    def scaled(self, name: str, x: Tensor) -> str | None:
        v = name
        other = self.tensor()[0]
        return self.one_of(
            f"{v} * 0.7",
            f"{v} / 1.3",
            f"0.5 * {v}",
            f"{v} * 2",
            f"{v} * torch.tensor(0.8)",
            f"{v} / torch.tensor(2)",
            f"torch.mul({v}, 1.5)",
            f"torch.div({v}, 3)",
            f"{v} * torch.tensor([[0.9]])",
            f"-{v}",
            f"{v} * -0.5",
            f"{v} * 0",
            f"{v} * numbers({self.seed()}, {v}.shape[-1])",
            f"{v} * {self.rows(name, x)}",
            f"{v} / {self.rows(name, x)}",
            f"{v} / positive({self.seed()}, {v}.shape[0], *[1] * ({v}.dim() - 1))",
            f"torch.tanh({v} / 2.0) * 2.0",
            f"torch.tanh({v})",
            f"{v} + numbers({self.seed()}, {v}.shape[-1])",
            f"{v} + numbers({self.seed()}, {v}.shape[-1]).float()",
            f"numbers({self.seed()}, 1, {v}.shape[-1]) + {v}",
            f"{v} + masked({self.seed()}, {v}.shape[-1])",
            f"{v} + 1.0",
            f"{v} - 0.5",
            f"{v} + {other}",
            f"{v} - {other}",
            f"{v} * {other}",
            f"{v} / {v}.shape[-1]",
        )

    def distribution(self, name: str, x: Tensor) -> str | None:
        v = name
        some = [
            f"{v}.log_softmax(-1)",
            f"F.log_softmax({v}, dim=-1)",
            f"F.log_softmax({v}, dim={self.dim(x)})",
            f"torch.softmax({v}, -1)",
            f"{v}.softmax(dim=-1, dtype=torch.float64)",
            f"{v} - {v}.logsumexp(-1, keepdim=True)",
            f"{v} - torch.logsumexp({v}, dim=-1, keepdim=True)",
            f"torch.exp({v}.log_softmax(-1))",
            f"{v}.softmax(-1) * {v}.log_softmax(-1)",
            f"{v}.softmax(-1) * {v}",
        ]
        if x.numel() and x.detach().max() < 5:
            some.append(f"{v}.exp()")
        if x.numel() and x.detach().min() > 1e-6:
            some.append(f"{v}.log()")
        return self.one_of(*some)

    def reduced(self, name: str, x: Tensor) -> str | None:
        v, width = name, max(x.shape[-1], 1)
        d, k, seed = self.dim(x), self.number(1, 3), self.seed()
        lead, other = f"*{v}.shape[:-1]", f"numbers({seed}, *{v}.shape)"
        targets = f"labels({seed}, {width}, *{v}.shape[:-1])"
        turned = f"{targets}.mT" if x.dim() > 3 else targets
        how = self.one_of("mean", "sum", "none")
        smoothing = self.one_of("", "", ", label_smoothing=0.1")
        keep = self.one_of(True, False)
        some = [
            f"{v}.gather(-1, ids({seed}, {width}, *{v}.shape[:-1], {k}))",
            f"torch.gather({v}, {v}.dim() - 1, ids({seed}, {width}, *{v}.shape[:-1]).unsqueeze(-1)).squeeze(-1)",
            f"{v}.gather({d}, ids({seed}, {max(x.shape[d], 1)}, *{v}.shape))",
            f"torch.take_along_dim({v}, ids({seed}, {width}, *{v}.shape[:-1], {k}), dim=-1)",
            f"F.cross_entropy({v}.reshape(-1, {width}), {targets}.reshape(-1), reduction='{how}'{smoothing})",
            f"F.cross_entropy({v}, {targets}, reduction='{how}'{smoothing})",
            f"F.cross_entropy({v}.flatten(0, -2), labels({seed}, {width}, {lead}, ignore=0).flatten(), ignore_index=0)",
            f"F.cross_entropy({v}.transpose(1, -1), {turned}, reduction='{how}'{smoothing})",
            f"F.nll_loss({v}.reshape(-1, {width}).log_softmax(-1), {targets}.reshape(-1), reduction='{how}')",
            f"F.nll_loss({v}, {targets}, reduction='{how}')",
            f"{v}.logsumexp(-1, keepdim={keep})",
            f"torch.logsumexp({v}, dim=-1)",
            f"(2.0 * {v}.log_softmax(-1)).logsumexp(-1)",
            f"{v}.sum(-1, keepdim={keep})",
            f"{v}.mean(dim=-1, keepdim={keep})",
            f"{v}.sum()",
            f"{v}.mean()",
            f"{v}.nansum()",
            f"{v}.sum(dtype=torch.float64)",
            f"{v}.mean(dim={tuple(range(x.dim()))})",
            f"-(torch.exp({v}.log_softmax(-1)) * {v}.log_softmax(-1)).sum(-1)",
            f"torch.logsumexp({v}, -1) - ({v}.softmax(-1) * {v}).sum(-1)",
            f"F.kl_div({v}.log_softmax(-1), numbers({seed}, *{v}.shape).softmax(-1), reduction='batchmean')",
            f"F.kl_div({v}.log_softmax(-1), {other}.log_softmax(-1), reduction='{how}', log_target=True)",
            f"F.kl_div({v}, numbers({seed}, *{v}.shape).softmax(-1), reduction='{how}')",
            f"torch.no_grad()(lambda: {v}.logsumexp(-1))()",
            f"torch.no_grad()(lambda: -({v}.softmax(-1) * {v}.log_softmax(-1)).sum(-1))()",
            f"{v}.detach().mean()",
            f"{v}.gather(-1, ids({seed}, {width}, 2, *{v}.shape[1:-1], 1))",
            f"{v}.gather(-1, ids({seed}, {width}, *{v}.shape[:-1], 2).int())",
            f"{v}.gather(-1, ids({seed}, {width + 1}, *{v}.shape[:-1], 2))",
            f"{v}.sum(dim=None, keepdim={keep})",
            f"torch.sum(input={v}, dim=[-1], keepdim={keep})",
            f"{v}.mean((-2, -1), keepdim={keep})",
            f"{v}.sum(({d},), dtype=torch.float32)",
            f"F.cross_entropy({v}.reshape(-1, {width}), {targets}.reshape(-1).int())",
            f"F.cross_entropy({v}.reshape(-1, {width}), ids({seed}, {width + 1}, {v}[..., 0].numel()))",
            f"F.cross_entropy({v}.reshape(-1, {width}), {targets}.reshape(-1), weight=positive({seed}, {width}))",
            f"F.cross_entropy(input={v}.reshape(-1, {width}), target={targets}.reshape(-1))",
            f"F.cross_entropy({v}, {v}.detach().softmax(-1))",
            f"F.log_softmax({v}, -1, dtype=torch.float32)",
            f"torch.logsumexp({v}, dim=(0, -1), keepdim={keep})",
            f"torch.logsumexp(input={v}, dim=[-1], keepdim={keep})",
            f"(lambda lse: ({v} - lse.mul_(2)).logsumexp(-1))({v}.logsumexp(-1, keepdim=True))",
            f"(lambda lse: ({v} - lse).gather(-1, ids({seed}, {width}, *{v}.shape[:-1], 1)))({v}.logsumexp(-1, True))",
            f"{v}.logsumexp(-1) ** 2",
            f"{v}.narrow(-1, 0, {k}).sum(-1)",
            f"{v}.topk({width + 1})[0]",
            f"{v}.max()",
            f"{v}.min(-1)[0]",
            f"torch.max({v}, {v} * 0.5)",
        ]
        if x.dtype.itemsize == 8 and not (x.detach() == 0).any():
            some += [
                f"{v}.argmax(-1, keepdim={keep})",
                f"torch.argmax({v}, dim=-1)",
                f"{v}.max(-1, keepdim={keep})[0]",
                f"{v}.max(dim=-1).indices",
                f"{v}.amax(dim=-1)",
                f"{v}.topk({k}, dim=-1)[0]",
                f"{v}.topk({k})[1]",
                f"torch.topk({v}, {k}, largest={keep}).values",
                f"{v}.softmax(-1).max(-1)[0]",
            ]
        return self.one_of(*some)

    def unknown(self, name: str, x: Tensor) -> str | None:
        v, d = name, self.dim(x)
        return self.one_of(
            f"{v}.sort(-1)[0]",
            f"{v}.pow(2)",
            f"{v}.cumsum({d})",
            f"{v}.abs()",
            f"torch.cat([{v}, {v}], {d})",
            f"torch.cat([{v}, {self.tensor()[0]}], -1)",
            f"torch.where({v} > 0.1, {v}, 0.5)",
            f"{v}.clamp(min=-1.0)",
            f"{v}.sum({d})",
            f"{v}.mean(dim=0)",
            f"{v}.amin({d})",
            f"{v}.norm(dim=-1)",
            f"{v}.roll(1, {d})",
            f"{v}.masked_fill({v} > 1, 0.25)",
            f"{v} @ numbers({self.seed()}, {v}.shape[-1], 2)",
            f"{v} > 0.3",
            f"{v} == {v}",
            f"({v} != {v}).any()",
            f"torch.isnan({v}).any()",
            f"F.dropout({v}, 0.0)",
            f"torch.zeros_like({v})",
            f"{v}.new_zeros(2)",
            f"float({v}.sum())",
            f"{v}.sum().item()",
            f"{v}.shape",
            f"{v}.is_contiguous()",
            f"len({v})",
            f"{v}.squeeze(0).is_contiguous()",
            f"{v}.unfold({d}, 1, 1)",
            f"{v}.diff(dim=-1)",
            f"{v}.detach().requires_grad_()",
            f"hooked({v})",
            f"{v}.retain_grad()",
            f"{v}[{x.shape[0]}]",
            f"{v}[..., {x.shape[-1]}]",
            f"{v}.nosuch",
        )

    def in_place(self, name: str, x: Tensor) -> str | None:
        v, seed = name, self.seed()
        size, width = max(x.shape[0], 1), max(x.shape[-1], 1)
        return self.one_of(
            f"{v}.mul_(0.5)",
            f"{v}.div_(1.7)",
            f"{v} *= 1.3",
            f"{v} /= 0.8",
            f"{v} /= torch.tensor(0.9)",
            f"{v}[0].mul_(0.6)",
            f"{v}[..., :{self.number(1, width)}].mul_(2)",
            f"{v}[..., {self.number(0, width - 1)}:].mul_(2)",
            f"{v}[-1] *= 0.5",
            f"{v}.mul_({self.rows(name, x)})",
            f"{v}.div_({self.rows(name, x)})",
            f"{v}.masked_fill_(flags({seed}, *{v}.shape), 0.1)",
            f"{v}.add_(1)",
            f"{v}[..., {self.number(0, width - 1)}] = 0.5",
            f"{v}[{self.number(0, size - 1)}] = 0.25",
            f"{v}.tanh_()",
            f"{v}.neg_()",
            f"{v}.zero_()",
            f"{v}.mul_(-1)",
            f"{v}.copy_({v} * 2)",
            f"{v} += numbers({seed}, {v}.shape[-1])",
            f"{v}.clamp_(max=1.0)",
            f"torch.no_grad()(lambda: {v}.mul_(0.4))()",
        )

    def line(self) -> str | None:
        kind = self.one_of(
            *["index"] * 4, *["view"] * 4, *["reduced"] * 7, *["scaled"] * 4, *["distribution"] * 3,
            *["copied"] * 2, *["in_place"] * 2, *["unknown"] * 2,
        )  # fmt: skip
        name, x = self.tensor()
        if x.dim() == 0:
            return None
        expression = getattr(self, kind)(name, x)
        if expression is None or kind == "in_place":
            return expression
        self.count += 1
        return f"v{self.count} = {expression}"


def test_programs_agree() -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="ORPO_KERNELS_RANDOM_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data(), SETTINGS, st.integers(1, 12), st.integers(0, 5), st.integers(1, 2))
    def run(data: Any, setting: Setting, length: int, seed: int, parts: int) -> None:
        both = Both(setting, counts)
        counts["programs"] += 1
        writer = Writer(data.draw, both)
        for _ in range(length):
            line = writer.line()
            if line is not None:
                both.run(line)
        both.finish(seed, parts)

    run()
    assert counts["refused"] < counts["lines"] / 20
    assert counts["gradients"] > counts["programs"]


PLAIN, BIASED, ONE, COLUMN = Setting(), Setting(bias=True), Setting(lead=(1, 4)), Setting(lead=(3, 1))
FAILED = {
    "a change in place of what has a gradient": (PLAIN, "z.masked_fill_(flags(6, *z.shape), 0.1)"),
    "an assignment": (PLAIN, "z[0] = 0.25"),
    "a part scaled in place": (BIASED, "v1 = z.to(torch.float64)\nv1[0].mul_(0.6)"),
    "a part of softcapped logits scaled in place": (PLAIN, "v1 = torch.tanh(z)\nv1[0].mul_(0.6)"),
    "a part scaled by assignment": (PLAIN, "z[-1] *= 0.5\nv1 = z.logsumexp(-1)"),
    "some tokens scaled in place": (PLAIN, "v1 = z[..., 7:]\nz.mul_(2)\nv2 = z.logsumexp(-1)"),
    "some tokens scaled in place through a view": (PLAIN, "z[..., 8:].mul_(2)\nv1 = z.mean(-1)"),
    "the first tokens scaled in place": (PLAIN, "v1 = z[..., :11]\nv1.mul_(2)\nv2 = v1.logsumexp(-1)"),
    "one token's logits changed in place": (PLAIN, "z[..., 3] -= 5\nv1 = z.logsumexp(-1)"),
    "one token's logits filled": (PLAIN, "v1 = z[:, -1, 3]\nv1.fill_(-9)\nv2 = z.logsumexp(-1)"),
    "one token's logits filled without a name": (PLAIN, "z[..., 3].fill_(-9)\nv2 = z.logsumexp(-1)"),
    "one token's logits scaled without a name": (PLAIN, "z[..., 3].mul_(2)\nv2 = z.logsumexp(-1)"),
    "one token's logits follow": (PLAIN, "v5 = z[..., 7]\nz.neg_()\nv6 = v5 * 2"),
    "one token's logits follow a scale": (PLAIN, "v5 = z[..., 7]\nz.div_(2)\nv6 = v5 * 2"),
    "copies of a row are no memory of it": (PLAIN, "v1 = z[[0, 0]]\nv1[0].mul_(0.5)\nv2 = v1.logsumexp(-1)"),
    "a scale of what has no gradient": (PLAIN, "v2 = z.detach()\nv6 = z.reshape(-1)\nv2 *= 1.3"),
    "a scale under no_grad": (PLAIN, "torch.no_grad()(lambda: z.mul_(0.4))()\nv1 = z.log_softmax(-1)"),
    "a finite copy changed in place": (PLAIN, "v2 = z.nan_to_num()\nv2.add_(1)"),
    "a clamped copy changed in place": (
        PLAIN,
        "v1 = z.clamp(min=torch.finfo(z.dtype).min)\nv1.mul_(positive(1, *v1.shape[:-1], 1))",
    ),
    "a result changed in place": (PLAIN, "v1 = z.mean(dim=-1)\nv1.div_(1.7)"),
    "a log-sum-exp changed in place": (
        PLAIN,
        "v1 = z.logsumexp(-1, keepdim=True)\nv1.div_(1.7)\nv2 = z - v1\nv3 = v2.logsumexp(-1)",
    ),
    "a float32 number divides": (PLAIN, "z /= torch.tensor(0.9)"),
    "float32 numbers of rows divide": (PLAIN, "v1 = z / positive(1, *z.shape[:-1], 1, dtype=torch.float32)"),
    "a float32 bias of scaled logits": (PLAIN, "v1 = z * 0.8\nv2 = v1 + numbers(3, 12).float()"),
    "T reverses": (PLAIN, "v1 = z.T\nv2 = v1.mul_(0.5)"),
    "a view of what lies elsewhere": (PLAIN, "v1 = z.transpose(0, 1)\nv2 = v1.contiguous().view(-1, 12)"),
    "contiguous with the vocabulary in the middle": (
        PLAIN,
        "v1 = z.transpose(1, 2).contiguous()\nv2 = v1.is_contiguous()\nv3 = v1.view(-1, 3)\nv4 = v1.view(-1)",
    ),
    "contiguous of some tokens": (
        PLAIN,
        "v1 = z[..., :5]\nv2 = v1.is_contiguous()\nv3 = v1.contiguous()\nv3.mul_(2)\nv4 = v1.logsumexp(-1)",
    ),
    "a hook on what was changed": (PLAIN, "v1 = z * 1.5\nv1.mul_(-1)\nv2 = v1.register_hook(lambda g: g * 0.5)"),
    "no entry of p log p": (PLAIN, "v1 = z.softmax(-1) * z.log_softmax(-1)\nv2 = v1[..., 3]"),
    "a token's logits at a tensor's row": (PLAIN, "v1 = z[torch.tensor(0), ..., -9]\nv1[..., 0] = 0.5\nv2 = z.sum(-1)"),
    "what has a token's logits given out bends": (PLAIN, "v1 = z[..., -10]\nz.tanh_()\nv2 = v1 * 2"),
    "a probability changed in place": (
        PLAIN,
        "v1 = torch.exp(z.log_softmax(-1))\nv2 = v1.gather(-1, ids(16, 12, 2, 3, 1))\nv2.div_(1.7)",
    ),
    "a transposed tensor keeps its layout": (
        PLAIN,
        "v1 = z.transpose(0, 1)\nv2 = v1.abs().is_contiguous()\nv3 = v1.abs().view(-1)",
    ),
    "tokens counted from the end": (PLAIN, "v1 = torch.take_along_dim(z, -1 - ids(1, 12, 2, 3, 1), dim=-1)"),
    "the entropy of nothing": (
        PLAIN,
        "v1 = z[:0]\nv2 = -(v1.softmax(-1) * v1.log_softmax(-1)).sum(-1)\nv3 = v1.argmax(-1)\nv4 = v1.max(-1)[0]",
    ),
    "flatten backwards": (PLAIN, "v1 = z.flatten(-2, 0)"),
    "flatten one dimension": (PLAIN, "v1 = z.flatten(-3, -3)"),
    "a view of nothing": (PLAIN, "v1 = z[-1:1, [0, -1], ...]\nv2 = v1.view(0, 2, 1, -1)"),
    "an entry of one row": (COLUMN, "v1 = z[0, 0, ..., 8]\nv2 = z[0, torch.tensor(0), -12]"),
    "no entry there": (PLAIN, "v1 = z[[False, False]]\nv2 = v1[..., 15]"),
    "gather of more rows than there are": (ONE, "v1 = z.gather(-1, ids(4, 12, 2, 4, 1))"),
    "gather at int32": (PLAIN, "v1 = z.gather(-1, ids(6, 12, 2, 3, 2).int())"),
    "a sum that keeps every dimension": (PLAIN, "v1 = z.sum(dim=None, keepdim=True)"),
    "kl_div of two dtypes": (
        PLAIN,
        "v1 = z.float()\nv2 = F.kl_div(v1.log_softmax(-1), numbers(0, *z.shape).softmax(-1), reduction='sum')",
    ),
    "kl_div of nothing": (
        PLAIN,
        "v1 = z[:0]\nv2 = F.kl_div(v1.log_softmax(-1), numbers(0, *v1.shape).softmax(-1), reduction='sum')",
    ),
}


@pytest.mark.parametrize("name", FAILED)
def test_what_failed_before(name: str) -> None:
    both = check(*FAILED[name])
    assert not both.counts["refused"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("v1 = z[0]\nz.add_(1)\nv2 = v1.sum()", REFUSALS[0]),
        ("v1 = z[0]\nv2 = v1[..., 3:]\nz.add_(1)", REFUSALS[2]),
        ("z[0][..., 3].fill_(-9)\nv2 = z.sum()", REFUSALS[1]),
    ],
)
def test_refusals_name_what_happened(lines: str, message: str) -> None:
    both = Both(PLAIN)
    for line in lines.split("\n")[:-1]:
        both.run(line)
    last = lines.split("\n")[-1]
    exec(last, both.of_stock)
    with pytest.raises(RuntimeError, match=f"orpo_kernels.*{re.escape(message)}"):
        exec(last, both.of_lazy)
