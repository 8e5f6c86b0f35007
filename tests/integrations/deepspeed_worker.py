"""One of two processes on gloo under DeepSpeed: stock, patched, lazy and own losses in each stage of ZeRO.

usage: python -m tests.integrations.deepspeed_worker RANK WORLD FOLDER

Writes FOLDER/rank{RANK}.json, as devices_worker does. DeepSpeed trains in float32.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from benchmarks.accuracy import relative_error
from orpo_kernels.integrations import fuse, fusion_report
from tests.integrations.devices_worker import CLASSES, Layout, data_of, loss_of, of_logits
from tests.integrations.models import LlamaForCausalLM, batch, llama
from tests.lazy import distributed_worker as lazily
from tests.lazy.distributed_worker import RATE, STEPS

ACCUMULATED = 2  # micro-batches a step: an engine divides each one's gradient
STAGES = {
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2},
    "zero 3": {"stage": 3, "stage3_param_persistence_threshold": 0},  # nothing stays gathered
    "zero 3 keeps small weights": {"stage": 3},
}
MODES = ("stock", "patch", "patch, log-probabilities", "lazy", "head's forward", "model's forward", "outside")


def modes_of(stage: str) -> tuple[str, ...]:
    return MODES


def losses(mode: str, engine: Any, model: Any, data: Any) -> Tensor:
    if mode != "lazy":
        return loss_of(mode, engine, model, data)
    return lazily.loss_of(engine(**data.inputs).logits, data.answer[:, :-1], unknown=False)
