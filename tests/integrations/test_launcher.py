"""The launcher as people call it: a stock script, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STOCK = Path(__file__).parent / "stock_script.py"
PATCHED = "orpo_kernels: patched trl ORPOTrainer (trl "


def run(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, check=False)


def losses(path: Path) -> list[dict[str, Any]]:
    timings = ("runtime", "per_second", "flos")
    history = json.loads(path.read_text())
    return [{k: v for k, v in entry.items() if not any(word in k for word in timings)} for entry in history]


def assert_same(stock: Path, ours: Path) -> None:
    for theirs, mine in zip(losses(stock), losses(ours), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_a_stock_script_gives_the_same_metrics(tmp_path: Path) -> None:
    done = run(STOCK, "stock.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("-m", "orpo_kernels", "run", STOCK, "ours.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(PATCHED) == 1
    assert_same(tmp_path / "stock.json", tmp_path / "ours.json")


@pytest.mark.parametrize("through", ["torchrun", "accelerate"])
def test_two_processes_give_the_same_metrics(through: str, tmp_path: Path) -> None:
    """DDP sees one module call whose output carries the loss."""
    launcher = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"],
        "accelerate": [
            "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
            "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=29518",
        ],
    }[through]  # fmt: skip
    done = run(*launcher, STOCK, "stock.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(*launcher, "-m", "orpo_kernels", "run", STOCK, "ours.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(PATCHED) == 1
    assert_same(tmp_path / "stock.json", tmp_path / "ours.json")


def test_arguments_exit_codes_and_folders_pass_through(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 7\n")
    path = script(
        tmp_path,
        "import sys, beside\nassert __name__ == '__main__' and beside.value == 7\nprint(sys.argv[1:])\nsys.exit(3)\n",
    )
    done = run("-m", "orpo_kernels", "run", path, "--lr=1", "-h", "--", "x", folder=tmp_path.parent)
    assert (done.returncode, done.stdout) == (3, "['--lr=1', '-h', '--', 'x']\n")
    assert done.stderr == (f"orpo_kernels: patched nothing: {path} never imported trl.experimental.orpo.orpo_trainer\n")


def test_tracebacks_pass_through(tmp_path: Path) -> None:
    path = script(tmp_path, "def inner():\n    raise KeyError('mine')\ninner()\n")
    done = run("-m", "orpo_kernels", "run", path, folder=tmp_path)
    assert done.returncode == 1
    assert f'File "{path}", line 2, in inner' in done.stderr
    assert "KeyError: 'mine'" in done.stderr


def test_the_script_decides_when_libraries_load(tmp_path: Path) -> None:
    """Environment variables set at the top of a script must be set before its libraries read them."""
    path = script(tmp_path, "import sys\nassert not {'trl', 'transformers', 'triton'} & set(sys.modules)\n")
    assert run("-m", "orpo_kernels", "run", path, folder=tmp_path).returncode == 0


def test_a_trl_that_is_not_known_still_runs(tmp_path: Path) -> None:
    package = tmp_path / "trl" / "experimental" / "orpo"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "orpo_trainer.py").write_text("class ORPOTrainer:\n    pass\n")
    path = script(tmp_path, "from trl.experimental.orpo.orpo_trainer import ORPOTrainer\nprint('ran')\n")
    done = run("-m", "orpo_kernels", "run", path, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "patched nothing: this trl's ORPOTrainer has no get_batch_loss_metrics" in done.stderr


def test_no_such_script(tmp_path: Path) -> None:
    done = run("-m", "orpo_kernels", "run", "nothing.py", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "orpo_kernels: no such script: nothing.py\n")


def test_doctor(tmp_path: Path) -> None:
    done = run("-m", "orpo_kernels", "doctor", folder=tmp_path)
    assert done.returncode == 0
    assert "backend torch: used" in done.stdout
    assert "patch trl ORPOTrainer: yes" in done.stdout
    console = subprocess.run(
        [Path(sys.executable).parent / "orpo-kernels", "doctor"], capture_output=True, text=True, check=True
    )
    assert console.stdout == done.stdout
