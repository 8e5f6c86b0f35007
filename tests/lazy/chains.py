"""The catalogue: every known way in which a training script consumes ``outputs.logits``."""

from tests.lazy import chains_loops, chains_other, chains_trl
from tests.lazy.catalogue import CHAINS, Batch, Chain, Result, make_batch

# Importing a module of chains enters them.
MODULES = (chains_trl, chains_other, chains_loops)

__all__ = ["CHAINS", "MODULES", "Batch", "Chain", "Result", "make_batch"]
