"""Every kernel in every shipped configuration, compiled for chips that are not there.

Real calls on small CPU tensors record their launches instead of starting them; what they would have launched, with the
types, constants and tiles of the chip's row in the configuration table, is compiled for that chip. Registers,
spills and shared memory come from the assembler's own report, the tensor-core instruction from the assembly.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.report.tables import text
from orpo_kernels import linear_logprobs, orpo_loss, targets
from orpo_kernels.backends.kernels.configs import config
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.targets import Columns


@dataclass(frozen=True)
class Target:
    """A chip: what Triton calls it, the shared memory of one program, and how its tensor cores are spelled."""

    backend: str
    arch: int | str
    warp: int
    shared_limit: int  # bytes, of one program
    tensor_core: tuple[str, ...]  # patterns of the instruction, the widest first


# Shared memory: CUDA programming guide, table of technical specifications per compute capability (a program may hold
# what its multiprocessor has, less 1 KiB); CDNA 3 instruction set architecture guide, 64 KiB of LDS.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, (r"mma\.sync",)),
    "sm_86": Target("cuda", 86, 32, 99 << 10, (r"mma\.sync",)),
    "sm_90": Target("cuda", 90, 32, 227 << 10, ("wgmma", r"mma\.sync")),
    "sm_100": Target("cuda", 100, 32, 227 << 10, (r"tcgen05\.mma", r"mma\.sync")),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, (r"v_mfma\w*",)),
}
GEMMS = ("exp_gemm_tma_kernel", "exp_gemm_kernel", "recompute_overflowed_kernel")
# Arguments that are None where a branch of a kernel is off.
OF_GEMM = ("exp_logits", "sums", "logit_sums", "bias", "softcap", "mean_weight")
OPTIONAL = (*OF_GEMM, "grad_logp_hidden", "source_rows", "out_rows", "a", "b", "label_entry")
FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {**FLOATS, torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1"}


@dataclass(frozen=True)
class CompileRow:
    """One binary."""

    kernel: str
    target: str
    config: str  # dtypes, tiles, warps, stages, and which branches are on
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_core: str  # the instruction found, or nothing
    wants_tensor_core: bool  # a product of 16-bit matrices
    triton: str

    @property
    def problem(self) -> str:
        """What is wrong with it, or nothing."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        if self.shared_bytes > self.shared_limit:
            return f"{self.shared_bytes} bytes of shared memory, the chip has {self.shared_limit}"
        return "no tensor cores" if self.wants_tensor_core and not self.tensor_core else ""


@dataclass(frozen=True)
class Launch:
    """What decides a kernel's binary."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    warps: int
    stages: int


class Recorder(TritonBackend):
    """Launches are recorded, not started; what the host has to read is computed in plain torch."""

    least_scratch = 1 << 16  # so little that a head of 1,024 tokens is several slices

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def count(self, *arguments: Any) -> torch.Tensor:
        super().count(*arguments)
        return targets.count(*arguments)

    def compact(self, *arguments: Any) -> Columns:
        super().compact(*arguments)
        return targets.compact(*arguments)


@contextmanager
def recording(take: Callable[[Any, Sequence[Any], dict[str, Any]], None]) -> Iterator[None]:
    """Within, a kernel that would be started goes to ``take`` instead, with its arguments and constants."""
    from triton.runtime.jit import KernelInterface

    def start(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **meta: take(kernel, args, meta)

    with mock.patch.object(KernelInterface, "__getitem__", start):
        yield


def launches(arch: str) -> list[Launch]:
    """Every distinct launch of calls that between them take every branch that leads to another binary."""
    found: dict[Launch, None] = {}

    def record(kernel: Any, args: Sequence[Any], meta: dict[str, Any]) -> None:
        found[_launch(kernel, args, meta)] = None

    shipped = Recorder(arch=arch)
    with recording(record):
        for dtype in FLOATS:
            _call(shipped, "HW", dtype)
        _call(shipped, "H")
        _call(shipped, "")
        _call(shipped, "HWb", workspace_bytes=1)
        _call(shipped, "HW", nll_reduction="sequence")
        # Everything the epilogue can do, and rows that are not 16-byte aligned.
        _call(shipped, "HW", softcap=30.0)
        _call(shipped, "HWb")
        _call(shipped, "HWb", softcap=30.0)
        _call(shipped, "HWb", features=99, softcap=30.0)
        _call(shipped, "HW", function=linear_logprobs, workspace_bytes=1)
        # The forms that were not chosen, so that they can be raced.
        for form in ("pointer", "library"):
            other = config(arch, torch.bfloat16)._replace(form=form)  # type: ignore[arg-type]
            _call(Recorder(arch=arch, config=other), "HW")
    return list(found)


def _call(
    backend: Recorder,
    trained: str,  # of H(idden), W(eight) and b(ias); a bias is there only if it is trained
    dtype: torch.dtype = torch.bfloat16,
    features: int = 128,
    function: Callable[..., Any] = orpo_loss,
    **options: Any,
) -> None:
    hidden = torch.ones(4, 16, features, dtype=dtype).requires_grad_("H" in trained)
    weight = torch.ones(1024, features, dtype=dtype).requires_grad_("W" in trained)
    bias = torch.ones(1024, dtype=dtype).requires_grad_() if "b" in trained else None
    labels = torch.ones(4, 16, dtype=torch.int64)
    out = function(hidden, weight, labels, bias=bias, backend=backend, **options)
    if trained:
        (out if isinstance(out, torch.Tensor) else out.loss).sum().backward()


def _launch(kernel: Any, args: Sequence[Any], meta: dict[str, Any]) -> Launch:
    meta = dict(meta)
    warps, stages = meta.pop("num_warps", 4), meta.pop("num_stages", 3)
    fixed = {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment}
    signature, constants, divisible = {}, dict(meta), []
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if name not in fixed:
                divisible.append(place)
        elif isinstance(value, int):
            signature[name] = "i32"
            if name not in fixed and value % 16 == 0:
                divisible.append(place)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    ordered = tuple((name, signature.get(name, "constexpr")) for name in kernel.arg_names)
    return Launch(
        kernel.__module__, kernel.__name__, ordered, tuple(sorted(constants.items())), tuple(divisible), warps, stages
    )


def compile_one(arch: str, launch: Launch) -> CompileRow:
    """Compile one launch for one chip and read the assembler's report."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = TARGETS[arch]
    source = triton.compiler.ASTSource(
        fn=getattr(importlib.import_module(launch.module), launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    if target.backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spills = _cuda_resources(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers = _amd_field(assembly, "vgpr_count")
        spills = _amd_field(assembly, "private_segment_fixed_size")  # scratch memory of a thread
    instruction = next(filter(None, (re.search(pattern, assembly) for pattern in target.tensor_core)), None)
    tiles = {name: value for name, value in launch.constants if name.startswith(("BLOCK", "GROUP"))}
    flags = [name.lower() for name, value in launch.constants if value is True]
    kinds = {name: re.sub(r"tensordesc<(\w+).*", r"\1", kind.strip("*")) for name, kind in launch.signature}
    present = [re.sub(r"_(ptr|desc)$", "", name) for name, kind in launch.signature if kind != "constexpr"]
    flags += [name for name in present if name in OPTIONAL]
    named = [kinds[name] for name in ("hidden_ptr", "hidden_desc", "source_ptr", "values_ptr") if name in kinds]
    return CompileRow(
        kernel=launch.kernel,
        target=arch,
        config=" ".join(
            [
                *named,
                *(f"{name.lower().removeprefix('block_')}={value}" for name, value in tiles.items()),
                f"warps={launch.warps} stages={launch.stages}",
                *flags,
            ]
        ),
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        shared_limit=target.shared_limit,
        tensor_core=instruction.group(0) if instruction else "",
        wants_tensor_core=launch.kernel in GEMMS and "fp32" not in named,
        triton=triton.__version__,
    )


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory: what spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report.stdout + report.stderr)
    assert found is not None, report.stdout
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_field(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert found is not None, name
    return int(found.group(1))


def run(targets: Sequence[str], workers: int | None = None) -> list[CompileRow]:
    """Compile everything for ``targets``, on all cores; Triton's own cache makes a second run quick."""
    work = [(target, launch) for target in targets for launch in launches(target)]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(compile_one, *zip(*work, strict=True)), total=len(work), desc="compile"))
    return sorted(rows, key=lambda row: (row.target, row.kernel, row.config))


def report(rows: Sequence[CompileRow]) -> str:
    """One line a binary; what is wrong with any stands at the end."""
    shown = ["target", "kernel", "config", "registers", "spill_bytes", "shared_bytes", "tensor_core"]
    found = pd.DataFrame([asdict(row) for row in rows])[shown]
    bad = [row for row in rows if row.problem]
    said = [f"{row.target} {row.kernel} {row.config}: {row.problem}" for row in bad]
    return "\n".join([text(found), *said, f"{len(rows)} binaries, {len(bad)} with a problem"])
