"""What reaches a driver: every launch and tensor map of many kinds of calls, over a stub of libcuda."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SEVERAL = {"E computed again", "groups of pairs"}  # passes over slices of the vocabulary or over groups


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton builds its driver module with a C compiler")
def test_a_driver_takes_every_launch_and_another_batch_compiles_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "tests.backends.stub_driver"], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind, of in found["kinds"].items():
        assert of["compiled"][1:] == [0, 0], kind
        first, *others = of["launched"]
        if kind not in SEVERAL:
            assert others == [first, first], kind
            assert sum(first.values()) <= (16 if "bias" in kind else 15), kind
    for kind, of in found["kinds"].items():
        assert any("exp_gemm_gluon_kernel" in batch for batch in of["launched"]) == kind.startswith("Gluon"), kind
    # A stub that takes everything would prove nothing.
    assert found["refuses"] == ["address", "rows of a box", "bytes of a box's row", "stride"]
