"""Every kernel in every shipped configuration, compiled for chips that are not there.

Real calls on small CPU tensors record their launches instead of starting them; what they would have launched, with the
types, constants and tiles of the chip's row in the configuration table, is compiled for that chip. Registers,
spills and shared memory come from the assembler's own report, the tensor-core instruction from the assembly, and the
epilogue's instructions an entry of E from what the assembler made of it (``sass``).
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.lab import sass
from benchmarks.report.tables import text
from orpo_kernels import linear_logprobs, orpo_loss, targets
from orpo_kernels.backends.kernels.configs import config, gluon_lacks
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.targets import Columns


class Target(NamedTuple):
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
WITH_EPILOGUE = ("exp_gemm_tma_kernel", "exp_gemm_kernel", "exp_gemm_gluon_kernel")
WIDE, NARROW = 4096, 128  # features: what takes the tile of a wide head, and that of a narrow one
GEMMS = (*WITH_EPILOGUE, "recompute_overflowed_kernel")
# Arguments that are None where a branch of a kernel is off.
OPTIONAL = {"exp_logits", "sums", "logit_sums", "bias", "softcap", "mean_weight", "grad_logp_hidden", "source_rows"}
OPTIONAL |= {"out_rows", "a", "b", "label_entry"}
FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {**FLOATS, torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1"}


class Launch(NamedTuple):
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
        for dtype in (torch.bfloat16, torch.float16):
            _call(shipped, "HWb", dtype, features=NARROW)
            _call(shipped, "HW", dtype, features=NARROW)
            _call(shipped, "HW", dtype, features=NARROW, softcap=30.0)
        # The forms that were not chosen, so that they can be raced.
        for form in ("pointer", "library"):
            other = config(arch, torch.bfloat16)._replace(form=form)  # type: ignore[arg-type]
            _call(Recorder(arch=arch, config=other), "HW")
        for dtype in (torch.bfloat16, torch.float16):
            other = config(arch, dtype)._replace(form="gluon")
            if other.gluon is not None and not gluon_lacks():
                raced = Recorder(arch=arch, config=other)
                for trained in ("HW", "HWb"):
                    _call(raced, trained, dtype)
                    _call(raced, trained, dtype, softcap=30.0)
                    _call(raced, trained, dtype, workspace_bytes=1)
                _call(raced, "", dtype)
    return list(found)


def _call(
    backend: Recorder,
    trained: str,  # of H(idden), W(eight) and b(ias); a bias is there only if it is trained
    dtype: torch.dtype = torch.bfloat16,
    features: int = WIDE,
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
    constants = dict(meta)
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)
    fixed = {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment}
    signature, divisible = {}, []
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            constants[name] = value
        elif isinstance(value, (torch.Tensor, int)):
            signature[name] = "i32" if isinstance(value, int) else f"*{TYPES[value.dtype]}"
            if name not in fixed and not (isinstance(value, int) and value % 16):
                divisible.append(place)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            block = ", ".join(map(str, value.block_shape))
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # Gluon's descriptors name theirs
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]{layout}>"
    ordered = tuple((name, signature.get(name, "constexpr")) for name in kernel.arg_names)
    known, names = tuple(sorted(constants.items())), (kernel.__module__, kernel.__name__)
    return Launch(*names, ordered, known, tuple(divisible), warps, stages)


def compile_one(arch: str, launch: Launch) -> dict[str, Any]:
    """Compile one launch for one chip and read the assembler's report. ``config`` names dtypes, tiles, warps, stages,
    and which branches are on; a product of 16-bit matrices ``wants_tensor_core``; the ``instructions`` are those of the
    epilogue for an entry of E, where there is SASS to count them in."""
    import triton
    from triton.backends.compiler import GPUTarget

    target, constants = TARGETS[arch], dict(launch.constants)
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    source = _source(function)(
        fn=function,
        signature=dict(launch.signature),
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    chip, options = GPUTarget(*target[:3]), {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=chip, options=options)
    if target.backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spills, instructions = _cuda_resources(compiled.asm["cubin"], launch.kernel in WITH_EPILOGUE)
    else:
        assembly = compiled.asm["amdgcn"]
        fields = dict(re.findall(r"\.(\w+):\s+(\d+)", assembly))
        registers, spills = int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])  # scratch of a thread
        instructions = None
    instruction = next(filter(None, (re.search(pattern, assembly) for pattern in target.tensor_core)), None)
    kinds = {name: re.sub(r"tensordesc<(\w+).*", r"\1", kind.strip("*")) for name, kind in launch.signature}
    named = [kinds[name] for name in ("hidden_ptr", "hidden_desc", "source_ptr", "values_ptr") if name in kinds]
    sizes = [(name, value) for name, value in launch.constants if name.startswith(("BLOCK", "GROUP"))]
    tiles = [f"{name.lower().removeprefix('block_')}={value}" for name, value in sizes]
    flags = [name.lower() for name, value in launch.constants if value is True]
    present = [re.sub(r"_(ptr|desc)$", "", name) for name, kind in launch.signature if kind != "constexpr"]
    warps = launch.warps * (2 if function.is_gluon() else 1)  # that hold the tile: Gluon's consumers are two
    entries = constants.get("BLOCK_N", 0) * constants.get("BLOCK_V", 0) / (target.warp * warps)  # of a thread
    words = [*named, *tiles, f"warps={warps} stages={constants.get('STAGES', launch.stages)}", *flags]
    return {
        "kernel": launch.kernel,
        "target": arch,
        "config": " ".join([*words, *(name for name in present if name in OPTIONAL)]),
        "registers": registers,
        "spill_bytes": spills,
        "instructions": instructions and round(instructions / entries, 1),
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": target.shared_limit,
        "tensor_core": instruction[0] if instruction else "",
        "wants_tensor_core": launch.kernel in GEMMS and "fp32" not in named,
        "triton": triton.__version__,
    }


def _source(function: Any) -> Any:
    """What the compiler takes a kernel as: Gluon's is another language."""
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def problem(row: Mapping[str, Any]) -> str:
    """What is wrong with a binary, or nothing."""
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_bytes"] > row["shared_limit"]:
        return f"{row['shared_bytes']} bytes of shared memory, the chip has {row['shared_limit']}"
    return "no tensor cores" if row["wants_tensor_core"] and not row["tensor_core"] else ""


def _cuda_resources(cubin: bytes, with_epilogue: bool) -> tuple[int, int, int | None]:
    """Registers of a thread, bytes of its stack and local memory (what spilled), and instructions of its epilogue."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = sass.parse(sass.listing(Path(file.name), tool)) if with_epilogue else None
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report.stdout + report.stderr)
    assert found is not None, report.stdout
    return int(found[1]), int(found[2]) + int(found[3]), code and sass.epilogue(code)


def run(targets: Sequence[str]) -> list[dict[str, Any]]:
    """Compile everything for ``targets``, on all cores; Triton's own cache makes a second run quick."""
    work = [(target, launch) for target in targets for launch in launches(target)]
    with ProcessPoolExecutor() as pool:
        rows = list(tqdm(pool.map(compile_one, *zip(*work, strict=True)), total=len(work), desc="compile"))
    return sorted(rows, key=itemgetter("target", "kernel", "config"))


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a binary, with its epilogue's instructions an entry of E; what is wrong with any stands at the end."""
    shown = ["target", "kernel", "config", "registers", "spill_bytes", "instructions", "shared_bytes", "tensor_core"]
    bad = [f"{row['target']} {row['kernel']} {row['config']}: {problem(row)}" for row in rows if problem(row)]
    table = pd.DataFrame(rows, dtype=object)[shown].fillna("")
    return "\n".join([text(table), *bad, f"{len(rows)} binaries, {len(bad)} with a problem"])
