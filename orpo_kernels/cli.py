"""``orpo-kernels`` and ``python -m orpo_kernels``: run a training script patched, or say what is here."""

from __future__ import annotations

import argparse
import atexit
import importlib
import importlib.metadata
import os
import platform
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import orpo_kernels

PREFIX = "orpo_kernels:"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` and do as it says; the exit code."""
    parser = argparse.ArgumentParser(prog="orpo-kernels", description="ORPO without full logits.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {orpo_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a training script, unmodified, with its trainers patched",
        description="Run SCRIPT as python would, with every trainer it imports patched. Also under torchrun "
        "(torchrun ... -m orpo_kernels run SCRIPT) and accelerate (accelerate launch ... -m orpo_kernels run SCRIPT).",
    )
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="passed to the script as they are")
    commands.add_parser("doctor", help="versions, device, backends with reasons, and what can be patched")
    options = parser.parse_args(argv)
    if options.command == "doctor":
        return doctor()
    return run_script(options.script, options.arguments)


def run_script(script: str, arguments: Sequence[str]) -> int:
    """Run ``script`` as ``__main__`` with its trainers patched; its exceptions and exit codes are its own."""
    from orpo_kernels.integrations import TRAINERS, Trainer, when_imported

    if not Path(script).is_file():
        print(f"{PREFIX} no such script: {script}", file=sys.stderr)
        return 2
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one line a machine, not one a process
    imported: list[str] = []

    def say(line: str) -> None:
        if speaks:
            print(f"{PREFIX} {line}", file=sys.stderr, flush=True)

    def patch(trainer: Trainer) -> None:
        imported.append(trainer.library)
        try:
            trainer.load().patch()
        except ImportError as error:  # a version we do not know: the script still runs, on its library's own path
            say(f"patched nothing: {error}")
        else:
            say(f"patched {trainer.target} ({trainer.library} {_version(trainer.library)})")

    for trainer in TRAINERS:
        when_imported(trainer.module, lambda trainer=trainer: patch(trainer))  # type: ignore[misc]

    def report() -> None:
        if not imported:
            say(f"patched nothing: {script} never imported {', '.join(trainer.module for trainer in TRAINERS)}")

    atexit.register(report)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
    return 0


def doctor() -> int:
    """Print what a bug report needs."""
    from orpo_kernels.backends import by_preference
    from orpo_kernels.integrations import TRAINERS

    print(f"orpo_kernels {orpo_kernels.__version__}, python {platform.python_version()}, {platform.platform()}")
    for library in ("torch", "triton", "transformers", "trl", "accelerate", "peft", "liger-kernel"):
        print(f"  {library:<13} {_version(library) or 'not installed'}")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        print(f"device: {torch.cuda.get_device_name()} ({torch.cuda.device_count()} visible)")
    else:
        device = torch.device("cpu")
        print(f"device: cpu, {torch.get_num_threads()} threads")
    used = False
    for backend in by_preference(device):
        reason = backend.refuses(device, torch.bfloat16)
        print(f"backend {backend.name}: {reason or ('available' if used else 'used')}")
        used = used or reason is None
    for trainer in TRAINERS:
        print(f"patch {trainer.target}: {_patchable(trainer.library, trainer.integration)}")
    return 0


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _patchable(library: str, integration: str) -> str:
    if _version(library) is None:
        return f"no, {library} is not installed (pip install 'orpo_kernels[hf]')"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trl says of its experimental modules what nobody asked here
            importlib.import_module(integration)
    except ImportError as error:
        return f"no, {error}"
    return "yes"
