"""Launches as on an H100, without one: Triton's dispatch, launcher and tensor maps over a driver that starts nothing.

``stub_cuda.c`` stands for libcuda and refuses what a real one would. Tensors stay on the CPU, what the host has to read
is computed in plain torch, and no other number means anything. ``python -m tests.backends.stub_driver``, without
``TRITON_INTERPRET``, makes the calls of ``benchmarks.lab.proof`` and prints as JSON what each launched and compiled.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.lab import proof
from benchmarks.lab.compile import Recorder
from orpo_kernels import targets
from orpo_kernels.backends import kernels

CORES = 132  # multiprocessors
BATCHES = ({"pairs": 2, "length": 24}, {"pairs": 5, "length": 33}, {"pairs": 1, "length": 1})


def load() -> ctypes.CDLL:
    """Build the stub, and make Triton take it for the driver of a Hopper GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    folder = tempfile.mkdtemp(prefix="stub-cuda-")
    library, source = f"{folder}/libcuda.so.1", Path(__file__).with_name("stub_cuda.c")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["cc", "-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", library, str(source)]
    subprocess.run(command, check=True)
    stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before a module of Triton's asks for one of this name
    stub.stub_kernel.restype = ctypes.c_char_p
    os.environ["TRITON_LIBCUDA_PATH"] = folder

    from triton.backends.nvidia.driver import CudaDriver

    class StubDriver(CudaDriver):  # type: ignore[misc, no-any-unimported]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(StubDriver())
    return stub


def launched(stub: ctypes.CDLL) -> dict[str, int]:
    """How often each kernel was started since this was last asked."""
    count, found, place = ctypes.c_int(), {}, 0
    while (name := stub.stub_kernel(place, ctypes.byref(count))) is not None:
        found[name.decode()] = count.value
        place += 1
    stub.stub_reset()
    return {name: times for name, times in found.items() if times}


def call(batch: dict[str, int], kind: proof.Kind) -> None:
    inputs = proof.given(kind, torch.device("cpu"), **batch, times=1)
    backend = Recorder(arch="sm_90", config=kind.config("sm_90"))
    room = kind.workspace(inputs.labels, kind.vocab)
    proof.outputs(kind, inputs, kind.function, backend=backend, workspace_bytes=room)


def host_microseconds(repeats: int = 50) -> float:
    """Python's time from the end of the wait for the counts to the launch of E's GEMM, the least of some calls.

    On a GPU that is what the device has to bridge. What the plain torch of this module does meanwhile is not in it.
    """
    wait, launch, compact = targets._on_host, kernels.exp_gemm.exp_gemm_tma, targets.compact
    marks, times, known = {}, [], []

    def waited(*arguments: Any) -> Any:
        found = wait(*arguments)
        marks["waited"] = time.perf_counter()
        return found

    def again(*arguments: Any) -> Any:
        if not known:
            known.append(compact(*arguments))
        return known[0]

    def started(*arguments: Any) -> None:
        launch(*arguments)
        times.append(time.perf_counter() - marks["waited"])

    with (
        mock.patch.object(targets, "_on_host", waited),
        mock.patch.object(targets, "compact", again),
        mock.patch.object(kernels.exp_gemm, "exp_gemm_tma", started),
    ):
        for _ in range(repeats):
            call({"pairs": 16, "length": 12}, proof.Kind())
    return 1e6 * min(times)


def refuses() -> list[str]:
    """Tensor maps that a real driver does not take, of those tried: else the calls above would prove little."""
    from triton.runtime import driver

    def encode(address: int = 0, box: tuple[int, int] = (128, 64), stride: int = 128) -> None:
        driver.active.utils.fill_tma_descriptor_tiled(address, 3, 2, 10, box, (1000, 128), (stride, 1), 0)

    tried: dict[str, dict[str, Any]] = {
        "none": {},
        "address": {"address": 8},
        "rows of a box": {"box": (512, 64)},
        "bytes of a box's row": {"box": (128, 128)},
        "stride": {"stride": 132},
    }
    found = []
    for name, options in tried.items():
        try:
            encode(**options)
        except RuntimeError:
            found.append(name)
    return found


def main() -> None:
    stub = load()
    found: dict[str, Any] = {}
    with mock.patch.object(kernels.exp_gemm, "_cores", return_value=CORES):
        for name, kind in proof.KINDS.items():
            compiled, started = [], []
            for batch in BATCHES:
                before = proof.binaries()
                call(batch, kind)
                compiled.append(proof.binaries() - before)
                started.append(launched(stub))
            found[name] = {"compiled": compiled, "launched": started}
        host = host_microseconds()
    json.dump({"kinds": found, "host_microseconds": host, "refuses": refuses()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
