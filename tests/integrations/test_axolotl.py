"""The plugin under Axolotl's plugin interface.

Axolotl itself is not installed here: its manager and base class are written anew below as they were read in Axolotl
0.19 and in its repository of July 2026. ``make ecosystem`` trains with the real one, through this plugin too.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels.integrations import fusion_report
from orpo_kernels.integrations.trl_cpo import PATCH as CPO_PATCH
from orpo_kernels.integrations.trl_orpo import PATCH as ORPO_PATCH
from tests.integrations import test_trl as orpo
from tests.integrations.test_trl import CONFIGS, ORPOTrainer, model

NAME = "orpo_kernels.integrations.axolotl.OrpoKernelsPlugin"


class BasePlugin:
    """The hooks of Axolotl's base class that a manager calls around a run; each does nothing."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def pre_model_load(self, cfg: Any) -> None: ...

    def post_model_load(self, cfg: Any, model: Any) -> None: ...

    def get_trainer_cls(self, cfg: Any) -> Any: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...

    def post_train_unload(self, cfg: Any) -> None: ...


def load_plugin(name: str) -> Any:
    """As Axolotl does with an entry of ``plugins:``."""
    module, _, class_name = name.rpartition(".")
    return getattr(importlib.import_module(module), class_name)()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin as Axolotl would make it, and whatever it patched taken back."""
    torch.use_deterministic_algorithms(False)  # trainers seed themselves
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", BasePlugin, raising=False)
    monkeypatch.delitem(sys.modules, "orpo_kernels.integrations.axolotl", raising=False)
    found = load_plugin(NAME)
    yield found
    found.post_train_unload({})
    monkeypatch.delitem(sys.modules, "orpo_kernels.integrations.axolotl", raising=False)


class AxolotlORPOTrainer(ORPOTrainer):  # type: ignore[misc]
    """As Axolotl's: mixins that change neither the loss nor the log-probabilities, and tags."""

    tag_names = ("axolotl", "orpo")


@pytest.mark.slow
@pytest.mark.works("Axolotl's plugins: (its interface written anew)", by="ORPO patch")
@pytest.mark.works("Axolotl's plugins: (its interface written anew)", by="lazy logits")
def test_a_run_from_registration_to_unload(plugin: Any, tmp_path: Path) -> None:
    plain: Any = model(CONFIGS["llama"]())
    ids = torch.arange(3, 12)[None]
    expected = plain(input_ids=ids, labels=ids).loss
    stock, weights = orpo.train(model(CONFIGS["llama"]()), tmp_path, False, cls=AxolotlORPOTrainer)
    config = {"plugins": [NAME], "rl": "orpo"}
    plugin.register(config)
    assert plugin.get_input_args() is None
    assert plugin.get_trainer_cls(config) is None
    assert not ORPO_PATCH.applied
    plugin.pre_model_load(config)
    assert ORPO_PATCH.applied
    assert CPO_PATCH.applied
    of: Any = model(CONFIGS["llama"]())
    torch.testing.assert_close(of(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=0)
    assert fusion_report(of).fused
    run = orpo.trainer(model(CONFIGS["llama"]()), tmp_path, cls=AxolotlORPOTrainer)
    run.train()
    for theirs, mine in zip(stock, run.state.log_history, strict=True):
        assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in run.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)
    assert run._orpo_kernels_said == {"fused"}
    plugin.post_train_unload(config)
    assert not ORPO_PATCH.applied
    assert not CPO_PATCH.applied
    later: Any = model(CONFIGS["llama"]())
    later(input_ids=ids)
    assert not fusion_report(later).fused


def test_the_package_imports_no_axolotl() -> None:
    """Without it everything else is there, and the plugin's module says what it lacks."""
    code = (
        "import sys, orpo_kernels.integrations as i; i.patch_trl, i.patch_transformers, i.patch_liger\n"
        "assert not any(name.startswith('axolotl') for name in sys.modules)\n"
        "try:\n    import orpo_kernels.integrations.axolotl\n"
        "except ModuleNotFoundError as error:\n    print(error.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("axolotl")
