"""A plugin of pytest: fuse every model, if asked to, and write what became of each test and of its models' heads.

It takes TRL_SUITE_OUTPUT, a path; TRL_SUITE_FUSED: "", "lazy" for lazy logits, or "patch" for the trainers' patches and
lazy logits together, as the launcher has them; and TRL_SUITE_SECONDS, after which no other test begins.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import random
import time
from typing import Any

import pytest
import torch
import transformers.training_args

# TRL trains in bfloat16 unless told otherwise, and transformers asks for a GPU or for use_cpu then. CPUs have it too.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True

FUSED = os.environ["TRL_SUITE_FUSED"]
if FUSED:
    from orpo_kernels import integrations
    from orpo_kernels.integrations.lazy import heads

    integrations.patch_transformers()
    if FUSED == "patch":
        integrations.patch_trl()

_tests: dict[str, dict[str, Any]] = {}
_slow: list[str] = []
_end = time.monotonic() + float(os.environ.get("TRL_SUITE_SECONDS", "inf"))


class _Said(logging.Handler):
    """Counts what patched trainers say when they compute their loss themselves."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "fused the loss of this" in record.getMessage()


_said = _Said()
logging.getLogger("orpo_kernels").addHandler(_said)


def _full(found: Any) -> str:
    """The operation that needed all logits, and the last two parts of the path of the line it stands on."""
    return f"{found.operation} ({'/'.join(found.where.split('/')[-2:])})"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Each test alone decides what it draws, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    met = len(heads.reports()) if FUSED else 0
    said = _said.count
    result = yield
    found = _tests[item.nodeid]
    if FUSED:
        reports = [report for _, report in heads.reports()[met:]]
        found["lazy"] = sum(report.calls for report in reports)
        found["patched"] = _said.count - said
        found["full"] = sorted({_full(each) for report in reports for each in report.materialised})
        found["refusals"] = sorted({report.refusal for report in reports if report.refusal})
    if time.monotonic() > _end:
        item.session.shouldstop = "the time for this suite is over"
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = _tests.setdefault(report.nodeid, {"outcome": "passed"})
    if report.outcome == "passed":
        return
    found["outcome"] = report.outcome
    if report.skipped and isinstance(report.longrepr, tuple):
        found["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.skipped:
        found["reason"] = getattr(report, "wasxfail", "")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        found["reason"] = crash.message if crash else str(report.longrepr)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _slow.extend(item.nodeid for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "tests": _tests,
        "slow": len(_slow),
        "unreached": len(session.items) - len(_tests),
    }
    with open(os.environ["TRL_SUITE_OUTPUT"], "w") as file:
        json.dump(found, file, indent=1)
