"""Every kernel in every shipped configuration, compiled for chips that are not there.

A backend that records instead of launching runs real calls on small CPU tensors; what it would have launched, with
the types, constants and tiles of the chip's row in the configuration table, is compiled for that chip. Registers,
spills and shared memory come from the assembler's own report, the tensor-core instruction from the assembly.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.report.tables import text
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.backends.triton_configs import config
from orpo_kernels.engine import Job, logprobs_grads, run_logprobs, run_orpo
from orpo_kernels.plan import Needs
from orpo_kernels.prepare import prepare_logprobs, prepare_orpo


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
GEMMS = ("score_tma_kernel", "score_kernel", "rescue_kernel")
FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {**FLOATS, torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}


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


def launches(arch: str) -> list[Launch]:
    """Every distinct launch of the calls below with the tiles of ``arch``."""
    found: dict[Launch, None] = {}

    def record(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: dict[str, Any]) -> None:
        found[_launch(kernel, args, meta)] = None

    shipped = config(arch, torch.bfloat16)
    for job, tensors in _jobs(TritonBackend(arch=arch, take=record)):
        _run(job, tensors)
    # The forms that were not chosen, so that they can be raced.
    for form in ("pointer", "library"):
        other = TritonBackend(arch=arch, take=record, config=shipped._replace(form=form))
        _run(*next(_jobs(other)))
    return list(found)


def _run(job: Any, tensors: tuple[Any, ...]) -> None:
    if isinstance(job, Job):
        labels, offsets = torch.zeros(64, dtype=torch.int64), torch.arange(5) * 16
        for by_sequence in (False, True):
            table = job.backend.count_scores(labels, labels, offsets, -100)
            job.backend.compact_scores(labels, labels, offsets, table, 64, -100, by_sequence, torch.float32)
        run_orpo(job, *tensors)
    else:
        logps, unit, result = run_logprobs(job, *tensors)
        logprobs_grads(job, unit, result, logps, *tensors)
    for tensor in tensors:
        if tensor is not None:
            job.backend.scale(tensor, torch.ones(()))


def _jobs(backend: TritonBackend) -> Iterator[tuple[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]]:
    """Calls that between them take every branch of the backend that leads to another binary."""
    everything, nothing = Needs(True, True, True), Needs(False, False, False)

    def inputs(dtype: torch.dtype, features: int, biased: bool) -> tuple[Any, ...]:
        vocab = 1024
        hidden, weight = torch.ones(4, 16, features, dtype=dtype), torch.ones(vocab, features, dtype=dtype)
        return hidden, weight, torch.ones(vocab, dtype=dtype) if biased else None

    def orpo(
        needs: Needs,
        workspace: int | None,
        dtype: torch.dtype = torch.bfloat16,
        features: int = 128,
        biased: bool = False,
        softcap: float | None = None,
    ) -> tuple[Any, Any]:
        hidden, weight, bias = inputs(dtype, features, biased)
        settings = 0.1, 1.0, "token", 1.0, softcap, -100, None, "torch", workspace, needs
        job = prepare_orpo(hidden, weight, torch.ones(4, 16, dtype=torch.int64), None, bias, *settings)
        plan = replace(job.plan, room=max(job.plan.room, 1 << 20))
        return replace(job, backend=backend, plan=plan), (hidden.view(-1, features), weight, bias)

    for dtype in FLOATS:
        yield orpo(Needs(True, True, False), None, dtype)
    for needs, workspace in ((Needs(True, False, False), None), (nothing, None), (everything, 1)):
        yield orpo(needs, workspace)
    # Everything the epilogue can do, rows that are not 16-byte aligned, and a head in several slices.
    yield orpo(Needs(True, True, False), None, softcap=30.0)
    yield orpo(everything, None, biased=True)
    yield orpo(everything, None, biased=True, softcap=30.0)
    yield orpo(everything, None, biased=True, softcap=30.0, features=99)
    hidden, weight, _ = inputs(torch.bfloat16, 128, False)
    settings = None, 1.0, None, -100, "torch", None, Needs(True, True, False)
    job = prepare_logprobs(hidden, weight, torch.ones(4, 16, dtype=torch.int64), *settings)
    yield replace(job, backend=backend, room=64 * 2 * 512 * 2), (hidden.view(-1, 128), weight, None)


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
    flags = [name.lower() for name, value in launch.constants if value is True or (name == "STORE" and value)]
    kinds = {name: re.sub(r"tensordesc<(\w+).*", r"\1", kind.strip("*")) for name, kind in launch.signature}
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
