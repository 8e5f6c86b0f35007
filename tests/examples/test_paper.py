"""The paper's claims in small: the command, its training loop, its rule of verdicts, and the page that is committed."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from transformers import AutoConfig, AutoModelForCausalLM

from examples import corpus, paper, paper_page, training
from examples.paper_claims import CLAIMS, DISAGREE, DOES_NOT, REPRODUCES, spread, values, verdict
from examples.paper_record import Diversity, Record, Seed
from examples.training import Example, Recipe, Run, Trainee, dpo, orpo

pytestmark = pytest.mark.slow  # training runs

DOCS = Path(__file__).parents[2] / "docs"
CPU = torch.device("cpu")
FEW = ["--steps", "4", "--batch-size", "2", "--held-out", "4", "--measured", "2", "--prompts", "2", "--samples", "2"]
FEW += ["--new-tokens", "4", "--betas", "0.1", "--seeds", "0", "--few", "2", "--device", "cpu"]
SMALL = ["--hidden-size", "64", "--layers", "1", "--vocabulary", "512", "--pretraining", "2", "--max-length", "64"]

FAMILIES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128},  # its head is its embedding
    "phi": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},  # a bias
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "gemma2": {
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    },
}
TOKENS = 300


def tiny(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], "vocab_size": TOKENS, **changes})
    return AutoModelForCausalLM.from_config(config)


def examples(count: int, seed: int = 0) -> list[Example]:
    chance = torch.Generator().manual_seed(seed)

    def tokens() -> list[int]:
        return torch.randint(3, TOKENS, (int(torch.randint(2, 9, (1,), generator=chance)),), generator=chance).tolist()

    return [Example(tokens(), tokens(), tokens()) for _ in range(count)]


RECIPE = Recipe(steps=4, batch_size=2, learning_rate=1e-3, measured=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "opt"])
def test_losses_are_those_of_full_logits(family: str) -> None:
    model, pairs = tiny(family), examples(3)
    training.check_head(model, pairs)
    trainee = Trainee(model.eval(), training.SFT, RECIPE, CPU)
    trainee.model.eval()  # without dropout
    answers = training.both_sides(pairs)
    inputs, labels = training.inputs_of(model, answers)
    logps = trainee.model(**inputs).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels >= 0)
    chosen, rejected = (logps.sum(-1) / (labels >= 0).sum(-1)).chunk(2)
    nll = -logps[:3].sum() / (labels[:3] >= 0).sum()
    tuned = trainee._loss(pairs, training.SFT)
    torch.testing.assert_close(tuned, nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trainee._loss(pairs, orpo(0.0)), nll, rtol=1e-5, atol=1e-5)

    odds = (chosen.exp() / (1 - chosen.exp())).log() - (rejected.exp() / (1 - rejected.exp())).log()
    expected = nll - 0.5 * odds.sigmoid().log().mean()
    torch.testing.assert_close(trainee._loss(pairs, orpo(0.5)), expected, rtol=1e-4, atol=1e-5)
    found = training.measure(trainee.model, pairs, RECIPE)
    assert found == pytest.approx((chosen.mean().item(), rejected.mean().item(), odds.mean().item()), abs=1e-4)


def test_a_model_that_caps_its_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="Gemma2ForCausalLM are not its head's product"):
        training.check_head(tiny("gemma2", final_logit_softcapping=0.01), examples(1))


def test_what_a_step_sends_through_models_is_counted() -> None:
    model, steps = tiny("llama"), training.batches(examples(6), RECIPE, seed=0)
    sequences = {}
    for method, calls in ((training.SFT, 4), (orpo(1.0), 4), (dpo(0.1, 0.1), 8)):
        ticks = itertools.count()
        run, trained = training.train(model, method, RECIPE, steps, examples(3, 1), CPU, ticks.__next__)
        assert (run.calls, next(ticks), run.steps) == (calls, 4, [0, 2, 4])
        assert not any(module._forward_pre_hooks for module in trained.modules())
        sequences[method.name] = run.sequences
    assert sequences == {"sft": 4 * 2, "orpo": 4 * 4, "dpo": 4 * 8}
    seconds = training.step_seconds(model, (training.SFT, orpo(1.0), dpo(0.1, 0.1)), RECIPE, steps, CPU)
    assert set(seconds) == set(sequences)
    assert min(seconds.values()) > 0


def test_dpo_starts_at_its_reference_and_leaves_it_alone() -> None:
    model, pairs = tiny("llama"), examples(2)
    trainee = Trainee(model, dpo(0.1, 1.0), RECIPE, CPU)
    assert trainee._loss(pairs, trainee.method).item() == pytest.approx(math.log(2), abs=1e-6)
    trainee.step(pairs)
    assert all(map(torch.equal, trainee.reference.parameters(), model.parameters()))
    assert trainee._loss(pairs, trainee.method).item() < math.log(2)


def test_training_on_the_chosen_side_does_not_depend_on_the_rejected() -> None:
    model, pairs = tiny("llama"), examples(4)
    others = [pair._replace(rejected=[5]) for pair in pairs]
    one, two = (
        training.train(model, training.SFT, RECIPE, [of[:2], of[2:]], [], CPU, int)[1] for of in (pairs, others)
    )
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not all(map(torch.equal, one.parameters(), model.parameters()))


def test_batches_are_whole_rounds_over_the_pairs() -> None:
    pairs = examples(5)
    steps = training.batches(pairs, dataclasses.replace(RECIPE, steps=5), seed=3)
    seen = [pair for batch in steps for pair in batch]
    assert [len(batch) for batch in steps] == [2] * 5
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(pairs)
    assert steps != training.batches(pairs, dataclasses.replace(RECIPE, steps=5), seed=4)


def test_long_prompts_lose_their_beginning_and_answers_end() -> None:
    tokenizer = corpus.train_tokenizer(["a"], 512)
    pairs = [{"prompt": "a b c d e f g h", "chosen": "x", "rejected": " y" * 40}]
    ((prompt, chosen, rejected),) = paper.tokenized(pairs, tokenizer, 16)
    assert prompt[0] == tokenizer.bos_token_id
    assert len(prompt) == 8
    assert tokenizer.decode(prompt[1:]).endswith("f g h")
    assert chosen[-1] == tokenizer.eos_token_id
    assert len(prompt) + len(rejected) == 16


def a_run(method: str, beta: float | None, chosen: float, rejected: float, sequences: int, peak: float) -> Run:
    """From chosen -4 and rejected -4.2 to these."""
    return Run(method, beta, [0, 4], [-4.0, chosen], [-4.2, rejected], [0.2, chosen - rejected], 4, sequences, peak)


def a_seed(seed: int, shows: bool) -> Seed:
    """Figures in which every claim is seen, or none."""
    if shows:
        runs = [
            a_run("sft", None, -3.0, -3.4, 8, 100),
            a_run("orpo", 0.1, -3.0, -3.9, 16, 110),
            a_run("orpo", 1.0, -3.05, -4.5, 16, 110),
            a_run("probability_ratio", 1.0, -3.1, -6.0, 16, 110),
            a_run("dpo", 0.1, -3.5, -5.0, 32, 140),
        ]
        alike = {"base": (0.5, 0.5), "sft": (0.4, 0.4), "orpo": (0.6, 0.2), "dpo": (0.5, 0.3)}
    else:
        runs = [
            a_run("sft", None, -3.0, -4.2, 8, 100),
            a_run("orpo", 0.1, -3.5, -3.6, 16, 150),
            a_run("orpo", 1.0, -3.6, -3.65, 16, 150),
            a_run("probability_ratio", 1.0, -3.6, -3.65, 16, 150),
            a_run("dpo", 0.1, -3.5, -5.0, 16, 140),
        ]
        alike = {"base": (0.5, 0.5), "sft": (0.4, 0.4), "orpo": (0.5, 0.3), "dpo": (0.5, 0.3)}
    seconds = {"sft": 0.1, "orpo": 0.2 if shows else 0.6, "dpo": 0.4}
    by_heart = [runs[2], runs[3]]
    return Seed(seed, runs, by_heart, seconds, {name: Diversity(*pair, "a sample") for name, pair in alike.items()})


def a_record(*shows: bool, **settings: Any) -> Record:
    options = vars(paper.parse_arguments(["--betas", "0.1", "--steps", "4", "--batch-size", "2"]))
    kept = {name: options[name] for name in options if name not in ("output", "render", "data", "seeds")}
    seeds = [a_seed(number, each) for number, each in enumerate(shows)]
    versions = {"torch": "2", "transformers": "5"}
    return Record(
        {**kept, "data": None, **settings}, 100, 10**6, 512, "a device", 1, versions, "today", "c0ffee", seeds
    )


@pytest.mark.parametrize(
    ("shows", "what", "heading"),
    [
        ((True, True, True), REPRODUCES, "## What reproduces"),
        ((False, False, False), DOES_NOT, "## What does not reproduce"),
        ((True, False, True), DISAGREE, "## Where the seeds disagree"),
    ],
)
def test_every_verdict_is_the_records(shows: tuple[bool, ...], what: str, heading: str) -> None:
    record = a_record(*shows)
    found = {claim.says: verdict(values(claim, record), claim.least) for claim in CLAIMS}
    assert set(found.values()) == {what}, found
    page = paper_page.render(record)
    assert [line for line in page.splitlines() if line.startswith(("## What", "## Where"))] == [heading]
    listed = page.partition(heading)[2].partition("\n## ")[0]
    assert listed.count("\n- ") == len(CLAIMS)
    assert "{" not in page
    assert paper_page.summary(record).count(f"{what}: ") == len(CLAIMS)


def test_sentences_follow_the_record() -> None:
    falls, same = "Under ORPO it falls", "so they are nearly the same loss"
    page = " ".join(paper_page.render(a_record(False, False)).split())
    assert f"{falls} at none of the weights tried." in page
    assert same in page
    record = a_record(False, False)
    for seed in record.seeds:
        seed.run("orpo", 0.1).rejected[-1] = -9.0
        seed.run("orpo", 1.0).chosen[-1] = -0.5
    page = " ".join(paper_page.render(record).split())
    assert f"{falls} at beta 0.1, at every seed." in page
    assert same not in page
    assert "Fewer than three seeds" in page
    assert "Fewer than three seeds" not in paper_page.render(a_record(True, True, True))


def test_a_model_and_data_of_ones_own_are_named() -> None:
    page = paper_page.render(a_record(True, model="some/model", data="pairs.jsonl", device="cuda", bf16=True))
    page = " ".join(page.split())
    assert "The model is `some/model` (1.0 M parameters), and trains on 100 pairs of `pairs.jsonl`." in page
    for absent in ("Llama", "Python's documentation", "resident size", ", float32."):
        assert absent not in page
    assert ", bfloat16 autocast." in page
    assert "CUDA's count of allocated bytes" in page


def test_a_record_is_asked_what_it_can_answer() -> None:
    said = "seen again and again", "had shown no difference", "parts the two sides further"
    record = a_record(True, False)
    assert all(what in " ".join(paper_page.render(record).split()) for what in said)
    record.seeds[0].by_heart = []
    record.settings["betas"] = [1.0]
    assert not any(what in " ".join(paper_page.render(record).split()) for what in said)
    assert paper_page.drawn(record).axes[2].get_title() == "The two ratios, beta 1: held-out answers"


def test_spread_names_the_ends_where_seeds_differ() -> None:
    assert spread([1.0, 1.0], "{:.2f}") == "1.00"
    assert spread([6, 6, 6], "{:,}") == "6"
    assert spread([1.0, 2.0, 6.0], "{:+.1f} nats") == "+3.0 (+1.0 to +6.0) nats"


def test_the_committed_page_is_what_the_committed_record_renders() -> None:
    record = Record.load(DOCS / "paper.json")
    assert (DOCS / "paper.md").read_text("utf-8") == paper_page.render(record)
    assert (DOCS / paper_page.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert len(record.seeds) >= 3
    default = vars(paper.parse_arguments([]))
    assert {name: default[name] for name in record.settings if name != "device"} == {
        name: value for name, value in record.settings.items() if name != "device"
    }


def test_the_command_writes_record_page_and_figure_and_repeats_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        paper.main([*SMALL, *FEW, "--output", str(folder)])
        records.append(Record.load(folder / "paper.json"))
    one, two = records
    for first, second in zip(one.seeds[0].runs, two.seeds[0].runs, strict=True):
        assert dataclasses.replace(first, peak_mib=0) == dataclasses.replace(second, peak_mib=0)
        assert first.peak_mib > 0
    assert one.seeds[0].diversity == two.seeds[0].diversity
    trained = {(run.method, run.beta) for run in one.seeds[0].runs}
    assert trained == {("sft", None), ("orpo", 0.1), ("orpo", 1.0), ("probability_ratio", 1.0), ("dpo", 0.1)}
    written = capsys.readouterr().out
    assert written.count("reproduce") == 2 * len(CLAIMS)

    folder = tmp_path / "one"
    page = (folder / "paper.md").read_text("utf-8")
    assert page == paper_page.render(one)
    (folder / "images" / "paper.png").unlink()
    paper.main(["--render", "--output", str(folder)])
    assert (folder / "images" / "paper.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "paper.md").read_text("utf-8") == page


def pairs_of_a_reader(form: str) -> list[dict[str, Any]]:
    asked = [f"What is {number} and {number}?" for number in range(12)]
    rows = [
        {"prompt": text, "chosen": f" It is {2 * n}.", "rejected": f" Who knows, {n}?"} for n, text in enumerate(asked)
    ]
    if form == "strings":
        return rows

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {side: said("user", row["prompt"]) + said("assistant", row[side]) for side in ("chosen", "rejected")}
        for row in rows
    ]


@pytest.mark.parametrize(("family", "form"), [("llama", "strings"), ("opt", "conversations")])
def test_a_model_and_pairs_of_ones_own(family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = corpus.train_tokenizer(["What is it?"], 512)
    model = tiny(family, vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    for saved in (tokenizer, model):
        saved.save_pretrained(tmp_path / "model")
    rows = pairs_of_a_reader(form)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    own = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--max-length", "64"]
    paper.main([*own, *FEW, "--learning-rate", "1e-3", "--bf16", "--output", str(tmp_path / "out")])
    record = Record.load(tmp_path / "out" / "paper.json")
    assert record.pairs == len(rows)
    assert record.settings["data"] == "pairs.jsonl"
    for run in record.seeds[0].runs + record.seeds[0].by_heart:
        assert run.steps == [0, 2, 4]
        assert all(math.isfinite(value) for value in (*run.chosen, *run.rejected, *run.log_odds))
    tuned = record.seeds[0].run("sft")
    assert tuned.chosen[-1] > tuned.chosen[0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--betas", "0.1", "0"], "--betas must be positive"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--seeds", "1", "1"], "--seeds must differ"),
        (["--prompts", "40"], "--prompts must be at most --held-out, 32"),
        (["--hidden-size", "100"], "--hidden-size must be a positive multiple of 64"),
        (["--data", "no/such/file"], "there is no file no/such/file"),
    ],
)
def test_arguments_that_cannot_be_right(wrong: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper.parse_arguments(wrong)
    assert says in capsys.readouterr().err


def test_the_command_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "paper.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"is no record of this command"):
        paper.main(["--render", "--output", str(tmp_path)])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs_of_a_reader("strings")[0]))
    few = ["--data", str(tmp_path / "pairs.jsonl"), *SMALL, *FEW]
    with pytest.raises(SystemExit, match=r"1 pairs are fewer than --held-out and one batch, 4 \+ 2"):
        paper.main(few)
    with pytest.raises(SystemExit, match="nobody/nothing is no folder"):
        paper.main([*few, "--model", "nobody/nothing"])
