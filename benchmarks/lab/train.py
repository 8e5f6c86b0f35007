"""A whole TRL training step, stock against patched: pairs a second, peak memory, the longest pair that trains.

The head is one part of a step; what its kernels save shows in a user's run only as far as the rest of the model lets
it. So this trains real models with TRL's own trainer, preprocessing and optimiser, both variants from the same seed on
the same pairs. Weights are random: neither time nor memory depends on their values, and nothing is downloaded.

``python -m benchmarks.train SPEC FILE`` is one model, variant and checkpointing in a process of its own. It rewrites
FILE after every answer, so that what was measured outlives whatever ends the process.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import machine, measure
from benchmarks.cases import BATCHES, BETA, Pair
from benchmarks.memory import MIB, peak_of
from benchmarks.race import QUIET
from benchmarks.report import number

Variant = Literal["stock", "patched"]
What = Literal["step", "longest"]
TrainStatus = Literal["ok", "unsupported", "out of memory", "out of time", "failed"]

VARIANTS: tuple[Variant, ...] = ("stock", "patched")
WHATS: tuple[What, ...] = ("step", "longest")
NEEDED = ("trl", "transformers", "accelerate", "datasets")
SEED = 0
WARM_UP = 2  # the first step compiles and makes Adam's state; the second is the first with all of its memory in use
FINEST = 16  # tokens: no search is narrowed below this
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # on a GPU as published models are, and as Transformers loads them
LONGEST_LIMIT = {"cuda": 65536, "cpu": 1024}
SECONDS = 480.0
NARROW: dict[str, Any] = {"box": SIMPLE, "pad_edge": False, "padding": (0, 1, 0, 0)}  # ten columns in a terminal
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Model:
    """A causal language model by its configuration, its head tied to its embeddings, and the batch it trains on."""

    name: str
    config: Literal["LlamaConfig", "Qwen2Config"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rope_theta: float
    batch: str
    device: Literal["cuda", "cpu"]  # what it is sized for


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("llama-3.2-1b", "LlamaConfig", 2048, 8192, 16, 32, 8, 128256, 5e5, "ultrafeedback", "cuda"),
        Model("qwen2.5-0.5b", "Qwen2Config", 896, 4864, 24, 14, 2, 151936, 1e6, "ultrafeedback", "cuda"),
        Model("tiny", "LlamaConfig", 64, 128, 2, 4, 2, 32000, 1e4, "ragged-small-cpu", "cpu"),
    )
}


@dataclass(frozen=True)
class TrainSpec:
    """What one process is asked for. It is ended after ``seconds``; the timed steps take half of them at most."""

    model: str
    variant: Variant
    checkpointing: bool
    device: str = "cpu"
    steps: int = 10
    longest_limit: int = 1024
    seconds: float = SECONDS


@dataclass(frozen=True)
class TrainRow:
    """One answer. Numbers are None where there are none; ``reason`` says why, or what ended a search."""

    model: str
    variant: Variant
    checkpointing: bool
    what: What
    status: TrainStatus
    reason: str = ""
    dtype: str = ""  # of weights and optimiser state; where it is bfloat16, TRL's autocast is on too
    pairs: int | None = None  # a step
    tokens: int | None = None  # a step, of both sides, padding left out
    steps: int = 0  # timed ones
    pairs_per_s: float | None = None  # at the median of the timed steps
    peak_mib: float | None = None  # CUDA: all that was allocated; CPU: resident size of the process, libraries included
    losses: tuple[float, ...] = ()  # of every step from the first, warm-up included
    longest: int | None = None  # tokens a side of the longest single pair that trained
    at_least: bool = False  # something else than memory ended the search


def row_of(spec: TrainSpec, what: What, status: TrainStatus, reason: str = "") -> TrainRow:
    return TrainRow(spec.model, spec.variant, spec.checkpointing, what, status, reason, DTYPES[spec.device])


def name(of: TrainSpec | TrainRow) -> tuple[str, str, str]:
    """Model, gradient checkpointing and variant, for people."""
    return of.model, "on" if of.checkpointing else "off", of.variant


def specs(models: Sequence[str] | None, device: str, steps: int, longest_limit: int | None) -> list[TrainSpec]:
    """Every combination, the two variants of each next to each other. None: what suits the device."""
    chosen = models or [model.name for model in MODELS.values() if model.device == device]
    limit = LONGEST_LIMIT[device] if longest_limit is None else longest_limit
    if steps < 1 or limit < FINEST:
        raise ValueError(f"expected --steps >= 1 and --longest-limit >= {FINEST}, got {steps} and {limit}: raise them")
    return [
        TrainSpec(model, variant, checkpointing, device, steps, limit)
        for model, checkpointing, variant in product(chosen, (False, True), VARIANTS)
    ]


def train(spec: TrainSpec, pairs: Sequence[Pair], steps: int, deadline: float = math.inf) -> TrainRow:
    """Train from nothing, each step on all ``pairs``: the warm-up, then ``steps`` timed ones, fewer at a deadline."""
    import transformers
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from orpo_kernels.integrations import patched_trl

    device = torch.device(spec.device)
    gc.collect()  # an earlier run that did not fit left a trainer behind, in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    seconds: list[float] = []

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - self.begun)
            if len(seconds) > WARM_UP and time.perf_counter() > deadline:
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder, patched_trl() if spec.variant == "patched" else nullcontext():
        trainer = ORPOTrainer(
            model=_network(MODELS[spec.model], device),
            args=ORPOConfig(
                output_dir=folder, max_steps=WARM_UP + steps, per_device_train_batch_size=len(pairs), beta=BETA,
                learning_rate=8e-6,  # of the ORPO paper
                max_length=max(pair.prompt + max(pair.chosen, pair.rejected) for pair in pairs),
                bf16=device.type == "cuda", use_cpu=device.type == "cpu", gradient_checkpointing=spec.checkpointing,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
                dataloader_pin_memory=device.type == "cuda", seed=SEED,
            ),
            processing_class=_tokenizer(MODELS[spec.model].vocab),
            train_dataset=Dataset.from_list(_texts(pairs, MODELS[spec.model].vocab)),
            callbacks=[Stopwatch],
        )  # fmt: skip
        peak = peak_of(trainer.train, device)
    mib = torch.cuda.max_memory_allocated(device) / MIB if peak.absolute_mib is None else peak.absolute_mib
    timed = seconds[WARM_UP:]
    return replace(
        row_of(spec, "step", "ok"), pairs=len(pairs), tokens=_tokens(pairs), steps=len(timed), peak_mib=mib,
        pairs_per_s=len(pairs) / statistics.median(timed) if timed else None,
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
    )  # fmt: skip


def _network(model: Model, device: torch.device) -> Any:
    import transformers

    config = getattr(transformers, model.config)(
        hidden_size=model.hidden, intermediate_size=model.intermediate, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, vocab_size=model.vocab,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta}, tie_word_embeddings=True,
        max_position_embeddings=131072, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.set_seed(SEED)
    with torch.device(device):  # a billion random numbers take a CPU long
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[device.type]))


def _tokenizer(vocab: int) -> Any:
    """One word, one token, so that lengths are what they are said to be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, BOS, EOS, *(f"t{index}" for index in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _texts(pairs: Iterable[Pair], vocab: int) -> list[dict[str, str]]:
    """Random words. A prompt begins and an answer ends with the marks that TRL would add to the length otherwise."""
    chance = random.Random(SEED)

    def words(count: int) -> str:
        return " ".join(f"t{chance.randrange(3, vocab)}" for _ in range(count))

    return [
        {
            "prompt": f"{BOS} {words(pair.prompt - 1)}",
            "chosen": f" {words(pair.chosen - 1)} {EOS}",
            "rejected": f" {words(pair.rejected - 1)} {EOS}",
        }
        for pair in pairs
    ]


def measure_all(spec: TrainSpec) -> Iterator[TrainRow]:
    """The row of the step, then that of the longest pair after every length tried; the last of each counts."""
    half = time.perf_counter() + spec.seconds / 2
    missing = [package for package in NEEDED if not machine.version(package)]
    if missing:
        reason = f"{', '.join(missing)} not installed: pip install '.[hf]'"
        yield from (row_of(spec, what, "unsupported", reason) for what in WHATS)
        return

    def step() -> Iterator[TrainRow]:
        yield train(spec, BATCHES[MODELS[spec.model].batch].pairs, spec.steps, half)

    def fits(length: int) -> bool:
        try:
            train(spec, [Pair(1, length - 1, length - 1)], 0)
        except Exception as error:
            if _verdict(error)[0] != "out of memory":
                raise
            return False
        return True

    longest = search(row_of(spec, "longest", "ok"), fits, spec.longest_limit)
    for what, rows in zip(WHATS, (step(), longest), strict=True):
        row = row_of(spec, what, "ok")
        try:
            for row in rows:
                yield row
        except Exception as error:  # a row that failed is a result, and what was found until then stays in it
            status, reason = _verdict(error)
            yield replace(row, status=status, reason=reason)


def _verdict(error: Exception) -> tuple[TrainStatus, str]:
    line = measure.first_line(error)
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in measure.OUT_OF_MEMORY):
        return "out of memory", line
    return "failed", f"{type(error).__name__}: {line}"


def _tokens(pairs: Iterable[Pair]) -> int:
    return sum(2 * pair.prompt + pair.chosen + pair.rejected for pair in pairs)


def search(row: TrainRow, fits: Callable[[int], bool], limit: int) -> Iterator[TrainRow]:
    """Double the length until it does not fit, then halve the gap until it is an eighth of what fits.

    A row after every length, each true by itself: if none follows it, the process was ended.
    """
    good, bad, length = 0, None, max(limit // 16, FINEST)
    while True:
        good, bad = (length, bad) if fits(length) else (good, length)
        narrow = bad is not None and bad - good <= max(good // 8, FINEST)
        status: TrainStatus = "ok" if good else "out of memory" if narrow else "out of time"
        if bad is not None and narrow:
            reason = f"out of memory at {bad}"
        elif good == limit:
            reason = "no longer one asked for (--longest-limit)"
        else:
            reason = "no time for another length (--seconds)"
        at_least = status == "ok" and not narrow
        yield replace(row, status=status, reason=reason, longest=good or None, at_least=at_least)
        if narrow or good == limit:
            return
        length = min(2 * good, limit) if bad is None else (good + bad) // 2


def run(wanted: Sequence[TrainSpec], seconds: float) -> Iterator[list[TrainRow]]:
    """Two rows for each spec, within ``seconds``: each gets an equal share of what those before it have left."""
    deadline = time.perf_counter() + seconds
    with tqdm(wanted, unit="process") as bar:
        for index, spec in enumerate(bar):
            bar.set_description(" ".join(name(spec)))
            left = deadline - time.perf_counter()
            yield run_one(replace(spec, seconds=left / (len(wanted) - index)))


def run_one(spec: TrainSpec) -> list[TrainRow]:
    """Both rows of a spec, measured in a process of its own; what that left unanswered becomes a row with the cause."""
    if spec.seconds <= 0:
        return [row_of(spec, what, "out of time", "not begun within --seconds") for what in WHATS]
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "rows.json"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "benchmarks.train", json.dumps(asdict(spec)), str(answer)]
        # With several GPUs in sight, Transformers would spread the batch over them by nn.DataParallel.
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        environment = {**os.environ, **QUIET, "CUDA_VISIBLE_DEVICES": gpu}
        status: TrainStatus = "failed"
        try:
            with log.open("w") as sink:
                code = subprocess.run(
                    command, cwd=machine.ROOT, env=environment, stdout=sink, stderr=sink, timeout=spec.seconds
                ).returncode
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            cause = f"exit code {code}: {last[:300]}"
            if code == -signal.SIGKILL:
                status, cause = "out of memory", "the kernel ended the process"
        except subprocess.TimeoutExpired:
            code, status, cause = 0, "out of time", "not finished within --seconds"  # a search left a row of its own
        found = {row["what"]: TrainRow(**row) for row in json.loads(answer.read_text())} if answer.exists() else {}
    if code != 0 and "longest" in found:
        found["longest"] = replace(found["longest"], reason=f"the search ended early: {cause}")
    return [found.get(what) or row_of(spec, what, status, cause) for what in WHATS]


def save(path: Path, rows: Sequence[TrainRow], device: torch.device) -> None:
    """The rows, and what they were measured on and with."""
    versions = {"torch": torch.__version__, **{package: machine.version(package) for package in ("triton", *NEEDED)}}
    measured = {"machine": machine.device_name(device), "date": machine.today(), "commit": machine.commit()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**measured, "versions": versions, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


def print_plan(wanted: Iterable[TrainSpec], console: Console) -> None:
    """The rows that would be measured."""
    table = Table("model", "ckpt", "variant", "row", "steps", **NARROW)
    for spec in wanted:
        pairs = BATCHES[MODELS[spec.model].batch].pairs
        table.add_row(*name(spec), "step", f"{len(pairs)} pairs, {_tokens(pairs)} tokens; {WARM_UP} + {spec.steps}")
        table.add_row(*name(spec), "longest", f"1 pair, to {spec.longest_limit} tokens a side; {WARM_UP} a length")
    console.print(table)


def print_rows(rows: Sequence[TrainRow], console: Console) -> None:
    """Both variants of each model, patched as a ratio of stock; what has no figures follows with its reason."""
    columns = ("model", "ckpt", "variant", "pairs/s", "ratio", "peak MiB", "ratio", "longest", "ratio", "loss gap")
    table = Table(*columns, **NARROW)
    known = {(*name(row), row.what): row for row in rows}
    for model, on, variant in dict.fromkeys(name(row) for row in rows):
        step, longest = (known[model, on, variant, what] for what in WHATS)
        at_least = ">= " if longest.at_least else ""
        cells = [number(step.pairs_per_s, ".2f"), "", number(step.peak_mib), "", at_least + number(longest.longest)]
        if variant == "patched":
            base, base_longest = (known[model, on, "stock", what] for what in WHATS)
            cells[1] = _ratio(step.pairs_per_s, base.pairs_per_s)
            cells[3] = _ratio(step.peak_mib, base.peak_mib)
            limit = None if base_longest.at_least else base_longest.longest  # a ratio to "at least" says nothing
            cells += [at_least + _ratio(longest.longest, limit) if limit else "-", number(loss_gap(base, step), ".1e")]
        table.add_row(model, on, variant, *cells)
    console.print(table)
    for row in rows:
        if row.status != "ok" or row.at_least:
            console.print(f"{', '.join((*name(row), row.what))}: {row.status}: {row.reason}", markup=False)


def loss_gap(stock: TrainRow, patched: TrainRow) -> float | None:
    """The worst relative difference of the loss over the steps that both made. Exactly 0 says nothing was patched."""
    both = list(zip(stock.losses, patched.losses, strict=False))  # one may have been stopped earlier
    return max((abs(mine - theirs) / abs(theirs) for theirs, mine in both), default=None)


def _ratio(mine: float | None, stock: float | None) -> str:
    return number(mine / stock if mine and stock else None, ".2f")


def main(spec: TrainSpec, answer: Path) -> None:
    found: dict[str, TrainRow] = {}
    for row in measure_all(spec):
        found[row.what] = row
        written = answer.with_suffix(".new")
        written.write_text(json.dumps([asdict(row) for row in found.values()]))
        written.replace(answer)  # whoever is ended while writing leaves the last whole file


if __name__ == "__main__":
    measure.be_first_to_die()
    main(TrainSpec(**json.loads(sys.argv[1])), Path(sys.argv[2]))
