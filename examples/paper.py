"""The ORPO paper's claims in small: `python -m examples.paper`, a few minutes on two CPU cores.

From one starting model it trains, for each seed, by fine-tuning on the chosen answers alone (SFT), by ORPO at several
weights, by ORPO with the probability ratio in place of the odds ratio, and by DPO after the fine-tuning. It writes
`paper.json`, the record, into `--output`, and from that record alone the page `paper.md` and its figure. The page says
of each claim of the paper (arXiv 2403.07691) whether these runs show it.

Without options the model is the demonstration's small Llama, first trained on the standard library's source, so that
there is something to fine-tune. With a model and pairs of your own the same command draws what the paper's Figure 3
shows:

    python -m examples.paper --model facebook/opt-350m --data pairs.jsonl --steps 2000 --bf16
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.harness.machine import commit, device_name, today
from examples import corpus, paper_page, start
from examples.diversity import across_input_diversity, per_input_diversity
from examples.paper_record import Diversity, Record, Seed
from examples.training import (
    BY_HEART,
    SFT,
    Example,
    Method,
    Recipe,
    Run,
    batches,
    check_head,
    dpo,
    orpo,
    probability_ratio,
    step_seconds,
    train,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options; some defaults differ for a model of one's own."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper",
        description="The ORPO paper's claims on a model of any size.",
        allow_abbrev=False,
    )
    own = parser.add_argument_group("what is trained")
    own.add_argument("--data", type=Path, help="JSONL file of prompt, chosen, rejected (default: Python's own docs)")
    own.add_argument("--model", help="path or name of a causal language model (default: a small Llama)")
    own.add_argument("--hidden-size", type=int, default=128, help="width of the small Llama, a multiple of 64")
    own.add_argument("--layers", type=int, default=2, help="depth of the small Llama")
    own.add_argument("--vocabulary", type=int, default=2048, help="tokens of the small Llama")
    own.add_argument("--pretraining", type=int, default=300, help="steps of the small Llama on Python's source")
    how = parser.add_argument_group("how")
    how.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each a split, an order and samples")
    how.add_argument("--steps", type=int, default=120, help="optimizer steps of each method; SFT then DPO takes twice")
    how.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    how.add_argument("--learning-rate", type=float, help="default: 1e-3 for the small Llama, 8e-6 for a named model")
    how.add_argument(
        "--max-length", type=int, help="tokens of prompt and answer (default: 256; 1024 for a named model)"
    )
    how.add_argument("--beta", type=float, default=1.0, help="weight of the ratio's term where ORPO meets the others")
    how.add_argument(
        "--betas", type=float, nargs="+", default=[0.1, 0.5, 1.0, 5.0], help="weights that ORPO is tried at"
    )
    how.add_argument("--dpo-beta", type=float, default=0.1)
    how.add_argument("--dpo-rate", type=float, default=0.1, help="DPO's learning rate, as a share of --learning-rate")
    how.add_argument("--few", type=int, help="pairs learnt by heart to compare the ratios (default: 8, 0 for --model)")
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--held-out", type=int, default=32, help="pairs that are measured and not trained on")
    what.add_argument("--measured", type=int, default=8, help="how often, after the start")
    what.add_argument("--prompts", type=int, default=12, help="held-out prompts that are answered for the diversity")
    what.add_argument("--samples", type=int, default=5, help="answers to each")
    what.add_argument("--new-tokens", type=int, default=48, help="length of an answer at most")
    what.add_argument("--temperature", type=float, default=0.7, help="of sampling")
    parser.add_argument("--output", type=Path, default=Path("demo-output/paper"), help="folder for what is written")
    parser.add_argument(
        "--render", action="store_true", help="train nothing: page and figure of the record in --output"
    )
    options = parser.parse_args(arguments)
    small = options.model is None
    if options.learning_rate is None:
        options.learning_rate = 1e-3 if small else 8e-6
    if options.few is None:
        options.few = 2 * options.batch_size if small else 0
    if options.max_length is None:
        options.max_length = 256 if small else 1024
    _check(parser, options)
    options.betas = sorted({*options.betas, options.beta})
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    least = dict.fromkeys(("steps", "batch_size", "held_out", "measured", "new_tokens"), 1)
    least |= {"prompts": 2, "samples": 2, "max_length": 8, "pretraining": 0, "few": 0, "vocabulary": 512}
    for name, at_least in least.items():
        if getattr(options, name) < at_least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be at least {at_least}, got {getattr(options, name)}")
    for name in ("learning_rate", "beta", "dpo_beta", "dpo_rate", "temperature"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if min(options.betas) <= 0:
        parser.error(f"--betas must be positive, got {min(options.betas)}; SFT is the run without that term")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must differ, got {' '.join(map(str, options.seeds))}")
    if options.prompts > options.held_out:
        parser.error(f"--prompts must be at most --held-out, {options.held_out}, got {options.prompts}")
    if options.hidden_size < 64 or options.hidden_size % 64:
        parser.error(f"--hidden-size must be a positive multiple of 64, got {options.hidden_size}")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data: there is no file {options.data}")


def tokenized(pairs: list[corpus.Pair], tokenizer: Any, max_length: int) -> list[Example]:
    """Pairs in tokens: the end of a prompt in half the length at most, answers that end and are cut to the rest."""
    examples = []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for pair in pairs:
        prompt, chosen, rejected = (
            tokenizer(pair[field], add_special_tokens=False)["input_ids"] for field in corpus.FIELDS
        )
        prompt = [*begin, *prompt[-(max_length // 2 - 1) :]] if prompt[:1] != begin else prompt[: max_length // 2]
        room = max_length - len(prompt)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answers = [[*answer, *end][:room] for answer in (chosen, rejected)]
        if prompt and all(answers):
            examples.append(Example(prompt, *answers))
    return examples


def pretrained(model: Any, tokenizer: Any, options: argparse.Namespace, bar: Any) -> Any:
    """The small Llama after some steps on the standard library's source: every seed begins from it."""
    length, text = options.max_length - 1, list[int]()
    for module in random.Random(0).sample(source := corpus.library_source(), len(source)):
        if len(text) < options.pretraining * options.batch_size * length:
            text += tokenizer(module, add_special_tokens=False)["input_ids"]
    windows = [text[at : at + length] for at in range(0, len(text) - length + 1, length)]
    examples = [Example([tokenizer.bos_token_id], window, []) for window in windows]
    recipe = Recipe(options.pretraining, options.batch_size, 2e-3, options.measured, options.bf16)
    steps = batches(examples, recipe, seed=0)
    return train(model, SFT, recipe, steps, [], torch.device(options.device), bar.update)[1]


@torch.no_grad()
def diversity_of(model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace) -> Diversity:
    """Sampled answers to some prompts, and how alike they are."""
    device = torch.device(options.device)
    model.to(device).eval()
    samples = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=options.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=options.samples,
            max_new_tokens=options.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        samples.append(tokenizer.batch_decode(out[:, len(prompt) :], skip_special_tokens=True))
    model.cpu()
    return Diversity(per_input_diversity(samples), across_input_diversity(samples), samples[0][0])


def one_seed(seed: int, base: Any, tokenizer: Any, examples: list[Example], options: Any, bar: Any) -> Seed:
    """Every method from the same model, on the same batches."""
    device = torch.device(options.device)
    recipe = Recipe(options.steps, options.batch_size, options.learning_rate, options.measured, options.bf16)
    shuffled = random.Random(seed).sample(examples, len(examples))
    held_out, trained_on = shuffled[: options.held_out], shuffled[options.held_out :]
    steps = batches(trained_on, recipe, seed)

    def run(
        method: Method, begin: Any, on: list[list[Example]] = steps, of: list[Example] = held_out
    ) -> tuple[Run, Any]:
        bar.set_description(f"seed {seed}, {method.name}")
        transformers.set_seed(seed)
        return train(begin, method, recipe, on, of, device, bar.update)

    after = dpo(options.dpo_beta, options.dpo_rate)
    models = {"base": base}
    runs: list[Run] = []
    for method, begin in ((SFT, "base"), (after, "sft"), (probability_ratio(options.beta), "base")):
        made, models[method.name] = run(method, models[begin])
        runs.append(made)
    for beta in options.betas:
        made, model = run(orpo(beta), base)
        runs.append(made)
        if beta == options.beta:
            models["orpo"] = model
    few = trained_on[: options.few]
    ratios = (orpo(options.beta, rate=BY_HEART), probability_ratio(options.beta, rate=BY_HEART)) if few else ()
    by_heart = [run(method, base, batches(few, recipe, seed), few)[0] for method in ratios]
    bar.set_description(f"seed {seed}, steps in turn")
    seconds = step_seconds(base, (SFT, after, orpo(options.beta)), recipe, steps[:12], device)
    prompts = [example.prompt for example in held_out[: options.prompts]]
    diversity = {}
    for name in ("base", "sft", "orpo", "dpo"):
        bar.set_description(f"seed {seed}, samples of {name}")
        transformers.set_seed(seed)
        diversity[name] = diversity_of(models[name], tokenizer, prompts, options)
    return Seed(seed, runs, by_heart, seconds, diversity)


def recorded(options: argparse.Namespace) -> Record:
    """Train everything."""
    made_by = commit()  # now, since the checkout may change before a long run ends
    transformers.set_seed(0)
    pairs = corpus.preference_pairs() if options.data is None else corpus.load_pairs(options.data)
    if options.model is None:
        sizes = {"hidden_size": options.hidden_size, "layers": options.layers, "vocabulary": options.vocabulary}
        model, tokenizer = start.small_llama(corpus.texts(pairs), max_length=options.max_length, **sizes)
    else:
        model, tokenizer = start.named_model(options.model)
    examples = tokenized(start.as_strings(pairs, tokenizer), tokenizer, options.max_length)
    if len(examples) < options.held_out + options.batch_size:
        raise ValueError(
            f"--data: {len(examples)} pairs are fewer than --held-out and one batch, "
            f"{options.held_out} + {options.batch_size}: give more pairs, or hold out fewer"
        )
    check_head(model, examples)
    pretraining = options.pretraining if options.model is None else 0
    trainings = len(options.seeds) * (3 + len(options.betas) + 2 * bool(options.few))
    with tqdm(total=trainings * options.steps + pretraining, unit="step", desc="pretraining", smoothing=0.05) as bar:
        base = pretrained(model, tokenizer, options, bar) if pretraining else model
        seeds = [one_seed(seed, base, tokenizer, examples, options, bar) for seed in options.seeds]
    settings = {
        name: value for name, value in vars(options).items() if name not in ("output", "render", "data", "seeds")
    }
    return Record(
        settings={**settings, "data": options.data and options.data.name, "pretraining": pretraining},
        pairs=len(examples),
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        device=device_name(torch.device(options.device)),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        date=today(),
        commit=made_by or "unknown",
        seeds=seeds,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    file = options.output / "paper.json"
    try:
        if options.render:
            record = Record.load(file)
        else:
            record = recorded(options)
            record.save(file)
        page, figure = paper_page.write(record, options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"paper: {error}")
    print(paper_page.summary(record))
    print(f"Page: {page}   Figure: {figure}   Record: {file}")


if __name__ == "__main__":
    main()
