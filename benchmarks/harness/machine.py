"""What a figure was measured on."""

import datetime
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MATRIX_UNITS = {"amx_bf16": "amx", "avx512_bf16": "avx512bf16", "avx512f": "avx512", "avx2": "avx2"}  # the widest first


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def git(*arguments: str) -> str:
    """What git says in this checkout; OSError or CalledProcessError where it says nothing."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """Short hash of the checkout, with "+" where tracked files, its records apart, differ from it; "" outside one."""
    try:
        changed = git("status", "--porcelain", "-uno", "--", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
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
    """The version installed, or "" where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the processor's with its cores and matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model, cores, unit = _processor()
    return f"{model}, {cores} cores, {unit}"


def kind(device: torch.device) -> str:
    """A file name's worth of it: what machines of one kind have in common."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    _, cores, unit = _processor()
    return f"cpu-{cores}core-{unit}"


def _processor() -> tuple[str, int, str]:
    """Model, cores, and the widest instructions that bfloat16 products can use."""
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", info, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)).split())
    unit = next((name for flag, name in MATRIX_UNITS.items() if flag in flags), "generic")
    return model[1] if model else "CPU", cores, unit
