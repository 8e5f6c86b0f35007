"""The launcher as people call it: a stock script, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo_kernels import cli
from orpo_kernels.integrations import TRAINERS
from orpo_kernels.startup import sitecustomize

pytestmark = pytest.mark.slow  # whole processes

STOCK = Path(__file__).parent / "stock_script.py"
DDP = Path(__file__).parents[2] / "examples" / "accelerate" / "ddp.yaml"
READERS = Path(__file__).parent / "stock_readers.py"
PATCHED = "orpo_kernels: patched trl ORPOTrainer (trl "
FUSED = "orpo_kernels: fused the loss of this ORPOTrainer: plan "
LAZY = "orpo_kernels: logits of models of transformers "
HOMES = " or ".join(["transformers.modeling_utils", *(home for trainer in TRAINERS for home in trainer.homes)])
TARGETS = "trl ORPOTrainer or trl CPOTrainer or llamafactory CustomDPOTrainer"
LAUNCH = ("-m", "orpo_kernels", "run")


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def losses(path: Path) -> list[dict[str, Any]]:
    timings = ("runtime", "per_second", "flos")
    history = json.loads(path.read_text())
    return [{k: v for k, v in entry.items() if not any(word in k for word in timings)} for entry in history]


def assert_same(stock: Path, ours: Path, processes: int = 1) -> None:
    for theirs, mine in zip(losses(stock), losses(ours), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert losses(ours)[-1] == {"processes": processes}


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stock script logs without us."""
    folder = tmp_path_factory.mktemp("stock")
    done = run(STOCK, "stock.json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "orpo_kernels" not in done.stderr
    return folder / "stock.json"


def test_a_stock_script_gives_the_same_metrics(stock: Path, tmp_path: Path) -> None:
    done = run(*LAUNCH, "--backend=torch", "--workspace-bytes", 1_000_000, STOCK, "ours.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(PATCHED) == 1
    assert done.stderr.count(FUSED) == 1
    assert done.stderr.count(LAZY) == 1
    assert "patched nothing" not in done.stderr
    assert_same(stock, tmp_path / "ours.json")


@pytest.mark.parametrize("objective", ["dpo", "grpo", "smoothing", "loop"])
def test_scripts_that_are_no_trainers_of_ours(objective: str, tmp_path: Path) -> None:
    """The same losses as without the launcher, in the script and in a child process, and no logits in full."""
    done = run(READERS, objective, "stock.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    path = script(tmp_path, "import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n")
    for name, command in (("ours.json", [READERS]), ("child.json", [path, READERS])):
        done = run(*LAUNCH, "--report", *command, objective, name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(LAZY) == 1
        assert "LlamaForCausalLM: fused: " in done.stderr
        assert "full logits" not in done.stderr
        expected, found = (json.loads((tmp_path / of).read_text()) for of in ("stock.json", name))
        assert len(found) >= 3
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_trainers_only(tmp_path: Path) -> None:
    done = run(*LAUNCH, "--trainers-only", "--report", READERS, "loop", "ours.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert LAZY not in done.stderr
    assert "LlamaForCausalLM: fused" not in done.stderr


def test_child_processes_inherit_the_patch(stock: Path, tmp_path: Path) -> None:
    """As a command does that is a launcher itself and starts or becomes another process for the training."""
    path = script(tmp_path, "import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n")
    done = run(*LAUNCH, path, STOCK, "ours.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(PATCHED) == 1
    assert done.stderr.count(FUSED) == 1
    assert_same(stock, tmp_path / "ours.json")


@pytest.mark.works("accelerate launch, DDP", by="ORPO patch")
def test_two_processes_give_the_same_metrics(tmp_path: Path) -> None:
    """DDP sees one module call whose output carries the loss."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    # With --cpu accelerate starts one process; the script asks for the CPU itself.
    options = [f"--config_file={DDP}", "--mixed_precision=no", "--main_process_port=0"]
    accelerate = ["-m", "accelerate.commands.launch", *options]
    done = run(*torchrun, STOCK, "stock.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for launcher in (torchrun, accelerate):
        done = run(*launcher, *LAUNCH, STOCK, "ours.json", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(PATCHED) == 1
        assert done.stderr.count(FUSED) == 1
        assert_same(tmp_path / "stock.json", tmp_path / "ours.json", processes=2)


def test_arguments_exit_codes_and_folders_pass_through(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 7\n")
    path = script(
        tmp_path,
        "import sys, beside\nassert __name__ == '__main__' and beside.value == 7\nprint(sys.argv[1:])\nsys.exit(3)\n",
    )
    done = run(*LAUNCH, path, "--lr=1", "-h", "--", "-m", "x", folder=tmp_path.parent)
    assert (done.returncode, done.stdout) == (3, "['--lr=1', '-h', '--', '-m', 'x']\n")
    assert done.stderr == f"orpo_kernels: patched nothing in this process: {path} never imported {HOMES}\n"


def test_modules_run_as_python_runs_them(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(
        "import sys\nfrom package import __name__ as parent\n"
        "print(__name__, __package__ == parent, sys.argv[0].endswith('train.py'), sys.argv[1:])\n"
    )
    done = run(*LAUNCH, "-m", "package.train", "--lr=1", "-m", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "__main__ True True ['--lr=1', '-m']\n")


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_traceback_is_the_scripts_own(how: str, tmp_path: Path) -> None:
    """It begins with the script, and nothing of ours comes after it."""
    path = script(tmp_path, "def inner():\n    raise KeyError('mine')\ninner()\n")
    done = run(*LAUNCH, *([path] if how == "script" else ["-m", "script"]), folder=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[:2] == ["Traceback (most recent call last):", f'  File "{path}", line 3, in <module>']
    assert lines[-1] == "KeyError: 'mine'"
    assert "orpo_kernels" not in done.stderr


def test_the_script_decides_when_libraries_load(tmp_path: Path) -> None:
    """Environment variables set at the top of a script must be set before its libraries read them."""
    path = script(tmp_path, "import sys\nassert not {'trl', 'transformers', 'triton'} & set(sys.modules)\n")
    assert run(*LAUNCH, path, folder=tmp_path).returncode == 0


def package(folder: Path, name: str, text: str) -> None:
    """A module and its packages in a folder."""
    *parents, last = name.split(".")
    for parent in parents:
        folder /= parent
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{last}.py").write_text(text)


def test_a_trl_that_is_not_known_still_runs(tmp_path: Path) -> None:
    package(tmp_path, "trl.experimental.orpo.orpo_trainer", "class ORPOTrainer:\n    pass\n")
    path = script(tmp_path, "from trl.experimental.orpo.orpo_trainer import ORPOTrainer\nprint('ran')\n")
    done = run(*LAUNCH, path, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "patched nothing: trl.experimental.orpo.orpo_trainer.ORPOTrainer has no get_batch_loss_met" in done.stderr


def test_an_old_home_of_the_trainer_is_known(tmp_path: Path) -> None:
    methods = [
        "get_batch_loss_metrics",
        "concatenated_forward",
        "odds_ratio_loss",
        "get_batch_logps",
        "concatenated_inputs",
    ]
    package(
        tmp_path,
        "trl.trainer.orpo_trainer",
        "class ORPOTrainer:\n" + "".join(f"    def {name}(self): pass\n" for name in methods),
    )
    path = script(
        tmp_path,
        "from trl.trainer.orpo_trainer import ORPOTrainer\nprint(ORPOTrainer.concatenated_forward.__module__)\n",
    )
    done = run(*LAUNCH, path, folder=tmp_path)
    assert done.stdout == "orpo_kernels.integrations.trl\n", done.stderr


def test_what_is_built_unpatched_is_said_when_it_is_built(tmp_path: Path) -> None:
    package(tmp_path, "transformers.trainer", "class Trainer:\n    pass\n")
    package(tmp_path, "transformers.modeling_utils", "class PreTrainedModel:\n    pass\n")
    path = script(
        tmp_path,
        "import sys\n"
        "from transformers.modeling_utils import PreTrainedModel\nfrom transformers.trainer import Trainer\n"
        "class Model(PreTrainedModel): pass\nclass SFTTrainer(Trainer): pass\n"
        "def build(cls):\n    cls()\n    print(cls.__name__, file=sys.stderr)\n"
        "for cls in (Model, Model, SFTTrainer, SFTTrainer):\n    build(cls)\n",
    )
    done = run(*LAUNCH, "--trainers-only", path, folder=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"orpo_kernels: patched nothing so far: a Model is built and no {TARGETS} was imported",
        "Model",
        "Model",
        f"orpo_kernels: patched nothing of __main__.SFTTrainer: it is no {TARGETS}",
        "SFTTrainer",
        "SFTTrainer",
    ]


def test_the_environments_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("print('mine')\n")
    path = script(tmp_path, "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'], check=True)\n")
    done = run(*LAUNCH, path, folder=tmp_path, PYTHONPATH=str(own))
    assert done.stdout.splitlines() == ["mine", "mine", "1"], done.stderr


def test_the_hook_does_nothing_without_its_variable(tmp_path: Path) -> None:
    count = "import sys; print(len(sys.meta_path), 'torch' in sys.modules, 'orpo_kernels' in sys.modules)"
    plain = run("-c", count, folder=tmp_path)
    hooked = run("-c", count, folder=tmp_path, PYTHONPATH=sitecustomize.FOLDER)
    assert (hooked.stdout, hooked.stderr) == (plain.stdout, plain.stderr)
    watching = run("-c", count, folder=tmp_path, PYTHONPATH=sitecustomize.FOLDER, **{sitecustomize.VARIABLE: "a.b"})
    assert watching.stdout.split()[1:] == ["False", "False"]
    assert int(watching.stdout.split()[0]) == int(plain.stdout.split()[0]) + 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing.py"], "orpo_kernels: no such script: nothing.py\n"),
        (["-m", "tests.nothing"], "orpo_kernels: no such module: tests.nothing\n"),
        (["-m", "nothing.train"], "orpo_kernels: no such module: nothing.train\n"),
        ([], "error: a script is missing\n"),
        (["-m"], "error: -m needs the name of a module\n"),
        (
            ["--backend=cuda", "x.py"],
            "error: ORPO_KERNELS_BACKEND must be 'auto' or one of ['torch', 'triton'], got 'cuda'\n",
        ),
        (["--workspace-bytes=1GB", "x.py"], "must be a positive number of bytes, got '1GB'\n"),
    ],
)
def test_commands_that_cannot_be_right(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("ORPO_KERNELS_BACKEND", "ORPO_KERNELS_WORKSPACE_BYTES"):  # which the command sets
        monkeypatch.setenv(variable, "")
    try:
        code: Any = cli.main(["run", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert capsys.readouterr().err.endswith(sentence)


def test_doctor() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "orpo-kernels", "doctor"], capture_output=True, text=True, check=True
    )
    assert "backend torch: used" in done.stdout
    for target in ("trl ORPOTrainer", "trl CPOTrainer", "liger-kernel LigerFusedLinearORPOLoss"):
        assert f"patch {target}: yes" in done.stdout
    assert "patch llamafactory CustomDPOTrainer: no, llamafactory is not installed" in done.stdout
    assert "(tested: 0.12 to 1.16)" in done.stdout
    assert "lazy logits: yes, the loss of a small model is" in done.stdout


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, ""),
        ("0.11.4", " (untested: older than 0.12)"),
        ("0.12.0", " (tested: 0.12 to 1.16)"),
        ("1.16.3", " (tested: 0.12 to 1.16)"),
        ("1.17.0.dev0", " (untested: newer than 1.16)"),
    ],
)
def test_doctor_says_how_a_version_lies_to_those_tested(
    version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_version", lambda _: version)
    assert cli._tested("trl") == said


def test_doctor_says_why_logits_are_not_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli._lazy().startswith("no, ModuleNotFoundError: import of transformers halted")
