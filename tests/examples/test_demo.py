"""The demonstration's parts: the corpus, the training script, the checks that decide whether `make demo` passes."""

import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from examples import corpus, demo, start

pytestmark = pytest.mark.slow  # training runs

EXAMPLES = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def train_orpo() -> ModuleType:
    """The training script as a module; it finds its corpus beside itself, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("train_orpo")


def history(losses: list[float], module: str | None = None) -> demo.History:
    """What the training script writes, as far as the demonstration reads it."""
    steps = [{"loss": loss, "logps/chosen": -loss, "logps/rejected": -loss - 1} for loss in losses]
    return {
        "arguments": {"beta": 5.0},
        "steps": steps,
        "seconds_per_step": 0.5,
        "wall_seconds": 2.0,
        "peak_memory_bytes": 2 * 10**9,
        "memory_before_training_bytes": 10**9,
        "device": "cpu",
        "vocabulary": 32_768,
        "parameters": 10**7,
        "foreign_methods": {} if module is None else {"concatenated_forward": module},
    }


def histories(stock: list[float], patched: list[float]) -> dict[demo.Run, demo.History]:
    ours = "orpo_kernels.integrations.trl"
    return {demo.STOCK: history(stock), demo.PATCHED: history(patched, ours), demo.TUNED: history(patched, ours)}


def test_pairs_are_deterministic_complete_and_corrupted() -> None:
    pairs = corpus.preference_pairs(seed=1)
    assert pairs == corpus.preference_pairs(seed=1)
    assert pairs != corpus.preference_pairs(seed=2)
    assert len(pairs) > 300
    for pair in pairs:
        assert tuple(pair) == corpus.FIELDS
        assert all(text.strip() for text in pair.values())
        assert pair["chosen"] != pair["rejected"]
        assert sorted(pair["chosen"].split()) == sorted(pair["rejected"].split())


def test_tokenizer_gives_back_any_text() -> None:
    tokenizer = corpus.train_tokenizer(["a few words of one's own"])
    assert len(tokenizer) <= corpus.VOCABULARY
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for text in (corpus.preference_pairs()[0]["chosen"], "déjà vu, 你好 🙂\n\ttabs \x00", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_load_pairs_keeps_the_three_fields_and_skips_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "p", "chosen": "c\u2028c", "rejected": "r"}
    file.write_text(json.dumps({**pair, "source": 3}, ensure_ascii=False) + "\n\n" + json.dumps(pair) + "\n", "utf-8")
    assert corpus.load_pairs(file) == [pair, pair]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pairs"),
        ("{}\n", "line 1: chosen is missing"),
        ('{"prompt": "", "chosen": "c", "rejected": "r"}', "line 1: prompt is missing, empty"),
        ('{"chosen": [{"role": "user"}], "rejected": "r"}', "chosen is missing, empty or neither a string nor a list"),
        (
            '{"chosen": [{"role": "user", "content": "c"}], "rejected": "r"}',
            "line 1: some fields are strings and some conversations",
        ),
        ('\n{"prompt": "p", "chosen": "", "rejected": "r"}', "line 2: chosen is missing, empty"),
        ('{"prompt": "p", "chosen": "c", "rejected": ["r"]}', "rejected is missing, empty or neither"),
        ("[1]", "line 1: expected an object"),
        ("nonsense", "line 1: not JSON"),
    ],
)
def test_load_pairs_names_the_line_and_the_fault(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        corpus.load_pairs(file)


def test_script_arguments(train_orpo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_orpo.parse_arguments([]).learning_rate > 1e-4
    assert train_orpo.parse_arguments(["--model", "some/model"]).learning_rate < 1e-4  # pretrained: a gentle default
    assert train_orpo.parse_arguments(["--model", "some/model", "--learning-rate", "1"]).learning_rate == 1
    for wrong in (
        ["--max-steps", "0"],
        ["--data", "no/such/file"],
        ["--model", "./no/such/folder"],
        ["--hidden-size", "100"],
    ):
        with pytest.raises(SystemExit):
            train_orpo.parse_arguments(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_script_sees_a_patch_behind_a_wrapper(train_orpo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = train_orpo.ORPOTrainer.concatenated_forward

    @functools.wraps(stock)  # carries the original's __module__
    def wrapper(*arguments: Any) -> Any:
        return stock(*arguments)

    before = train_orpo.foreign_methods()
    monkeypatch.setattr(train_orpo.ORPOTrainer, "concatenated_forward", wrapper)
    assert train_orpo.foreign_methods() == {**before, "concatenated_forward": __name__}


def train_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train_orpo.py"), *arguments]
    small = ["--max-steps", "2", "--batch-size", "2", "--max-length", "48", "--hidden-size", "64", "--layers", "1"]
    return subprocess.run(
        command + small, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )


def test_script_trains_on_a_file_and_cuts_long_texts(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "one two " * 300, "chosen": "three " * 300, "rejected": "four"},
        {"prompt": "un", "chosen": " deux", "rejected": " trois " * 300},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    run = train_in(tmp_path, "--data", "pairs.jsonl", "--output", "out")
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "out" / "history.json").read_text("utf-8"))
    assert [step["step"] for step in written["steps"]] == [1, 2]
    assert len(written["step_seconds"]) == 2
    for step in written["steps"]:
        for metric in ("loss", "nll_loss", "grad_norm", "logps/chosen", "logps/rejected", "log_odds_chosen"):
            assert math.isfinite(step[metric]), metric
    assert written["foreign_methods"] == {}
    assert written["vocabulary"] >= 32_768
    assert written["peak_memory_bytes"] >= written["memory_before_training_bytes"] > 0


def test_script_trains_on_conversations_from_the_model_it_saved(tmp_path: Path) -> None:
    """TRL's own form of a preference dataset: no prompt but the messages that both sides begin with."""
    asked = {"role": "user", "content": "What colour is the sky?"}
    pairs = [
        {
            "chosen": [asked, {"role": "assistant", "content": answer}],
            "rejected": [asked, {"role": "assistant", "content": "It is green."}],
        }
        for answer in ("It is blue.", "Blue, by day.")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    first = train_in(tmp_path, "--data", "pairs.jsonl", "--output", "first")
    assert first.returncode == 0, first.stderr
    second = train_in(tmp_path, "--data", "pairs.jsonl", "--output", "second", "--model", "./first/model")
    assert second.returncode == 0, second.stderr
    assert json.loads((tmp_path / "second" / "history.json").read_text("utf-8"))["pairs"] == 2


def test_script_names_a_model_that_is_nowhere(tmp_path: Path) -> None:
    run = train_in(tmp_path, "--model", "nobody/nothing")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("train_orpo: --model: nobody/nothing is no folder with a model and its tokenizer")


def test_pairs_become_the_strings_that_trl_makes() -> None:
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("x", "c"))
    )
    tokenizer = corpus.train_tokenizer(["a"])
    (explicit, implicit, plain) = start.as_strings(
        [
            {"prompt": [user], "chosen": [good], "rejected": [{**good, "content": "c"}]},
            {"chosen": [user, good], "rejected": [user, {**good, "content": "c"}]},
            {"chosen": "a b", "rejected": "a c"},
        ],
        tokenizer,
    )
    assert explicit == implicit == {"prompt": "user: a\nassistant: ", "chosen": "b\n", "rejected": "c\n"}
    assert plain == {"prompt": "a", "chosen": " b", "rejected": " c"}
    assert corpus.texts([{"chosen": [user, bad], "rejected": "r"}]) == ["a", "c", "r"]


def test_demo_arguments_reach_the_script() -> None:
    assert demo.parse_arguments([]) == (Path("demo-output"), ["--beta", "5"])
    own = ["--data", "d", "--model", "m", "--max-steps", "6", "--beta", "1"]
    assert demo.parse_arguments(["--bf16", *own, "--output", "o"]) == (Path("o"), ["--bf16", *own])


def test_demo_refuses_a_run_that_was_not_patched_or_should_not_be() -> None:
    runs = histories([2.0], [2.0])
    demo.check_patching(runs)
    with pytest.raises(SystemExit, match=r"should come from orpo_kernels in \(b\).* nowhere"):
        demo.check_patching({**runs, demo.PATCHED: history([2.0])})
    with pytest.raises(SystemExit, match=r"should not come from orpo_kernels in \(a\)"):
        demo.check_patching({**runs, demo.STOCK: runs[demo.PATCHED]})


def test_demo_stops_at_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(' '.join(['no luck with', *sys.argv[1:3]]))")
    monkeypatch.setattr(demo, "SCRIPT", script)
    with pytest.raises(SystemExit, match=r"\(a\) stock TRL failed with exit code 1"):
        demo.train(demo.STOCK, tmp_path, ["--data", "d"], demo.Console(stderr=True))
    assert "no luck with --data d" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("patched", "code", "says"),
    [
        ([3.0, 2.000001], None, "relative 5.0e-07"),
        ([3.0, 2.1], 1, "FAILED"),
        ([3.0, math.nan], 1, "FAILED"),
        ([3.0, 2.0], None, "Not one bit differs"),
    ],
)
def test_demo_passes_only_if_the_losses_agree(
    patched: list[float],
    code: int | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = histories([3.0, 2.0], patched)
    monkeypatch.setattr(demo, "train", lambda run, *_: runs[run])
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path)])
    if code is None:
        demo.main()
    else:
        with pytest.raises(SystemExit) as stopped:
            demo.main()
        assert stopped.value.code == code
    assert says in capsys.readouterr().out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((tmp_path / "summary.json").read_text("utf-8"))["runs"]) == {"stock", "patched", "tuned"}


def test_running_mean() -> None:
    assert demo.running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
