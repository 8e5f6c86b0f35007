"""ORPO training with TRL, and nothing else: `python examples/train_orpo.py [--data FILE.jsonl] [--model NAME] ...`.

Without arguments it trains a small Llama from scratch on the documentation that ships with Python. It writes
`history.json` into `--output`: every metric of every step, seconds a step, peak memory, versions; and the trained model
with its tokenizer into `model` beside it.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
import trl
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

if TYPE_CHECKING:
    from examples import corpus, start
else:
    import corpus  # a script's own folder is the first place Python looks
    import start


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The script's options; the defaults make a run of about a minute on two cores."""
    parser = argparse.ArgumentParser(description="ORPO training with TRL.")
    parser.add_argument(
        "--data",
        type=Path,
        help="JSONL file of prompt, chosen, rejected, strings or conversations (default: Python's own docs)",
    )
    parser.add_argument("--model", help="path or name of a causal language model (default: a small Llama, untrained)")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the small Llama, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="depth of the small Llama")
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--beta", type=float, default=0.1, help="weight of the odds-ratio term; 0: plain fine-tuning")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3 for the small Llama, 8e-6 for a named model")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of prompt and answer together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    parser.add_argument("--output", type=Path, default=Path("demo-output/run"), help="folder for history.json")
    options = parser.parse_args(arguments)
    if options.learning_rate is None:
        options.learning_rate = 2e-3 if options.model is None else 8e-6
    if options.max_steps < 1:
        parser.error(f"--max-steps must be at least 1, got {options.max_steps}")
    if options.hidden_size < 64 or options.hidden_size % 64:
        parser.error(f"--hidden-size must be a positive multiple of 64, got {options.hidden_size}")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data: there is no file {options.data}")
    if options.model is not None and options.model.startswith((".", "/", "~")) and not Path(options.model).is_dir():
        parser.error(f"--model: there is no folder {options.model}")
    return options


class Steps(ProgressCallback):  # type: ignore[misc]
    """Trainer's progress bar with the loss in it, instead of a line of metrics above it at every step; times steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begun)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)


def load_model(options: argparse.Namespace, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The named model and its tokenizer; without a name a small untrained Llama and a tokenizer trained on `texts`."""
    if options.model is not None:
        return start.named_model(options.model)
    return start.small_llama(
        texts, hidden_size=options.hidden_size, layers=options.layers, max_length=options.max_length
    )


def shorten_prompts(pairs: list[corpus.Pair], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[corpus.Pair]:
    """Keep the last `limit` tokens of each prompt.

    TRL cuts answers to `max_length` but never prompts: one that fills the length by itself would leave answers with no
    token, whose mean log-probability is 0 / 0.
    """
    shortened = []
    for pair in pairs:
        ids = tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"]
        prompt = pair["prompt"] if len(ids) <= limit else tokenizer.decode(ids[-limit:])
        shortened.append({**pair, "prompt": prompt})
    return shortened


def peak_memory() -> int:
    """Bytes: the accelerator's peak if there is one, else the largest resident size of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def foreign_methods() -> dict[str, str]:
    """Methods of the trainer whose code comes from outside TRL, with their modules: empty unless something patched it.

    The module is read from the function's globals, because a wrapper may well carry the original's `__module__`.
    """
    found = {}
    for name in vars(ORPOTrainer):
        module = getattr(getattr(ORPOTrainer, name), "__globals__", {}).get("__name__", "trl")
        if module.partition(".")[0] != "trl":
            found[name] = module
    return found


def main() -> None:
    options = parse_arguments()
    datasets.disable_progress_bars()
    transformers.set_seed(options.seed)
    pairs = corpus.preference_pairs(options.seed) if options.data is None else corpus.load_pairs(options.data)
    try:
        model, tokenizer = load_model(options, corpus.texts(pairs))
        pairs = shorten_prompts(start.as_strings(pairs, tokenizer), tokenizer, options.max_length // 2)
    except ValueError as error:
        sys.exit(f"train_orpo: {error}")

    config = ORPOConfig(
        output_dir=str(options.output),
        max_steps=options.max_steps,
        beta=options.beta,
        learning_rate=options.learning_rate,
        adam_beta2=0.95,
        adam_epsilon=1e-6,  # at 1e-8 Adam makes full steps of gradients that are mostly rounding: runs drift apart
        warmup_steps=options.max_steps // 10,
        per_device_train_batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
        bf16=options.bf16,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = ORPOTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer
    )
    steps = Steps()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(steps)

    memory_before = peak_memory()
    trainer.train()

    history = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "step_seconds": steps.seconds,
        "seconds_per_step": statistics.median(steps.seconds[1:] or steps.seconds),  # the first step warms up
        "peak_memory_bytes": peak_memory(),
        "memory_before_training_bytes": memory_before,
        "device": str(trainer.accelerator.device),
        "pairs": len(pairs),
        "vocabulary": model.config.vocab_size,
        "parameters": model.num_parameters(),
        "foreign_methods": foreign_methods(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    trainer.save_model(str(options.output / "model"))


if __name__ == "__main__":
    main()
