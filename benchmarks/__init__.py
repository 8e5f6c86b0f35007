"""The race: every claim about time, memory and accuracy, measured against what a user would pick instead.

``python -m benchmarks --help`` lists the commands.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# `benchmarks compare --against` measures the package of another checkout with the problems of this one.
if checkout := os.environ.get("ORPO_CHECKOUT"):
    sys.path.insert(0, checkout)
import orpo_kernels

if checkout:
    sys.path.remove(checkout)
# What only the comparison needs, unpacked by `make gpu`, comes last, so that nothing installed is replaced.
sys.path += filter(None, [os.environ.get("ORPO_PEERS")])
# A checkout that is not installed has the integrations beside the package, not inside it.
if find_spec("orpo_kernels.integrations") is None:
    orpo_kernels.__path__.append(str(Path(__file__).resolve().parent.parent))
