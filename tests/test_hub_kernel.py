"""The package as a repository of Hugging Face's ``kernels``: complete, importable under any name, and the same."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import orpo_kernels
from tests.cases import make
from tools import hub_kernel


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    hub_kernel.write(folder)
    return folder


def loaded(variant: Path) -> ModuleType:
    """What ``get_local_kernel`` of ``kernels`` 0.17 does with the variant it has chosen."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def assert_the_same(module: ModuleType) -> None:
    case = make(torch.float32)
    ours = orpo_kernels.orpo_loss(case.hidden, case.weight, case.labels, beta=0.3)
    theirs = module.orpo_loss(case.hidden, case.weight, case.labels, beta=0.3)
    assert type(theirs) is not type(ours)
    for name, value in ours.metrics().items():
        assert torch.equal(theirs.metrics()[name], value), name
    expected = case.grads(ours.loss)
    for name, grad in case.grads(theirs.loss).items():
        assert torch.equal(grad, expected[name]), name


def test_builds_live_beside_the_package_and_each_other(repository: Path) -> None:
    """Each with operators of its own, also in a compiled graph."""
    builds = [loaded(repository / "build" / name) for name in ("torch-cpu", "torch-universal")]
    case = make(torch.float32)
    for build in builds:
        assert build.__all__ == orpo_kernels.__all__
        assert_the_same(build)
        compiled = torch.compile(build.orpo_loss, backend="eager", fullgraph=True)
        expected = build.orpo_loss(case.hidden, case.weight, case.labels).loss
        torch.testing.assert_close(compiled(case.hidden, case.weight, case.labels).loss, expected)


def test_a_build_needs_no_package_of_its_name(repository: Path) -> None:
    """In a process of its own, by the folder that older versions of ``kernels`` look for."""
    code = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('orpo_kernels_0', sys.argv[1])\n"
        "sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "logps = module.linear_logprobs(torch.randn(5, 8), torch.randn(20, 8), torch.arange(5))\n"
        "print(len(logps), [name for name in sys.modules if name.partition('.')[0] == 'orpo_kernels'])\n"
    )
    path = repository / "build" / "torch-universal" / "orpo_kernels" / "__init__.py"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "5 []\n"


def test_metadata_and_files(repository: Path) -> None:
    variants = sorted((repository / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-universal"]
    for variant in variants:
        found = json.loads((variant / "metadata.json").read_text())
        assert found["id"].isidentifier()
        assert ("archs" in found["backend"]) == (found["backend"]["type"] != "cpu")
        files = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*.py")}
        assert found["digest"]["files"].keys() == files.keys()
        assert {"__init__.py", "backends/kernels/exp_gemm.py", "orpo_kernels/__init__.py"} <= files.keys()
        for name, path in files.items():
            digest = base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            assert found["digest"]["files"][name] == digest
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                roots = {module.partition(".")[0] for module in modules}
                assert roots <= {*sys.stdlib_module_names, "torch", "triton"}, (name, roots)


def test_the_real_loader(repository: Path) -> None:
    kernels = pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed: pip install kernels")
    assert_the_same(kernels.get_local_kernel(repository))
