"""README's snippets run as they stand."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orpo_kernels.integrations import unpatch_trl

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
        [*command.split(), "out.json", "--steps=1"], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
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


def test_the_loss_in_a_loop_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = (text for text in snippets("python") if "orpo_loss(" in text)
    namespace: dict[str, object] = {}
    exec(snippet, namespace)
    printed = capsys.readouterr().out
    assert printed.startswith("plan stash on backend torch: 3 mm over 102 scores")
    assert "'rewards/margins'" in printed
    model = namespace["model"]
    assert isinstance(model, torch.nn.Module)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text())) <= targets
