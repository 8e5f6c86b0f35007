"""Runs stock_script.py with its own arguments on processes of a CPU that accelerate takes for one GPU each.

accelerate knows FSDP and DeepSpeed on accelerators alone; what it then calls of torch and DeepSpeed runs on gloo.
"""

import sys
from typing import Any

import torch
from accelerate.state import PartialState
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
