"""Heads split over ranks and sequences split over ranks, on two and on four processes; the checks stand in
``parallel_worker``."""

from __future__ import annotations

import pytest
import torch

from tests import ranks

pytestmark = [
    pytest.mark.slow,  # several processes
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo"),
]

Results = dict[int, ranks.Results]  # of each number of ranks, by rank: what went wrong in each check


def works(what: str, outcome: str = "works") -> pytest.MarkDecorator:
    return pytest.mark.works(what, by="own loop", outcome=outcome)


# What the names of checks begin with, and what they show.
CHECKS = {
    "head, plain": [works("a head split over ranks (vocabulary parallel)")],
    "head, bias": [works("a head split over ranks (vocabulary parallel)")],
    "head, softcap": [works("a head split over ranks (vocabulary parallel)")],
    "head, certain": [],
    "head, frozen": [works("a head split over ranks, frozen")],
    "head, recompute": [works("a head split over ranks (vocabulary parallel)")],
    "head, several groups": [works("a head split over ranks (vocabulary parallel)")],
    "head, two targets": [],
    "head, labels of one rank": [],
    "head, ignored rows": [],
    "head, overflow": [],
    "head, many rows": [],
    "head, triton": [works("a head split over ranks (vocabulary parallel)")],
    "log-probabilities": [works("a head split over ranks (vocabulary parallel)")],
    "numbers sent by a split head": [],
    "sequence, ": [works("sequences split over ranks (context parallel)")],
    "any objective": [works("sequences split over ranks (context parallel)")],
    "numbers sent by split sequences": [],
    "DDP over sequences": [works("sequences split over ranks (context parallel), DDP")],
    "both splits": [works("head and sequences split over ranks")],
    "labels out of range": [],
    "DTensors": [works("a DTensor head, Shard(0) over a mesh called tp")],
    "FSDP2 over": [works("FSDP2 over tensor parallelism")],
    "DTensor of an unnamed mesh": [works("a DTensor head, Shard(0) over a mesh without a name", "refused")],
    "transformers": [works("transformers' tensor-parallel plan")],
    "refusals": [],
    "torch.compile": [works("torch.compile over a split head or split sequences", "refused")],
    "OrpoLoss": [],
    "backward twice": [],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    worker = "tests.core.parallel_worker"
    return {world: ranks.results_of(worker, world, tmp_path_factory) for world in (2, 4)}


@pytest.mark.parametrize("check", [pytest.param(check, marks=marks) for check, marks in CHECKS.items()])
def test_every_rank_has_what_one_process_has(check: str, results: Results) -> None:
    found = [
        (world, rank, name, trouble)
        for world, of_ranks in results.items()
        for rank, of_rank in enumerate(of_ranks)
        for name, trouble in of_rank.items()
        if name.startswith(check)
    ]
    # Triton's interpreter is looked at on two ranks, a mesh of two dimensions on four.
    assert len(found) >= (2 if "triton" in check else 4 if check == "FSDP2 over" else 6)
    for world, rank, name, trouble in found:
        assert trouble is None, f"{name}, rank {rank} of {world}:\n{trouble}"


def test_every_check_is_looked_at(results: Results) -> None:
    for of_ranks in results.values():
        for of_rank in of_ranks:
            assert of_rank.keys() == of_ranks[0].keys()
            assert [name for name in of_rank if not name.startswith(tuple(CHECKS))] == []
