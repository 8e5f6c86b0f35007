"""Gluon's operations in plain torch, under the source of a kernel: what stands for an interpreter, which Gluon lacks.

The partitions of a program are threads of which one runs at a time, in an order drawn from a seed. What is asynchronous
ends as late as the kernel allows, and what it reads must not have changed meanwhile: a stage is NaN from the start of a
TMA load to its end, a product is added when it is waited for, a store reaches E when it is waited for. Every entry of
an output is written once. Layouts, registers and fences between threads of one partition are not looked at.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from orpo_kernels.backends.kernels import common


class Stop(Exception):  # noqa: N818 (no error: another partition has failed)
    pass


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes are there."""

    count = arrived = awaited = phase = 0

    def arrive(self, arrivals: int = 1, expected: int = 0, came: int = 0) -> None:
        self.arrived += arrivals
        self.awaited += expected - came
        assert self.arrived <= self.count, "more arrivals than the barrier counts"
        if self.arrived == self.count and not self.awaited:
            self.phase, self.arrived = self.phase + 1, 0


class Shared:
    """A buffer of shared memory, or several."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype

    def index(self, place: int) -> Shared:
        return Shared(self.data[place])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def store(self, values: Tensor) -> None:
        self.data.copy_(values)
        thread = threading.current_thread()
        assert isinstance(thread, Partition)
        thread.unfenced = True


class Pointer:
    def __init__(self, values: Tensor, offset: Any = 0) -> None:
        self.values, self.offset = values, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.values, self.offset + more)


class Products:
    """An accumulator and the products that are not added yet, each with its operands as they were when it began."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.begun = value, list[tuple[Any, ...]]()


class Partition(threading.Thread):
    def __init__(self, machine: Machine, function: Callable[..., None], args: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.machine, self.function, self.args = machine, function, args
        self.go, self.until, self.ended = threading.Semaphore(0), lambda: True, False
        self.stores, self.unfenced = list[tuple[Any, ...]](), False

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.machine.failure:
                self.function(*self.args)
                assert not self.stores, "a store is not waited for"
        except Stop:
            pass
        except BaseException as error:  # for the thread that started it
            self.machine.failure = self.machine.failure or error
        self.ended = True
        self.machine.back.release()


class Machine:
    """One program."""

    def __init__(self, program: int, seed: int) -> None:
        self.program, self.random, self.back = program, random.Random(seed), threading.Semaphore(0)
        self.loads: list[Callable[[], None]] = []
        self.failure: BaseException | None = None

    def specialize(self, partitions: Sequence[tuple[Any, Any]], warps: Any, registers: Any) -> None:
        threads = [Partition(self, function, args) for function, args in partitions]
        for thread in threads:
            thread.start()
        while waiting := [thread for thread in threads if not thread.ended]:
            able = [thread for thread in waiting if self.failure or thread.until()]
            if not able and not self.loads:
                self.failure = AssertionError("all partitions wait for each other")
                continue
            chosen = self.random.randrange(len(able) + len(self.loads))
            if chosen < len(able):
                able[chosen].go.release()
                self.back.acquire()
            else:
                self.loads.pop(chosen - len(able))()
        if self.failure:
            raise self.failure

    def pause(self, until: Callable[[], bool] = lambda: True) -> Partition:
        """Let others run, at least until something holds."""
        thread = threading.current_thread()
        assert isinstance(thread, Partition)
        thread.until = until
        self.back.release()
        thread.go.acquire()
        if self.failure:
            raise Stop
        return thread

    # Barriers.

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.pause(lambda: barrier.phase & 1 != parity)

    def arrive(self, barrier: Barrier, pred: bool = True) -> None:
        self.pause()
        barrier.arrive(int(pred))

    # Memory.

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(list(shape), math.nan, dtype=dtype))

    def load_tile(self, desc: Any, at: Sequence[int], barrier: Barrier, into: Shared) -> None:
        into.data.fill_(math.nan)
        self.pause()

        def end() -> None:
            found = desc.base[at[0] :, at[1] :][: desc.block_shape[0], : desc.block_shape[1]]
            into.data.zero_()[: found.shape[0], : found.shape[1]] = found
            barrier.arrive(0, came=into.data.numel() * into.data.itemsize)

        self.loads.append(end)

    def fence(self) -> None:
        if isinstance(thread := threading.current_thread(), Partition):
            thread.unfenced = False

    def store_tile(self, desc: Any, at: Sequence[int], buffer: Shared) -> None:
        thread = self.pause()
        assert not thread.unfenced, "a store may begin before its buffer is written"
        thread.stores.append((desc, at, buffer.data, buffer.data.clone()))

    def store_wait(self, pending: int) -> None:
        thread = self.pause()
        while len(thread.stores) > pending:
            desc, at, data, before = thread.stores.pop(0)
            assert torch.equal(data, before), "a buffer was written before it was stored"
            place = desc.base[at[0] :, at[1] :][: data.shape[0], : data.shape[1]]
            assert place.isnan().all(), "entries of E were written twice"
            place.copy_(data[: place.shape[0], : place.shape[1]])

    # Products.

    def multiply(self, a: Shared, b: Shared, into: Products, *, use_acc: bool, is_async: bool) -> Products:
        into.begun.append((a.data, b.data, a.data.clone(), b.data.clone(), use_acc))
        self.pause()
        return into

    def multiplied(self, pending: int, deps: tuple[Products]) -> Any:
        self.pause()
        (of,) = deps
        while len(of.begun) > pending:
            *now, a, b, kept = of.begun.pop(0)
            assert all(map(torch.equal, now, (a, b))), "a stage was written while it was read"
            of.value = a.float() @ b.float() + (of.value if kept else 0.0)
        return of if pending else of.value

    # Operations by their names.

    def gluon(self) -> dict[str, Any]:
        no_layout = dict.fromkeys(("NVMMADistributedLayout", "SliceLayout", "BlockedLayout"), lambda *_: None)
        language = SimpleNamespace(
            **no_layout,
            **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "exp2", "where")},
            program_id=lambda axis: self.program,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
            static_range=range,
            cdiv=lambda a, b: -(-a // b),
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            sum=lambda values, axis: values.sum(axis),
            max=lambda values, axis: values.amax(axis),
            cast=lambda value, dtype: value,
            convert_layout=lambda values, layout: values,
            expand_dims=torch.unsqueeze,
            load=_load,
            store=_store,
        )
        barriers = {"init": _init, "wait": self.wait, "arrive": self.arrive, "expect": _expect}
        copies = {"async_copy_global_to_shared": self.load_tile, "async_copy_shared_to_global": self.store_tile}
        return {
            "gl": language,
            "mbarrier": SimpleNamespace(**barriers, MBarrierLayout=lambda: "barriers"),
            "tma": SimpleNamespace(**copies, store_wait=self.store_wait),
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiplied,
            "warpgroup_mma_init": lambda value: value if isinstance(value, Products) else Products(value),
            "LOG2E": common.LOG2E.value,
        }


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = count


def _expect(barrier: Barrier, expected: int) -> None:
    barrier.arrive(1, expected=expected)


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    return torch.where(mask, pointer.values[torch.where(mask, pointer.offset, 0)], other)


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    places = pointer.offset[mask]
    assert pointer.values[places].isnan().all(), "a sum was written twice"
    pointer.values[places] = values[mask]


TRITON = SimpleNamespace(
    exp2=torch.exp2,
    rsqrt=torch.rsqrt,
    minimum=lambda a, b, propagate_nan=None: a.clamp(max=b) if isinstance(a, Tensor) else min(a, b),
    PropagateNan=SimpleNamespace(ALL=None),
    reshape=torch.reshape,
    permute=torch.permute,
    split=lambda values: values.unbind(-1),
)


def run(module: ModuleType, args: Sequence[Any], meta: Mapping[str, Any], seed: int) -> None:
    """The kernel of ``exp_gemm_gluon``, program by program, with the arguments of its launch."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer(value.view(-1))
        if hasattr(value, "block_shape"):
            base = value.base
            return SimpleNamespace(base=base, block_shape=value.block_shape, dtype=base.dtype, layout=None)
        return value

    names = ("_place", "_tanh", "_halves", "_part", "_labels", "_consume", "_produce")
    functions = {name: getattr(module, name).fn for name in names}
    constants = {name: value for name, value in meta.items() if name != "num_warps"}
    kernel = module.exp_gemm_gluon_kernel.fn
    for program in range(meta["PROGRAMS"]):
        machine = Machine(program, seed + program)
        with (
            mock.patch.multiple(module, **functions, **machine.gluon()),
            mock.patch.multiple(common, tl=TRITON, LOG2E=common.LOG2E.value),
        ):
            kernel(*map(plain, args), **constants)
