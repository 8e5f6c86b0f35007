"""Whole runs as people have them: resumed, evaluated, padded on either side, checkpointed, and long."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.accuracy import FACTOR
from orpo_kernels import orpo_loss
from orpo_kernels.integrations import fuse, fusion_report, patch_trl, unpatch_trl
from orpo_kernels.integrations.trl_orpo import ORPOTrainer
from tests.integrations.models import SHAPE
from tests.integrations.stock_script import pairs, tokenizer

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()

pytestmark = pytest.mark.slow  # whole trainers

TRL_ORPO = importlib.import_module("trl.experimental.orpo")
WAYS = ("ORPO patch", "lazy logits")
every_way = pytest.mark.parametrize("way", [pytest.param(way, id=way.replace(" ", "-")) for way in WAYS])


def works(what: str) -> Callable[[Any], Any]:
    """The test shows this for both ways."""

    def mark(test: Any) -> Any:
        cells = [pytest.param(way, marks=pytest.mark.works(what, by=way), id=way.replace(" ", "-")) for way in WAYS]
        return pytest.mark.parametrize("way", cells)(test)

    return mark


@pytest.fixture(autouse=True)
def _poison_is_for_kernels() -> None:
    """Trainers seed themselves, and poisoned memory is none of their business."""
    torch.use_deterministic_algorithms(False)


def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))


@contextmanager
def taken(way: str, of: nn.Module) -> Iterator[None]:
    """The model is trained stock, by a patched trainer, or with lazy logits."""
    if way == "ORPO patch":
        patch_trl()
    elif way == "lazy logits":
        fuse(of)
    try:
        yield
    finally:
        unpatch_trl()
    if way == "lazy logits":
        assert fusion_report(of).calls
        assert fusion_report(of).materialised == []


def trainer(of: Any, folder: Path, words: Any = None, **options: Any) -> Any:
    # Plain SGD: Adam turns the rounding of gradients that ought to be zero (a key's bias) into steps of full size.
    size = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_length": 32}
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.1}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "beta": 0.5}
    return ORPOTrainer(
        model=of,
        args=TRL_ORPO.ORPOConfig(output_dir=str(folder), **{**size, **plain, **quiet, **options}),
        processing_class=words or tokenizer(),
        train_dataset=pairs(16),
        eval_dataset=pairs(5, seed=1),
    )


def history(run: Any) -> list[dict[str, float]]:
    """What was logged, without timings."""
    timings = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timings)}
        for entry in run.state.log_history
    ]


def train(way: str, folder: Path, **options: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What is logged, and the trained parameters."""
    of = model()
    with taken(way, of):
        run = trainer(of, folder, **options)
        run.train()
    return history(run), dict(of.named_parameters())


def assert_same(way: str, folder: Path, rtol: float = 1e-4, **options: Any) -> None:
    stock, weights = train("stock", folder / "stock", **options)
    ours, our_weights = train(way, folder / "ours", **options)
    assert len(stock) == len(ours) >= 2
    for theirs, mine in zip(stock, ours, strict=True):
        assert list(theirs) == list(mine)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=rtol, abs=rtol / 10), name
    for name, weight in weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=10 * rtol, atol=rtol, msg=lambda m, n=name: n + m)


@works("interrupted and resumed from a checkpoint")
def test_a_run_that_is_resumed(way: str, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    whole, weights = train(way, tmp_path, **options)
    of = model()
    with taken(way, of):
        again = trainer(of, tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(again)[:4] == whole[:4]  # the third and fourth step's, and the first two, as they were logged then
    for name, weight in of.named_parameters():
        assert torch.equal(weight, weights[name]), name


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}


@works("evaluation, metrics of predictions")
def test_evaluation(way: str, tmp_path: Path) -> None:
    assert_same(way, tmp_path, **EVALUATES)


@works("evaluation with prediction_loss_only")
def test_evaluation_of_the_loss_alone(way: str, tmp_path: Path) -> None:
    assert_same(way, tmp_path, **EVALUATES, prediction_loss_only=True)


@works("generate_during_eval")
def test_generation_during_evaluation(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks for a service to show samples in; without one it generates all the same."""
    module = importlib.import_module(ORPOTrainer.__module__)
    monkeypatch.setattr(module, "is_wandb_available", lambda: True)
    asked = []
    generate = module.ORPOTrainer.generate_from_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(generate(*args, **kwargs))
        return asked[-1]

    monkeypatch.setattr(module.ORPOTrainer, "generate_from_model", counted)
    assert_same(way, tmp_path, **EVALUATES, generate_during_eval=True)
    assert len(asked) == 4
    assert asked[:2] == asked[2:]  # after each of two steps, stock and ours


@pytest.mark.parametrize("side", ["left", "right"])
@works("padding on either side")
def test_padding_sides(way: str, side: str, tmp_path: Path) -> None:
    words = tokenizer()
    words.padding_side = side
    assert_same(way, tmp_path, words=words)


@works("the padding token ends answers too")
def test_padding_with_the_end_token(way: str, tmp_path: Path) -> None:
    words = tokenizer()
    words.pad_token = words.eos_token
    assert_same(way, tmp_path, words=words)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@works("gradient checkpointing, both forms")
def test_gradient_checkpointing(way: str, reentrant: bool, tmp_path: Path) -> None:
    kwargs = {"use_reentrant": reentrant}
    assert_same(way, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


@works("gradient accumulation")
def test_gradient_accumulation(way: str, tmp_path: Path) -> None:
    assert_same(way, tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=1)


@works("bf16 autocast")
def test_autocast(way: str, tmp_path: Path) -> None:
    """Both round everything to 16 bits: what is logged is as near to a float32 run as stock's own."""

    def logged(way: str, **options: Any) -> Tensor:
        return torch.tensor([value for entry in train(way, tmp_path, **options)[0] for value in entry.values()])

    truth, stock, ours = logged("stock"), logged("stock", bf16=True), logged(way, bf16=True)
    assert (ours - truth).norm() <= FACTOR * (stock - truth).norm()


# ---- In one's own loop, where a trainer wants a GPU or adds noise


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (4, 12), generator=generator)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, :4] = -100
    return ids, labels


def loss_of(way: str, of: Any, seed: int) -> Tensor:
    ids, labels = batch(seed)
    if way == "own loop":
        hidden = of.model(ids).last_hidden_state
        return orpo_loss(hidden, of.lm_head.weight, labels).loss
    logits = of(ids).logits.float()
    kept = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.where(kept, 0)[..., None])[..., 0]
    means = (logps * kept).sum(-1) / kept.sum(-1)
    chosen, rejected = means.chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    nll = -(logps * kept)[:2].sum() / kept[:2].sum()
    return nll - 0.1 * F.logsigmoid(odds).mean()


LOOPS = [
    pytest.param(way, marks=pytest.mark.works("fp16 autocast with a gradient scaler", by=way), id=way.replace(" ", "-"))
    for way in ("own loop", "lazy logits")
]


@pytest.mark.parametrize("way", LOOPS)
def test_float16_with_a_scaler(way: str) -> None:
    """A scaler that starts too high skips steps until it fits, as with the stock model; losses go the same way."""
    runs = {}
    for name in ("stock", way):
        of = model()
        if name == "lazy logits":
            fuse(of)
        optimiser = torch.optim.SGD(of.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        losses = []
        for step in range(40):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(name, of, step % 4)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            losses.append(loss.item())
        runs[name] = losses, scaler.get_scale()
    (stock, scale), (ours, our_scale) = runs["stock"], runs[way]
    assert 1.0 < our_scale <= 2.0**30  # it was lowered
    assert abs(our_scale / scale).is_integer() or abs(scale / our_scale).is_integer()
    assert ours[-1] < ours[0] - 0.05
    assert ours[0] == pytest.approx(stock[0], rel=5e-3)


GROWS = [
    pytest.param(way, marks=pytest.mark.works("300 steps, no growth in memory", by=way), id=way.replace(" ", "-"))
    for way in ("own loop", "lazy logits")
]


@pytest.mark.parametrize("way", GROWS)
def test_three_hundred_steps_do_not_grow(way: str) -> None:
    of = model()
    if way == "lazy logits":
        fuse(of)
    optimiser = torch.optim.AdamW(of.parameters(), lr=1e-3)
    total = torch.zeros(())  # as scripts log it, with a detached number

    def run(steps: int) -> tuple[int, int]:
        nonlocal total
        for step in range(steps):
            loss = loss_of(way, of, step % 8)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            total = total + loss.detach()
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects()), psutil.Process().memory_info().rss

    run(30)
    tensors, resident = run(30)
    more_tensors, more = run(300)
    assert more_tensors <= tensors + 2
    assert more - resident < 16 * 2**20, f"{(more - resident) / 2**20:.1f} MiB in 300 steps"
    assert torch.isfinite(total)
