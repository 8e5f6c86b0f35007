"""``python -m orpo_kernels``."""

import sys

from orpo_kernels.cli import main

sys.exit(main())
