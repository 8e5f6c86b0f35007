"""``orpo-kernels`` and ``python -m orpo_kernels``: run a training script patched, or say what is here.

The command line is argparse's: torch is this package's only hard dependency, and a launcher must run where it does.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import orpo_kernels
from orpo_kernels import integrations
from orpo_kernels.backends import by_preference
from orpo_kernels.integrations import LIGER, TESTED, TRAINERS, Trainer
from orpo_kernels.integrations.trainer import BACKEND_VARIABLE, WORKSPACE_VARIABLE, Settings
from orpo_kernels.settings import Head
from orpo_kernels.startup import sitecustomize

PREFIX = "orpo_kernels:"
MODELS = "transformers.modeling_utils"  # whose import means that there will be models with logits
# Where the first object of any training library is built: the class, so that a run in which nothing is patched says so.
BUILT = {"transformers.trainer": "Trainer", MODELS: "PreTrainedModel"}
TRAINERS_ONLY, REPORT = "ORPO_KERNELS_TRAINERS_ONLY", "ORPO_KERNELS_REPORT"  # where child processes find the options


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` and do as it says; the exit code."""
    parser = argparse.ArgumentParser(prog="orpo-kernels", description="ORPO without full logits.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {orpo_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        usage="%(prog)s [--trainers-only] [--report] [--backend NAME] [--workspace-bytes N] "
        "{SCRIPT | -m MODULE} [ARGS ...]",
        help="run a training script, unmodified, without its models' full logits",
        description="Run SCRIPT or MODULE as python would. The logits of every transformers model that it or a Python "
        "process it starts calls are lazy, and the trainers known here have patches of their own. Also under torchrun "
        "(torchrun ... -m orpo_kernels run SCRIPT) and accelerate (accelerate launch ... -m orpo_kernels run SCRIPT).",
    )
    run.add_argument("--trainers-only", action="store_true", help="patch known trainers, and leave models alone")
    run.add_argument("--report", action="store_true", help="say at the end what became of the lazy logits")
    run.add_argument("--backend", metavar="NAME", help="auto, or the only backend that will do (default: auto)")
    run.add_argument("--workspace-bytes", metavar="N", help="bound on the memory of a loss (default: 1 GiB)")
    run.add_argument("-m", dest="module", action="store_true", help="run a module instead of a script")
    run.add_argument("target", metavar="SCRIPT", nargs="?", help="a path, or with -m the name of a module")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="passed on as they are")
    commands.add_parser("doctor", help="versions, device, backends with reasons, and what can be patched")
    options = parser.parse_args(argv)
    if options.command == "doctor":
        return doctor()
    if options.target is None:
        run.error("-m needs the name of a module" if options.module else "a script is missing")
    chosen = {
        BACKEND_VARIABLE: options.backend,
        WORKSPACE_VARIABLE: options.workspace_bytes,
        TRAINERS_ONLY: "1" if options.trainers_only else None,
        REPORT: "1" if options.report else None,
    }
    os.environ.update({variable: value for variable, value in chosen.items() if value is not None})  # for children too
    if options.backend is not None or options.workspace_bytes is not None:
        try:
            Settings.chosen(None, None)
        except ValueError as error:
            run.error(str(error))
    return run_script(options.target, options.arguments, module=options.module)


def run_script(target: str, arguments: Sequence[str], *, module: bool = False) -> int:
    """Run a script or module as ``__main__`` with its trainers patched; its exceptions and exit codes are its own."""
    if module:
        sys.path[0] = os.getcwd()
    found = _find_module(target) if module else Path(target).is_file()
    if not found:
        print(f"{PREFIX} no such {'module' if module else 'script'}: {target}", file=sys.stderr)
        return 2
    homes = [home for trainer in TRAINERS for home in trainer.homes]
    watched = [*homes, *BUILT]
    os.environ[sitecustomize.VARIABLE] = ",".join(watched)
    folders = [sitecustomize.FOLDER, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folder for folder in folders if folder))
    sitecustomize.watch(watched, imported)

    def report() -> None:
        if not (_told or _failed):
            known = homes if os.environ.get(TRAINERS_ONLY) else [MODELS, *homes]
            _say(f"patched nothing in this process: {target} never imported {' or '.join(known)}")

    atexit.register(report)
    sys.excepthook = functools.partial(_their_traceback, sys.excepthook)
    sys.argv = [target, *arguments]
    if module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")
    return 0


def _find_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # one of its parents
        return False


_told: list[str] = []  # lines said, so that the end of the process says no more than is needed
_failed: list[BaseException] = []  # what ended the script


def _say(line: str) -> None:
    """One line a machine, not one a process, and none from workers of ``multiprocessing``."""
    _told.append(line)
    if os.environ.get("LOCAL_RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(f"{PREFIX} {line}", file=sys.stderr, flush=True)


def imported(name: str) -> None:
    """A watched module was imported, here or in a child process: patch what it defines, or watch what it builds."""
    for trainer in TRAINERS:
        if name in trainer.homes:
            _patch(trainer)
    if name in BUILT and os.environ.get(TRAINERS_ONLY):
        _say_when_first_built(getattr(sys.modules[name], BUILT[name]))
    elif name == MODELS:
        _make_lazy()


def _make_lazy() -> None:
    try:
        integrations.patch_transformers()
    except (ImportError, ValueError) as error:  # a version we do not know: the script runs as it would without us
        _say(f"left the models of transformers alone: {error}")
    else:
        _say(f"logits of models of transformers {_version('transformers')} are lazy")
        if os.environ.get(REPORT):
            atexit.register(_report)


def _report() -> None:
    from orpo_kernels.integrations.lazy.heads import reports

    for model, report in reports():
        _say(f"{model}: {report}")


def _patch(trainer: Trainer) -> None:
    try:
        patch = trainer.load()
        if patch.applied:  # by another of its homes, or by the script itself
            return
        trainer.patch()
    except (ImportError, ValueError) as error:  # a version we do not know: the script runs on its library's own path
        _say(f"patched nothing: {error}")
    else:
        _say(f"patched {trainer.target} ({trainer.library} {_version(trainer.library)})")


def _built(cls: type) -> None:
    """Say that nothing is patched now, when a run begins, and not after its hours of training."""
    patched = [trainer for trainer in TRAINERS if any(home in sys.modules for home in trainer.homes)]
    known = " or ".join(trainer.target for trainer in TRAINERS)
    trainer_class = getattr(sys.modules.get("transformers.trainer"), "Trainer", ())
    if issubclass(cls, trainer_class):
        if not any(issubclass(cls, trainer.load().owner) for trainer in patched):
            _say(f"patched nothing of {cls.__module__}.{cls.__name__}: it is no {known}")
    elif not patched:
        _say(f"patched nothing so far: a {cls.__name__} is built and no {known} was imported")


def _say_when_first_built(cls: Any) -> None:
    init, due = cls.__init__, [_built]

    @functools.wraps(init)
    def first(self: Any, *args: Any, **kwargs: Any) -> None:
        if due:
            due.pop()(type(self))
        if cls.__init__ is first:  # and not wrapped by somebody else in the meantime
            cls.__init__ = init
        init(self, *args, **kwargs)

    cls.__init__ = first


def _their_traceback(
    hook: Callable[..., None], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A script's traceback begins with the script, as if python had run it."""
    _failed.append(error)
    kept = trace
    while kept is not None and kept.tb_frame.f_code is not run_script.__code__:
        kept = kept.tb_next
    while kept is not None and kept.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        kept = kept.tb_next
    if kept is not None or isinstance(error, SyntaxError):
        trace = kept
    hook(kind, error.with_traceback(trace), trace)


def doctor() -> int:
    """Print what a bug report needs."""
    print(f"orpo_kernels {orpo_kernels.__version__}, python {platform.python_version()}, {platform.platform()}")
    for library in ("torch", "triton", "transformers", "trl", "accelerate", "peft", "liger-kernel"):
        print(f"  {library:<13} {_version(library) or 'not installed'}{_tested(library)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        print(f"device: {torch.cuda.get_device_name()} ({torch.cuda.device_count()} visible)")
    else:
        print(f"device: cpu, {torch.get_num_threads()} threads")
    used = False
    for backend in by_preference(device):
        reason = backend.refuses(device, torch.bfloat16)
        states = torch.empty(1, 4096, dtype=torch.bfloat16, device=device)
        form = "" if reason else backend.form(states, Head(states.expand(8, -1)))
        print(f"backend {backend.name}: {reason or ('available' if used else 'used')}{form and f'; {form}'}")
        used = used or reason is None
    for trainer in (*TRAINERS, LIGER):
        print(f"patch {trainer.target}: {_patchable(trainer)}")
    print(f"lazy logits: {_lazy()}")
    return 0


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested(library: str) -> str:
    """How a library's version lies to those that were tried, as an addition to it."""
    version = _version(library)
    if library not in TESTED or version is None:
        return ""

    def number(of: str) -> tuple[int, ...]:
        return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in of.split(".")[:2])

    oldest, newest = TESTED[library]
    if number(version) < number(oldest):
        return f" (untested: older than {oldest})"
    return (
        f" (untested: newer than {newest})" if number(version) > number(newest) else f" (tested: {oldest} to {newest})"
    )


def _lazy() -> str:
    """Whether lazy logits give the loss of a small model of the transformers at hand."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        ids = torch.arange(32)[None]
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **shape))
        stock = model(ids, labels=ids).loss.item()
        loss = integrations.fuse(model, backend="torch")(ids, labels=ids).loss.item()
        report = integrations.fusion_report(model)
    except Exception as error:  # whatever a version that nobody tried does: the rest of what doctor says is needed then
        return f"no, {type(error).__name__}: {' '.join(str(error).split())}"
    if report.refusal or report.materialised:
        return f"no, {report}"
    if not abs(loss - stock) <= 1e-5 * abs(stock):
        return f"no, the loss of a small model is {loss:.7g} and {stock:.7g} without them"
    return f"yes, the loss of a small model is {loss:.7g} and {stock:.7g} without them"


def _patchable(trainer: Trainer) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trl says of its experimental modules what nobody asked here
            trainer.load()
    except ImportError as error:
        return f"no, {error}"
    return "yes"
