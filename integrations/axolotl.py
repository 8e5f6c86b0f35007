"""A plugin for Axolotl, which its configuration names:

    plugins:
      - orpo_kernels.integrations.axolotl.OrpoKernelsPlugin

TRL's trainers under ``rl: orpo`` and ``rl: simpo`` get the three-product patch, since Axolotl's are subclasses that
keep their loss. All other losses, Axolotl's own ORPO and supervised fine-tuning among them, are computed from lazy
logits. This module alone imports Axolotl, and Axolotl imports it.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from orpo_kernels.integrations import patch_transformers, patch_trl, unpatch_transformers, unpatch_trl


class OrpoKernelsPlugin(BasePlugin):
    """Patches TRL and transformers for one training run, as ``python -m orpo_kernels run`` does for a script.

    ``ORPO_KERNELS_BACKEND`` and ``ORPO_KERNELS_WORKSPACE_BYTES`` choose the backend and bound the memory.
    """

    def pre_model_load(self, cfg: Any) -> None:
        """Patch. Axolotl calls this in every process, with its own patches of models still to come.

        Raises:
            ImportError: a version of trl or transformers that is not known; a plugin that was asked for and does
                nothing would be worse than a run that stops.
            ValueError: the environment names no backend, or no number of bytes.
        """
        patch_trl()
        patch_transformers()

    def post_train_unload(self, cfg: Any) -> None:
        """Take both patches back: a process may train again with another configuration."""
        unpatch_transformers()
        unpatch_trl()
