"""The race: every claim about time, memory and accuracy, measured against what a user would pick instead.

``python -m benchmarks --help`` lists the commands. Cases, batches and competitors are data: a new one is one entry in
``cases.py`` or ``providers.py``.
"""

import os
import sys

# Packages that only the comparison needs, unpacked by `make gpu` where there is no network. They come last, so that
# nothing installed is replaced.
sys.path += filter(None, [os.environ.get("ORPO_PEERS")])
