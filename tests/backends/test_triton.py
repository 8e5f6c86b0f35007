"""The Triton backend: its forms and tiles, its own code paths, and what a chip that is not there would run.

Without a GPU the kernels run in Triton's interpreter; the accuracy and finiteness of every plan are tested with those
of the torch backend, in test_accuracy.py and test_finite.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lab.compile import Recorder, recording
from orpo_kernels import explain, orpo_loss, targets
from orpo_kernels.backends import PAIR_ROWS, Found, GivenPairs, kernels, products, select, triton_backend
from orpo_kernels.backends.kernels.configs import Config, Tile, config, gluon_lacks
from orpo_kernels.backends.torch_backend import TorchBackend
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.objectives import ORPO
from orpo_kernels.settings import Head
from orpo_kernels.targets import ANSWER, NLL, Pairs, Sizes, Targets, label_sizes
from tests.cases import DEVICE, TRITON_DTYPES, Case, LargestTensor, check, make

ROOT = Path(__file__).parents[2]


def small_chunks() -> Any:
    """Chunks, slices and columns so small that small inputs have many of each."""
    return mock.patch.multiple(
        triton_backend, CHUNK_ROWS=8, STREAM_ROWS=8, SLICE_TOKENS=32, PRODUCT_COLUMNS=16, LIBRARY_TILE=4096
    )


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 3),
    length=st.integers(1, 9),
    features=st.integers(1, 50),
    vocab=st.integers(2, 300),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
    workspace=st.sampled_from([None, 1, 20_000]),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
    form=st.sampled_from(["tma", "pointer", "library"]),
)
@pytest.mark.filterwarnings("ignore:.*an answer without a token")
@pytest.mark.slow
def test_any_shape_in_any_form(
    pairs: int,
    length: int,
    features: int,
    vocab: int,
    keep: float,
    seed: int,
    workspace: int | None,
    softcap: float | None,
    bias: bool,
    form: Any,
) -> None:
    case = make(
        torch.float32,
        pairs=pairs,
        length=length,
        features=features,
        vocab=vocab,
        keep=keep,
        seed=seed,
        softcap=softcap,
        bias=bias,
    )
    tile = Tile(64, 64, 32, stages=2, group_v=2, parts=2)  # float32 operands of the shipped tiles fit no chip
    on_chip = Config(form, tile, tile, tile, tile)
    asked = on_chip if DEVICE.type == "cuda" else config("interpreter", torch.float32)._replace(form=form)
    with (
        small_chunks(),
        mock.patch.object(TritonBackend, "least_scratch", 0),
        mock.patch.object(triton_backend, "config", return_value=asked),
    ):
        check(case, backend="triton", workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("features", [64, 37])
@pytest.mark.slow
def test_overflowed_rows_in_a_later_slice(dtype: torch.dtype, workspace: int | None, features: int) -> None:
    """The best logit stands in the last slice, after the sums and products of earlier ones were formed."""
    case = make(dtype, features=features, vocab=200, keep=1.0)
    with torch.no_grad():
        case.hidden[..., 0] = 1.0
        case.weight[:, 0] = 0.0
        case.weight[190, 0] = 120.0
        case.weight[70, 0] = 100.0
        case.labels[(case.labels == 190) | (case.labels == 70)] = 8
        case.labels[0, 0] = 190
    case.backend = "triton"
    with small_chunks(), mock.patch.object(TritonBackend, "least_scratch", 0):
        check(case, workspace_bytes=workspace)
        case.weight.requires_grad_(False)
        check(case, workspace_bytes=workspace)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's row of the table; no GPU takes it")
@pytest.mark.parametrize("workspace", [None, 1])
def test_no_tensor_map_larger_than_a_chip_describes_rightly(workspace: int | None) -> None:
    """E goes chunk by chunk of rows then, and a head that is too large takes another form."""
    case, described = make(torch.float32, pairs=3, features=16, vocab=100), []
    most = 1 + 20 * 128 * 4  # 20 rows of E, in whole chunks of 8: two of them
    own = TritonBackend(config=config("interpreter", torch.float32)._replace(mapped=most))
    gemm = kernels.exp_gemm.exp_gemm_tma

    def watched(tile: Tile, chunk: Any, tokens: slice, out: Any) -> None:
        described.append(out.exp_logits.shape[0])
        gemm(tile, chunk, tokens, out)

    with small_chunks(), mock.patch.object(kernels.exp_gemm, "exp_gemm_tma", watched):
        check(case, backend=own, workspace_bytes=workspace)
    assert len(described) > 1
    assert max(described) <= 16
    large = config("sm_100", torch.bfloat16)._replace(mapped=16 * 100 * 2)
    said = TritonBackend(config=large).form(case.hidden.bfloat16(), Head(case.weight.bfloat16()))
    assert "form pointer" in said
    assert "more than the form tma describes on this chip" in said


def test_biases_that_are_views() -> None:
    case = make(torch.float32, features=32, vocab=100)
    for bias in (torch.randn(100, 2, device=DEVICE)[:, 0], torch.tensor([0.5], device=DEVICE).expand(100)):
        check(Case(case.hidden, case.weight, case.labels, bias.requires_grad_(), backend="triton"))


def test_views_and_transposed_weights() -> None:
    case = make(torch.float32, features=32, vocab=100)
    wide = torch.randn(100, 80, device=DEVICE)
    turned = torch.randn(32, 100, device=DEVICE)
    spread = torch.randn(4, 9, 64, device=DEVICE)
    for weight in (wide[:, 3:35], wide[:, 16:48], turned.T):
        for hidden in (spread[..., ::2], spread[..., 5:37]):
            view = Case(hidden.requires_grad_(), weight.requires_grad_(), case.labels, backend="triton")
            check(view)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.slow
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    case = make(dtype, pairs=3, length=20, features=64, vocab=300, keep=1.0, bias=True)
    case.backend = "triton"
    first, again = ((case.grads(case.ours().loss), case.ours()) for _ in range(2))
    for name, grad in first[0].items():
        assert torch.equal(grad, again[0][name])
    for mine, theirs in zip(first[1], again[1], strict=True):
        assert torch.equal(mine, theirs)


def _pairs(lengths: list[int], generator: torch.Generator) -> Pairs:
    """Pairs of such lengths whose targets count in either way or in both."""
    n, half = sum(lengths), len(lengths) // 2
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    kind = torch.randint(1, 4, (n,), generator=generator).to(torch.int8)
    counts = torch.zeros(2 * half, 8, dtype=torch.int64)
    for place, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if place % 2:  # the rejected side has no NLL
            kind[begin:end] = 1
        row = counts[place // 2 + half * (place % 2)]
        row[0], row[1] = (kind[begin:end] & ANSWER > 0).sum(), (kind[begin:end] & NLL > 0).sum()
    sizes = Sizes(
        pairs=tuple(a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)),
        sides=(sum(lengths[::2]), sum(lengths[1::2])),
        valid=int(((counts[:half, 0] > 0) & (counts[half:, 0] > 0)).sum()),
        nll=int(counts[:, 1].sum()),
        nll_sequences=int((counts[:, 1] > 0).sum()),
        shared_rows=False,
        positions=n,
    )
    return Targets(offsets, offsets, sizes, kind.to(DEVICE), offsets.to(DEVICE), counts.to(DEVICE)).pairs(0, half, 0, n)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1200), min_size=1, max_size=4).flatmap(
        lambda half: st.lists(st.integers(0, 1200), min_size=len(half), max_size=len(half)).map(
            lambda other: [size for pair in zip(half, other, strict=True) for size in pair]
        )
    ),
    level=st.sampled_from([1e-9, 1e-5, 1e-2, 1.0, 30.0, 200.0]),
    by_sequence=st.booleans(),
    seed=st.integers(0, 100),
)
@example(lengths=[1200, 28], level=200.0, by_sequence=False, seed=28)  # means of -100 whose difference is 1
@pytest.mark.slow
def test_odds_ratio_kernel(lengths: list[int], level: float, by_sequence: bool, seed: int) -> None:
    """The one launch against the objective in float64, from certain to hopeless means, over groups of pairs."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logps = -level * torch.rand(n, generator=generator).to(DEVICE)
    means = torch.randn(n, generator=generator).to(DEVICE)
    every = _pairs(lengths, generator)
    whole = Targets(every.offsets, every.offsets, every.sizes, every.kind, every.offsets, every.counts)
    for first in (0, len(lengths) // 4):
        pairs = whole.pairs(first, len(lengths) // 2, sum(lengths[: 2 * first]), n)
        given = GivenPairs(ORPO(0.7), 0.5, by_sequence, True)
        part = slice(pairs.begin, n)
        truth = TorchBackend().pair_terms(Found(logps[part].double(), means[part].double(), None), pairs, given)
        found = Found(logps[part], means[part], None)
        naive, ours = (backend.pair_terms(found, pairs, given) for backend in (TorchBackend(), TritonBackend()))
        for name, mine, theirs, expected in zip(truth._fields, ours, naive, truth, strict=True):
            assert torch.isfinite(mine).all(), name
            error, allowed = (mine - expected).abs(), 2 * (theirs - expected).abs()
            # Both round sums and differences of float32 numbers of this size, row by row: the loss and its metrics are
            # differences of means, which are larger than they.
            size = expected.abs().amax(-1, keepdim=True) if expected.numel() else expected
            if name == "values":
                size[len(PAIR_ROWS) :].clamp_(min=level)
            assert (error <= allowed.clamp(min=3e-6 * (1.0 + size))).all(), name


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).map(lambda half: half + half[::-1]),
    ignore=st.sampled_from([-100, 0, 7]),
    seed=st.integers(0, 1000),
    keep=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
)
@example(lengths=[1, 1], ignore=-100, seed=2, keep=1.0)  # every label kept and positive
@pytest.mark.slow
def test_compaction(lengths: list[int], ignore: int, seed: int, keep: float) -> None:
    """The two launches give the targets of torch's sort, in its order, past a block and with two targets a row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length * (60 if seed % 5 == 0 else 1) for length in lengths]
    n = sum(lengths)
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(DEVICE)

    def labels() -> torch.Tensor:
        drawn = torch.randint(-2, 9, (n,), generator=generator)
        return drawn.masked_fill_(torch.rand(n, generator=generator) > keep, ignore).to(DEVICE)

    answers = labels()
    nll = torch.where(torch.rand(n, generator=generator).to(DEVICE) > 0.5, answers, labels())
    backend = TritonBackend()
    table = backend.count(answers, nll, offsets, ignore)
    expected = targets.count(answers, nll, offsets, ignore)
    assert torch.equal(table[:, :4], expected[:, :4])
    assert torch.equal(table[:, 4::2].amin(0), expected[:, 4::2].amin(0))
    assert torch.equal(table[:, 5::2].amax(0), expected[:, 5::2].amax(0))
    arguments = (answers, nll, offsets, table, int(table[:, 2:4].sum()), ignore)
    mine, theirs = backend.compact(*arguments), targets.compact(*arguments)
    for name, a, b in zip(theirs._fields, mine, theirs, strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype, name


@pytest.mark.slow
class CountOperations(TorchDispatchMode):
    """Operations of torch's that would start something on a device."""

    total = 0
    QUIET = ("view", "slice", "select", "t", "unbind", "detach", "empty", "empty_like", "new_empty", "_unsafe_view")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += func.__name__.split(".")[0] not in self.QUIET
        return func(*args, **(kwargs or {}))


def test_a_call_starts_few_operations() -> None:
    """What the host starts between two products is time in which a GPU idles: counted, as no GPU is needed for that."""
    hidden, weight = (
        torch.ones(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((4, 64, 256), (1024, 256))
    )
    launched: list[str] = []
    backend = Recorder(arch="sm_90")
    with (
        recording(lambda kernel, *_: launched.append(kernel.__name__)),
        mock.patch.object(Recorder, "least_scratch", 20 << 20),
        CountOperations() as torchs,
    ):
        labels = torch.ones(4, 64, dtype=torch.int64)
        orpo_loss(hidden, weight, labels, backend=backend).loss.backward()
    with CountOperations() as counting:  # what the recorder computes so that the host can read it
        table = targets.count(labels.view(-1), labels.view(-1), torch.arange(5) * 64, -100)
        targets.compact(labels.view(-1), labels.view(-1), torch.arange(5) * 64, table, 256, -100)
    assert len(launched) == 15
    assert torchs.total - counting.total <= 30


def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """The label's entry of the last row lands in its place in an E of more than 2^31 entries, in a sparse file."""
    vocab, n = 70_001, 30_720
    exp_logits = torch.from_file(str(tmp_path / "exps"), shared=True, size=n * vocab, dtype=torch.bfloat16).view(
        n, vocab
    )
    assert exp_logits.numel() > 2**31
    if DEVICE.type == "cuda":
        exp_logits = torch.zeros_like(exp_logits, device=DEVICE)
    last = slice(n - 200, n)
    ids = torch.arange(n, device=DEVICE) % vocab
    entry = torch.arange(n, dtype=torch.float32, device=DEVICE) % 251 + 1
    kernels.rows.label_entries(exp_logits, entry, ids, 0)
    found = exp_logits[last].gather(1, ids[last, None]).view(-1)
    assert torch.equal(found, entry[last].to(torch.bfloat16))


def test_empty_batches_of_scores() -> None:
    case = make(torch.float32, bias=True)
    case.backend = "triton"
    case.labels.fill_(-100)
    with pytest.warns(UserWarning, match="2 of 2 pairs"):
        loss = case.ours().loss
    for workspace in (None, 1):
        with pytest.warns(UserWarning, match="2 of 2 pairs"):
            loss = case.ours(workspace_bytes=workspace).loss
        assert loss.item() == 0
        assert all((grad == 0).all() for grad in case.grads(loss).values())


@pytest.mark.parametrize("trained", ["head", "hidden", "both"])
def test_scratch_stays_within_the_plan(trained: str) -> None:
    """A small workspace bounds the slices: nothing as large as E is ever allocated."""
    case = make(torch.float32, pairs=2, length=20, features=16, vocab=4000, keep=1.0)
    case.hidden.requires_grad_(trained != "head")
    case.weight.requires_grad_(trained != "hidden")
    exp_logits = 80 * 4000 * 4
    tile_in_cache = mock.patch.object(triton_backend, "LIBRARY_TILE", 0)  # it would hold all of this E
    with mock.patch.object(TritonBackend, "least_scratch", 0), tile_in_cache:
        arguments: dict[str, Any] = {"backend": "triton", "workspace_bytes": 1}
        plan = explain(case.hidden, case.weight, case.labels, **arguments)
        with LargestTensor() as seen:
            case.ours(**arguments).loss.backward()
    assert plan.name == ("frozen" if trained == "hidden" else "recompute")
    inputs = 4000 * 16 * 4  # the largest of them and of the gradients
    assert seen.largest <= max(inputs, plan.bytes)
    assert max(inputs, plan.bytes) < exp_logits


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what a machine without a GPU is told")
def test_refusals_say_why() -> None:
    backend = TritonBackend()
    assert "float64" in str(backend.refuses(DEVICE, torch.float64))
    assert "interpreter multiplies" in str(backend.refuses(DEVICE, torch.bfloat16))
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        assert "needs a CUDA or ROCm device" in str(backend.refuses(DEVICE, torch.float32))
    assert select("auto", DEVICE, torch.float32).name == "torch"
    case = make(torch.bfloat16)
    with pytest.raises(ValueError, match=r"no backend takes these inputs: triton: .*interpreter"):
        orpo_loss(case.hidden, case.weight, case.labels, backend="triton")


def test_capture_into_a_graph_is_refused_with_the_remedy() -> None:
    labels: Any = mock.Mock(device=torch.device("cuda"), shape=(4, 9))
    message = pytest.raises(RuntimeError, match=r"CUDA graph.*capture the model without the loss")
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True), message:
        label_sizes(labels, 10, -100)


def test_triton_is_imported_when_a_kernel_starts() -> None:
    code = (
        "import sys, torch, orpo_kernels\n"
        "orpo_kernels.orpo_loss(torch.ones(2, 1, 4), torch.ones(3, 4), torch.zeros(2, 1, dtype=torch.int64))\n"
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Of the GEMM's epilogue for an entry of E, as counted with triton 3.6 and 3.7: the least, as of a call without sums,
# and the most, without and with a softcap.
SM_90_INSTRUCTIONS = {
    "exp_gemm_tma_kernel": (4.0, {False: 6.5, True: 19.2}),
    "exp_gemm_gluon_kernel": (3.0, {False: 5.5, True: 18.3}),
}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_chip(tmp_path: Path) -> None:
    """No spills, shared memory within the chip's, tensor cores in every product, the widest where it matters, and no
    more instructions in the epilogue than were counted."""
    file = tmp_path / "compiled.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "compile", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(file.read_text())
    assert {row["target"] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100", "gfx942"}
    names = {name for module in ("exp_gemm", "exp_gemm_gluon", "rows", "pairs") for name in _kernels(module)}
    for target in {row["target"] for row in rows}:
        mine = [row for row in rows if row["target"] == target]
        # Chips without TMA, and all but Hopper.
        assert names - {row["kernel"] for row in mine} <= {"exp_gemm_tma_kernel", "exp_gemm_gluon_kernel"}
        assert all(row["spill_bytes"] == 0 and row["shared_bytes"] <= row["shared_limit"] for row in mine)
        assert all(row["tensor_core"] for row in mine if row["wants_tensor_core"])
    other_version = {"exp_gemm_gluon_kernel"} if gluon_lacks() else set()
    assert names == {row["kernel"] for row in rows if row["target"] == "sm_90"} | other_version
    best = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}
    for row in rows:
        if row["target"] in best and row["kernel"] in SM_90_INSTRUCTIONS:
            assert row["tensor_core"] == best[row["target"]]
    for row in rows:
        if row["target"] == "sm_90" and row["kernel"] in SM_90_INSTRUCTIONS and " bias" not in row["config"]:
            least, most = SM_90_INSTRUCTIONS[row["kernel"]]
            assert least < row["instructions"] <= most["softcap" in row["config"]], row["config"]


def _kernels(module: str) -> set[str]:
    text = (ROOT / "orpo_kernels" / "backends" / "kernels" / f"{module}.py").read_text()
    return {line[4:].split("(")[0] for line in text.splitlines() if line.startswith("def ") and "_kernel(" in line}


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_into_float32(dtype: torch.dtype, accumulate: bool, wide: bool) -> None:
    """E of any dtype against a head of any, with and without torch's wider sum."""
    exp_logits = torch.rand(5, 40, device=DEVICE).to(dtype if dtype == torch.bfloat16 else torch.float32)
    weight, out = torch.randn(40, 7, device=DEVICE).to(dtype), torch.randn(5, 7, device=DEVICE)
    before = out.double() if accumulate else torch.zeros_like(out, dtype=torch.float64)
    expected = before + exp_logits.double() @ weight.double()
    with mock.patch.object(products, "_adds_wide", return_value=wide), mock.patch.object(products, "LIBRARY_TILE", 64):
        products.times_head(out, exp_logits, weight, accumulate=accumulate)
    # Forty float32 roundings, and one to the operands' dtype where torch has no wider product.
    size = before.abs() + exp_logits.double() @ weight.double().abs()
    assert (
        (out - expected).abs() <= (40 * torch.finfo(torch.float32).eps + torch.finfo(exp_logits.dtype).eps) * size
    ).all()


def test_heads_keep_their_settings_when_copied() -> None:
    weight = torch.randn(8, 100, device=DEVICE).T
    head = triton_backend._addressable(Head(weight, None, 0.5, 3.0))
    assert head.weight.stride(1) == 1
    assert torch.equal(head.weight, weight)
    assert (head.logit_scale, head.softcap) == (0.5, 3.0)
