"""ORPO, other preference losses and linear cross-entropy log-probabilities without ever holding full logits.

Importing this package loads torch and nothing else; backends and integrations load when they are used.
"""

from orpo_kernels import objectives, reference
from orpo_kernels.loss import (
    OrpoLoss,
    OrpoOutput,
    PreferenceOutput,
    explain,
    linear_logprobs,
    orpo_loss,
    preference_loss,
)
from orpo_kernels.sequences import sequence_logprobs
from orpo_kernels.shards import Shard

__all__ = [
    "OrpoLoss",
    "OrpoOutput",
    "PreferenceOutput",
    "Shard",
    "__version__",
    "explain",
    "linear_logprobs",
    "objectives",
    "orpo_loss",
    "preference_loss",
    "reference",
    "sequence_logprobs",
]
__version__ = "0.1.0"
