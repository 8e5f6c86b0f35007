"""A whole TRL training step, stock against patched: pairs a second, peak memory, the longest pair that trains.

TRL's own trainer on models with random weights, since neither time nor memory depends on their values; both variants
from the same seed on the same pairs. They share a process and take turns, a round of steps each, so that a disturbance
that lasts a while slows some rounds of both and not all of one. The search for the longest pair has a process for each
on a CPU, where running out of memory is the end of it.
"""

import gc
import random
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch

from benchmarks.harness import isolate, machine
from benchmarks.harness.measure import UnsupportedError, failure, out_of_memory, summary
from benchmarks.harness.memory import MIB, peak_of
from benchmarks.harness.record import Keep, Row
from benchmarks.problems.cases import BATCHES, BETA, Pair
from benchmarks.report.tables import number

VARIANTS = ("stock", "patched")
WHATS = ("step", "longest")
NEEDED = ("trl", "transformers", "accelerate", "datasets")
SEED = 0
WARM_UP = 2  # the first step compiles and makes Adam's state; the second is the first with all of its memory in use
ROUNDS = 3  # of each variant, in turn: a disturbance of one leaves the medians to the others
FINEST = 16  # tokens: no search is narrowed below this
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # on a GPU as published models are, and as Transformers loads them
LONGEST_LIMIT = {"cuda": 65536, "cpu": 1024}
STEPS, SECONDS = 10, 480.0
CHECKPOINTING, COMPILED = "checkpointing", "torch.compile"
SETTINGS = ("", CHECKPOINTING, COMPILED)
COMPILER = "inductor"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


class Model(NamedTuple):
    """A causal language model by its configuration, its head tied to its embeddings, and the batch it trains on."""

    config: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float
    batch: str
    device: str  # what it is sized for


MODELS = {
    "llama-3.2-1b": Model("LlamaConfig", 2048, 8192, 16, 32, 8, 128256, 5e5, "ultrafeedback", "cuda"),
    "qwen2.5-0.5b": Model("Qwen2Config", 896, 4864, 24, 14, 2, 151936, 1e6, "ultrafeedback", "cuda"),
    "tiny": Model("LlamaConfig", 64, 128, 2, 4, 2, 32000, 1e4, "ragged-small-cpu", "cpu"),
}


class Run(NamedTuple):
    """What one training left."""

    times: list[float]  # milliseconds of the timed steps
    losses: list[float]  # of every step, warm-up included
    peak_mib: float  # CUDA: all that was allocated; CPU: resident size of the process, libraries included


def plan(models: Sequence[str] | None, device: str, steps: int, longest_limit: int | None) -> tuple[list[Row], int]:
    """Every row that would be measured, variants of one thing next to each other, and where the search for the longest
    pair ends. None: what suits the device. UnsupportedError: an option that allows no measurement."""
    chosen = models or [name for name, model in MODELS.items() if model.device == device]
    limit = LONGEST_LIMIT[device] if longest_limit is None else longest_limit
    if steps < 1 or limit < FINEST:
        raise UnsupportedError(
            f"expected --steps >= 1 and --longest-limit >= {FINEST}, got {steps} and {limit}: raise them"
        )
    return [
        Row(model, MODELS[model].batch, "", "trainable", DTYPES[device], what, variant, task="train", setting=setting)
        for model, setting, what, variant in product(chosen, SETTINGS, WHATS, VARIANTS)
        if (setting, what) != (COMPILED, "longest")  # every length would compile anew
    ], limit


def run(
    rows: Sequence[Row], device: str, steps: int, limit: int, seconds: float, keep: Keep = lambda _: None
) -> list[Row]:
    """An answer to each row, all within ``seconds``: what was not begun or not finished by then says so."""

    def together(row: Row) -> Hashable:
        return (row.case, row.setting, *([] if device == "cuda" else [row.phase, row.provider * (row.phase != "step")]))

    options = {"device": device, "steps": steps, "limit": limit}
    module = "benchmarks.lab.train"
    return isolate.run(module, rows, options, together=together, seconds=seconds, fair=True, keep=keep)


def measure(rows: Sequence[Row], *, device: str, steps: int, limit: int, until: float) -> Iterator[Row]:
    """Answers, each refined as long as there is time: the last to a row counts. Steps take half of it at most."""
    versions = {package: machine.version(package) for package in NEEDED}
    known = ", ".join(f"{package} {version}" for package, version in versions.items())
    rows = [row.with_(**machine.about(torch.device(device)), provider_version=known) for row in rows]
    if missing := [package for package, version in versions.items() if not version]:
        reason = f"{', '.join(missing)} not installed: pip install '.[hf]'"
        yield from (row.with_(status="unsupported", reason=reason) for row in rows)
        return
    yield from take_turns([row for row in rows if row.phase == "step"], device, steps, (time.time() + until) / 2)
    for row in rows:

        def fits(length: int, row: Row = row) -> bool:
            try:
                train(row, device, [Pair(1, length - 1, length - 1)], 0)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                return False
            return True

        if row.phase == "longest":
            yield from search(row, fits, limit)


def take_turns(rows: Sequence[Row], device: str, steps: int, until: float) -> Iterator[Row]:
    """Rounds of training, each variant once in every round. The yardstick of both is stock's time."""
    runs: dict[str, list[Run]] = {row.provider: [] for row in rows}
    failed: dict[str, Row] = {}
    for size in filter(None, (steps // ROUNDS + (turn < steps % ROUNDS) for turn in range(ROUNDS))):
        if time.time() > until and all(runs.values()):
            break
        for row in (row for row in rows if row.provider not in failed):
            try:
                runs[row.provider].append(train(row, device, BATCHES[row.batch].pairs, size, until))
            except Exception as error:
                failed[row.provider] = failure(row, error)
    times = {name: [taken for each in own for taken in each.times] for name, own in runs.items()}
    for row in rows:
        if row.provider in failed:
            yield failed[row.provider]
            continue
        pairs, own = BATCHES[row.batch].pairs, runs[row.provider]
        timing = summary(times[row.provider], times.get("stock") or times[row.provider])
        speed = 1e3 * len(pairs) / timing["median_ms"]
        figures = {"pairs": len(pairs), "tokens": _tokens(pairs), "losses": own[0].losses, "pairs_per_s": speed}
        done = timing["repeats"]
        reason = "" if done >= steps else f"{done} of {steps} steps within --seconds"
        peak = max(each.peak_mib for each in own)
        yield row.with_(status="ok", reason=reason, peak_mib=peak, figures=figures, **timing)


def search(row: Row, fits: Callable[[int], bool], limit: int) -> Iterator[Row]:
    """Double the length until it does not fit, then halve the gap until it is an eighth of what fits. An answer after
    every length, each true by itself: "not reached" until the search is over. ``longest`` is what trained, tokens a
    side; ``at_least`` says that something else than memory ended the search."""
    good, bad, length, known = 0, None, max(limit // 16, FINEST), row
    while True:
        try:
            good, bad = (length, bad) if fits(length) else (good, length)
        except Exception as error:  # what was found until then stays in the row
            yield failure(known, error)
            return
        narrow = bad is not None and bad - good <= max(good // 8, FINEST)
        known = row.with_(figures={"longest": good or None, "at_least": bool(good) and not narrow})
        if narrow:
            yield known.with_(status="ok" if good else "out of memory", reason=f"out of memory at {bad}")
            return
        if good == limit:
            yield known.with_(status="ok", reason="no longer one asked for (--longest-limit)")
            return
        yield known.with_(reason="no time for another length (--seconds)")
        length = min(2 * good, limit) if bad is None else (good + bad) // 2


def train(row: Row, device: str, pairs: Sequence[Pair], steps: int, until: float = float("inf")) -> Run:
    """Train from nothing, each step on all ``pairs``: the warm-up, then ``steps`` timed ones, fewer at a deadline."""
    import transformers
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from orpo_kernels.integrations import patched_trl

    place, model = torch.device(device), MODELS[row.case]
    gc.collect()  # an earlier run that did not fit left a trainer behind, in cycles
    if device == "cuda":
        torch.cuda.empty_cache()
    times: list[float] = []

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            machine.synchronize(place)
            times.append(1e3 * (time.perf_counter() - self.begun))
            control.should_training_stop |= len(times) > WARM_UP and time.time() > until

    with tempfile.TemporaryDirectory() as folder, patched_trl() if row.provider == "patched" else nullcontext():
        options = ORPOConfig(
            output_dir=folder,
            max_steps=WARM_UP + steps,
            per_device_train_batch_size=len(pairs),
            beta=BETA,
            learning_rate=8e-6,  # of the ORPO paper
            max_length=max(pair.prompt + max(pair.chosen, pair.rejected) for pair in pairs),
            bf16=device == "cuda",  # TRL's autocast
            use_cpu=device == "cpu",
            gradient_checkpointing=row.setting == CHECKPOINTING,
            torch_compile=row.setting == COMPILED,
            torch_compile_backend=COMPILER if row.setting == COMPILED else None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device == "cuda",
            seed=SEED,
        )
        trainer = ORPOTrainer(
            model=_network(model, place),
            args=options,
            processing_class=_tokenizer(model.vocab_size),
            train_dataset=Dataset.from_list(_texts(pairs, model.vocab_size)),
            callbacks=[Stopwatch],
        )
        peak = peak_of(trainer.train, place)
    mib = torch.cuda.max_memory_allocated(place) / MIB if peak.absolute_mib is None else peak.absolute_mib
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(times[WARM_UP:], losses, mib)


def _network(model: Model, device: torch.device) -> Any:
    import transformers

    config = getattr(transformers, model.config)(
        **{name: size for name, size in model._asdict().items() if name.startswith("num_") or name.endswith("_size")},
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
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
        return " ".join(f"t{chance.randrange(3, vocab)}" for _ in range(count - 1))

    return [
        {"prompt": f"{BOS} {words(pair.prompt)}"}
        | {side: f" {words(getattr(pair, side))} {EOS}" for side in ("chosen", "rejected")}
        for pair in pairs
    ]


def _tokens(pairs: Iterable[Pair]) -> int:
    """Of both sides, padding left out."""
    return sum(2 * pair.prompt + pair.chosen + pair.rejected for pair in pairs)


def names(row: Row) -> dict[str, str]:
    """Model, setting and variant, for people."""
    return {"model": row.case, "setting": row.setting or "plain", "variant": row.provider}


def plan_table(rows: Iterable[Row], steps: int, limit: int) -> pd.DataFrame:
    """The rows that would be measured."""
    lines = []
    for row in rows:
        pairs = BATCHES[row.batch].pairs
        what = f"{len(pairs)} pairs, {_tokens(pairs)} tokens; {steps} in {ROUNDS} rounds, {WARM_UP} before each"
        if row.phase == "longest":
            what = f"1 pair, to {limit} tokens a side; {WARM_UP} a length"
        lines.append({**names(row), "row": row.phase, "steps": what})
    return pd.DataFrame(lines)


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Both variants of each model: stock's time over patched's, and how far their losses are apart."""
    known = {(row.case, row.setting, row.provider, row.phase): row for row in rows}
    lines = []
    for row in (row for row in rows if row.phase == "step"):
        longest = known.get((row.case, row.setting, row.provider, "longest"), row).figures
        stock = known[row.case, row.setting, "stock", "step"]
        ratio = stock.median_ms / row.median_ms if stock.median_ms and row.median_ms else None
        figures = {
            "pairs/s": number(row.figures.get("pairs_per_s"), ".2f"),
            "speed-up": number(ratio, ".2f"),
            "peak MiB": number(row.peak_mib),
            "longest": (">= " if longest.get("at_least") else "") + number(longest.get("longest")),
            "loss gap": number(loss_gap(stock, row), ".1e"),
        }
        lines.append({**names(row), **figures})
    return pd.DataFrame(lines)


def remarks(rows: Iterable[Row]) -> list[str]:
    """Why a row has no figures, or what ended its search."""
    said = [row for row in rows if row.status != "ok" or row.figures.get("at_least")]
    return [f"{', '.join((*names(row).values(), row.phase))}: {row.status}: {row.reason}" for row in said]


def loss_gap(stock: Row, patched: Row) -> float | None:
    """The worst relative difference of the loss over the steps that both made. Exactly 0 says nothing was patched."""
    both = zip(stock.figures.get("losses", ()), patched.figures.get("losses", ()), strict=False)  # one may be shorter
    return max((abs(mine - theirs) / abs(theirs) for theirs, mine in both), default=None)
