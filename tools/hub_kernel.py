"""Write the package as a kernel repository of Hugging Face's ``kernels``, which can be loaded from its folder.

usage: python -m tools.hub_kernel [FOLDER]      default: build/hub-kernel

    from kernels import get_local_kernel
    orpo = get_local_kernel(Path("build/hub-kernel"))
    orpo.orpo_loss(hidden, weight, labels)

A repository holds a folder for each backend, with the Python files, a folder under the kernel's name for older versions
of ``kernels``, and ``metadata.json``. Several builds may be loaded into one process, so a build imports
nothing by its name: imports become relative, and operators are registered under an identifier that hangs on the
content. Trainers' patches and the launcher are left out: they are told of by name in scripts, for which the package is
installed. The loss is no layer for ``use_kernels``: layers there replace the forward of a module that a model has, and
no model has a module that takes hidden states, a head and labels.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import orpo_kernels

NAME = "orpo_kernels"
PACKAGE = Path(orpo_kernels.__file__).parent
LEFT_OUT = ("cli.py", "__main__.py", "startup/")
VERSION = 0  # of the kernel's interface; by the convention of the Hub 0 is one that may still change
# Folders by the backend they are for: the same files, with the chips that the Triton kernels are compiled for. What was
# one universal folder until kernels 0.9 is one for each backend now; newer versions still take it on any other device.
BACKENDS = {"universal": "cpu", "cpu": "cpu", "cuda": "cuda", "rocm": "rocm"}
ARCHS = {"cuda": ["8.0", "8.6", "9.0", "10.0"], "rocm": ["gfx942"]}
FORWARDING = '''"""For versions of ``kernels`` that look for a folder under the kernel's name."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _path = Path(__file__).parents[1] / "__init__.py"
    _spec = importlib.util.spec_from_file_location("{id}", _path)
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
__all__ = sys.modules["{id}"].__all__
globals().update((name, getattr(sys.modules["{id}"], name)) for name in __all__)
'''


def sources() -> dict[str, str]:
    """The Python files of the package by path, with relative imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith((*LEFT_OUT, "integrations/")):
            found[name] = relative(path.read_text(), depth=name.count("/"))
    return found


def relative(source: str, depth: int) -> str:
    """``source`` of a file ``depth`` folders below the package, with its imports of the package made relative."""
    dots = "." * (depth + 1)
    return re.sub(rf"^(\s*from ){NAME}(?:\.([\w.]+))?(?= import )", rf"\1{dots}\2", source, flags=re.MULTILINE)


def write(folder: Path) -> list[Path]:
    """Write the repository, in place of one that is there; its variants."""
    files = sources()
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:7]
    shutil.rmtree(folder, ignore_errors=True)
    variants = []
    for framework, backend in BACKENDS.items():
        identifier = f"_{NAME}_{framework}_{content}"
        own = {name: text.replace(f'"{NAME}::', f'"{identifier}::') for name, text in files.items()}
        own[f"{NAME}/__init__.py"] = FORWARDING.format(id=identifier)
        variant = folder / "build" / f"torch-{framework}"
        for name, text in own.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        described = metadata(identifier, backend, own)
        (variant / "metadata.json").write_text(json.dumps(described, indent=2) + "\n")
        variants.append(variant)
    return variants


def metadata(identifier: str, backend: str, files: dict[str, str]) -> dict[str, Any]:
    """What ``metadata.json`` says of a build."""
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    return {
        "name": NAME.replace("_", "-"),
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend, **({"archs": ARCHS[backend]} if backend in ARCHS else {})},
        "digest": {"algorithm": "sha256", "files": digests},
    }


if __name__ == "__main__":
    for each in write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/hub-kernel")):
        print(each)
