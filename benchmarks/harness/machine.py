"""What a figure was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """Short hash of the checkout, with "+" where tracked files, its records apart, differ from it; "" outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:
        return ""


def about(device: torch.device) -> dict[str, str]:
    """What every row says about where and when it was measured."""
    versions = {"torch": torch.__version__, "triton": version("triton")}
    return {"device": device_name(device), **versions, "commit": commit(), "date": today()}


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was asked to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the processor's with its cores and matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = _cpuinfo()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return f"{model[1].strip() if model else 'CPU'}, {_cores()} cores, {_matrix_unit(info)}"


def kind(device: torch.device) -> str:
    """A file name's worth of it: what machines of one kind have in common."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{_cores()}core-{_matrix_unit(_cpuinfo())}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _matrix_unit(info: str) -> str:
    """The widest instructions that bfloat16 products can use."""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)).split())
    for flag, name in (("amx_bf16", "amx"), ("avx512_bf16", "avx512bf16"), ("avx512f", "avx512"), ("avx2", "avx2")):
        if flag in flags:
            return name
    return "generic"
