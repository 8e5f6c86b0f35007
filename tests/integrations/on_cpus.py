"""Runs stock_script.py with its own arguments on processes of a CPU that accelerate takes for one GPU each.

accelerate knows FSDP and DeepSpeed on accelerators alone; what it then calls of torch and DeepSpeed runs on gloo. Says
at the end which of them it was.
"""

import os
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def _backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _set_device(state: PartialState) -> None:
    state.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = _backend
    PartialState.set_device = _set_device
    import stock_script

    sys.argv.append("--any-device")
    stock_script.main()
    state = AcceleratorState()
    fsdp, zero = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    name = f"FSDP{fsdp.fsdp_version}" if fsdp else f"DeepSpeed ZeRO-{zero.zero_stage}" if zero else "neither"
    # One write a line: the processes share a pipe, and print may write a line in pieces, between which another's fall.
    os.write(1, f"ran under {name}\n".encode())
