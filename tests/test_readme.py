"""README's snippets run as they stand."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.integrations import unfuse, unpatch_trl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_an_unmodified_script(tmp_path: Path) -> None:
    (command,) = (text.strip() for text in snippets("console") if "orpo_kernels run" in text)
    shutil.copy(ROOT / "tests" / "integrations" / "stock_script.py", tmp_path / "train.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command.split(), "out.json", "--steps=1"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "orpo_kernels: patched trl ORPOTrainer" in done.stderr


@pytest.mark.slow
def test_two_lines_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = (text for text in snippets("python") if "patch_trl()" in text)
    assert len([line for line in snippet.splitlines() if line]) == 2
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "out.json"), "--steps=1"])
    try:
        exec(snippet, {})
        namespace = runpy.run_path(str(ROOT / "tests" / "integrations" / "stock_script.py"), run_name="__main__")
        assert namespace["ORPOTrainer"].get_batch_loss_metrics.__module__ == "orpo_kernels.integrations.trl"
    finally:
        unpatch_trl()


def run_snippets(*calls: str) -> dict[str, Any]:
    """Run the one snippet with each of these calls in turn, as a reader would who pastes them into one file."""
    namespace: dict[str, Any] = {}
    for call in calls:
        (snippet,) = (text for text in snippets("python") if call in text)
        exec(snippet, namespace)
    return namespace


def test_any_model_from_code(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_snippets("fuse(")
    model, tokens = found["model"], found["tokens"]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    printed = capsys.readouterr().out
    assert printed.startswith("fused: 1 calls of the head gave lazy logits")
    assert "full logits" not in printed
    logits = unfuse(model)(tokens).logits[:, :-1] / 0.7
    logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found["logps"], logps)
    assert found["accuracy"] == (logits.argmax(-1) == tokens[:, 1:]).float().mean()
    model.zero_grad()
    (-logps.mean()).backward()
    for ours, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_in_a_loop_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    namespace = run_snippets("orpo_loss(")
    printed = capsys.readouterr().out
    assert printed.startswith("plan store on backend torch: 3 passes over 102 targets")
    assert "'rewards/margins'" in printed
    model = namespace["model"]
    assert isinstance(model, torch.nn.Module)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_an_objective_of_your_own() -> None:
    found = run_snippets("orpo_loss(", "preference_loss(")
    assert all(parameter.grad.isfinite().all() for parameter in found["model"].parameters())
    for loss, objective, options in (
        ("out", found["hinge"], {"nll_weight": 0.5}),
        ("simpo", found["SimPO"](beta=2.0, gamma=0.5), {}),
        ("dpo", found["DPO"](beta=0.1), {"reference_logps": found["reference_logps"]}),
    ):
        expected = reference.preference_loss(*found["inputs"], objective, **options)["loss"]
        torch.testing.assert_close(found[loss].loss, expected)


def test_the_first_figures_are_those_of_the_table() -> None:
    """The second paragraph's sentence is written by hand, the table by `render`."""
    rows = {cells[1].strip(): cells for line in README.splitlines() if len(cells := line.split("|")) == 8}
    ours, naive = ((float(rows[name][2]) / 1e3, float(rows[name][5]) / 1024) for name in ("ours", "naive"))
    claim = re.search(r"takes ([\d.]+) s instead of ([\d.]+) s and ([\d.]+) GiB instead of ([\d.]+) GiB", README)
    assert claim is not None
    said = tuple(float(number) for number in claim.groups())
    assert said == tuple(round(number, 1) for number in (ours[0], naive[0], ours[1], naive[1]))


def test_every_link_leads_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text())) <= targets
