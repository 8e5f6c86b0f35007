"""One of two processes on gloo under DeepSpeed: stock, patched, lazy and own losses in each stage of ZeRO.

usage: python -m tests.integrations.deepspeed_worker RANK WORLD FOLDER

Writes FOLDER/rank{RANK}.json, as devices_worker does. DeepSpeed trains in float32.
"""

from __future__ import annotations

import os
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.accuracy import relative_error
from orpo_kernels.integrations import fuse, fusion_report
from orpo_kernels.integrations.fused import Batch
from tests.integrations import devices_worker
from tests.integrations.devices_worker import CLASSES, data_of, of_logits
from tests.integrations.models import llama
from tests.lazy import distributed_worker as lazily
from tests.lazy.distributed_worker import RATE, STEPS, Layout
from tests.ranks import join, leave

LAYOUT = Layout(lambda model: model, accumulates=True)  # an engine divides the gradient of each micro-batch
STAGES: dict[str, dict[str, Any]] = {
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2},
    "zero 3": {"stage": 3, "stage3_param_persistence_threshold": 0},  # no weight stays gathered
    "zero 3 keeps small weights": {"stage": 3},
}
MODES = ("stock", "patch", "patch, log-probabilities", "lazy", "head's forward", "model's forward", "outside")


RUNS = [*STAGES, "zero 3, tied"]


def modes_of(run: str) -> tuple[str, ...]:
    return ("stock", "patch", "lazy") if run.endswith("tied") else MODES


def loss_of(mode: str, wrapped: nn.Module, model: nn.Module, data: Batch) -> Tensor:
    if mode != "lazy":
        return devices_worker.loss_of(mode, wrapped, model, data)
    return lazily.loss_of(wrapped(**data.inputs).logits, data.answer[:, :-1], unknown=False)


def expected(mode: str, world: int, tied: bool) -> dict[str, Tensor]:
    """What one process finds in float64: the gradients of every step and the loss in evaluation."""
    model = llama(tie_word_embeddings=tied).double()
    ranks = [data_of(LAYOUT, rank) for rank in range(world)]
    found = {}

    def loss() -> Tensor:
        every = [
            loss_of(mode, model, model, data) if mode == "lazy" else of_logits(model(**data.inputs).logits, data, mode)
            for parts in ranks
            for data in parts
        ]
        return torch.stack(every).mean()

    for step in range(STEPS):
        loss().backward()
        found.update({f"step {step}: {name}": each.grad.clone() for name, each in model.named_parameters()})
        with torch.no_grad():
            for each in model.parameters():
                each -= RATE * each.grad
        model.zero_grad()
    found["loss in evaluation"] = loss().detach()
    return found


def train(stage: dict[str, Any], mode: str, rank: int, world: int, tied: bool) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = llama(CLASSES.get(mode, LlamaForCausalLM), tie_word_embeddings=tied)
    model.load_state_dict(llama(tie_word_embeddings=tied).state_dict())
    if mode == "lazy":
        fuse(model)
    parts = data_of(LAYOUT, rank)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": len(parts),
            "zero_optimization": stage,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # by default it clips at 1
        },
    )
    found = {}
    for step in range(STEPS):
        for data in parts:
            engine.backward(loss_of(mode, engine, model, data))
            if data is parts[-1]:
                gradients = {name: safe_get_full_grad(each) for name, each in model.named_parameters()}
                found.update({f"step {step}: {name}": each.clone() for name, each in gradients.items()})
            engine.step()
    engine.eval()
    with torch.no_grad():
        loss = torch.stack([loss_of(mode, engine, model, data) for data in parts]).mean().double()
    dist.all_reduce(loss)
    found["loss in evaluation"] = loss / world
    report = fusion_report(model)
    assert not report.materialised, report
    assert report.calls == (len(parts) * (STEPS + 1) if mode == "lazy" else 0), report
    return found


def judge(stage: dict[str, Any], mode: str, rank: int, world: int, tied: bool) -> dict[str, Any]:
    """Errors of one stage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = train(stage, mode, rank, world, tied)
    except Exception:  # the stages after this one are still worth their results
        return {"traceback": traceback.format_exc()}
    truth = expected(mode, world, tied)
    return {"errors": {name: relative_error(found[name], value) for name, value in truth.items()}}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    rank, world, folder = join()
    results = {
        name: {
            mode: judge(STAGES[name.removesuffix(", tied")], mode, rank, world, name.endswith("tied"))
            for mode in modes_of(name)
        }
        for name in RUNS
    }
    leave(results, rank, folder)


if __name__ == "__main__":
    main()
