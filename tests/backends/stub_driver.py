"""Launches as on an H100, without one: Triton's own dispatch, launcher and tensor maps over a driver that starts nothing.

``stub_cuda.c`` stands for libcuda and refuses what a real driver would. Tensors stay on the CPU, what the host has to
read is computed in plain torch, and the numbers mean nothing. ``python -m tests.backends.stub_driver``, without
``TRITON_INTERPRET``, makes calls of many kinds and prints as JSON what they launched; ``--profile`` times the host.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

CORES = 132
OLDER, NEWER = "a call", "the same call of another batch"


def load() -> ctypes.CDLL:
    """Build the stub, and make Triton take it for the driver of a Hopper GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    folder = tempfile.mkdtemp(prefix="stub-cuda-")
    library = f"{folder}/libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    command = ["cc", "-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", library, str(source)]
    subprocess.run(command, check=True)
    stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before Triton's module asks for one of this name
    stub.stub_kernel.restype = ctypes.c_char_p
    os.environ["TRITON_LIBCUDA_PATH"] = folder

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(StubDriver())
    return stub
