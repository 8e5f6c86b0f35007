"""The demonstration: one training script, run with and without orpo_kernels, and the ORPO paper's central picture.

`python -m examples.demo` (or `make demo`) trains three times from the same seed:

(a) stock TRL: `python examples/train_orpo.py ...`
(b) the same script, unmodified: `python -m orpo_kernels run examples/train_orpo.py ...`
(c) as (b) with `--beta 0`, which is fine-tuning on the chosen answers alone.

(a) and (b) must agree to 1e-3 at every step, or the command fails. (b) against (c) is Figure 3 of the ORPO paper
(arXiv 2403.07691): fine-tuning on chosen answers raises the rejected ones too, the odds-ratio term parts them.
The default weight of that term is 5 instead of TRL's 0.1, because 120 steps of a small model must show what
thousands of steps of a large one do.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

SCRIPT = Path(__file__).with_name("train_orpo.py")
TOLERANCE = 1e-3  # relative; float32 runs begin at 1e-7, and 120 steps of Adam grow that to about 1e-4
History = dict[str, Any]  # what train_orpo.py writes into history.json


@dataclass(frozen=True)
class Run:
    """One training run: its folder under the output, its name in the table, how it is started."""

    folder: str
    title: str
    launcher: tuple[str, ...]
    arguments: tuple[str, ...] = ()


LAUNCHER = ("-m", "orpo_kernels", "run")
STOCK = Run("stock", "(a) stock TRL", ())
PATCHED = Run("patched", "(b) orpo_kernels", LAUNCHER)
TUNED = Run("tuned", "(c) fine-tuning", LAUNCHER, ("--beta", "0"))
RUNS = (STOCK, PATCHED, TUNED)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Path, list[str]]:
    """The output folder, and the options that every run gets."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train with stock TRL, with orpo_kernels, and on chosen answers alone; compare the three.",
        epilog="Every other option goes to the training script: see python examples/train_orpo.py --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="JSONL file of prompt, chosen, rejected (default: Python's own docs)")
    parser.add_argument("--model", help="path or name of a causal language model (default: a small Llama, untrained)")
    parser.add_argument("--max-steps", help="optimizer steps of each run (default: 120)")
    parser.add_argument("--beta", default="5", help="weight of the odds-ratio term in (a) and (b) (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for everything written")
    options, shared = parser.parse_known_args(arguments)
    for name in ("data", "model", "max_steps", "beta"):
        value = getattr(options, name)
        if value is not None:
            shared += [f"--{name.replace('_', '-')}", value]
    return options.output, shared


def train(run: Run, output: Path, shared: list[str], console: Console) -> History:
    """Run the training script in a process of its own, its progress bar passing through; exit if it fails."""
    folder = output / run.folder
    command = [*run.launcher, os.path.relpath(SCRIPT), *shared, *run.arguments, "--output", str(folder)]
    console.print(f"\n[bold]{run.title}[/]: python {' '.join(command)}", highlight=False, soft_wrap=True)
    environment = {
        "TRL_EXPERIMENTAL_SILENCE": "1",  # ORPO lives in trl.experimental, and TRL says so at every import
        "PYTHONWARNINGS": "ignore::FutureWarning",  # transformers on the name of an option that TRL itself still uses
        **os.environ,
    }
    begun = time.perf_counter()
    code = subprocess.run([sys.executable, *command], env=environment, check=False).returncode
    if code != 0:
        sys.exit(f"demo: the run {run.title} failed with exit code {code}; its own message is above")
    history: History = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    history["wall_seconds"] = time.perf_counter() - begun
    return history


def check_patching(histories: dict[Run, History]) -> None:
    """Exit unless the trainer was TRL's own in (a) and orpo_kernels' in (b) and (c), by the runs' own records."""
    for run, history in histories.items():
        modules = set(history["foreign_methods"].values())
        expected = bool(run.launcher)
        if expected != any(module.startswith("orpo_kernels.") for module in modules):
            sys.exit(
                f"demo: the trainer's methods should {'' if expected else 'not '}come from orpo_kernels in "
                f"{run.title}, but those that are not TRL's come from: {', '.join(sorted(modules)) or 'nowhere'}"
            )


def differences(stock: History, patched: History) -> tuple[list[float], list[float]]:
    """Absolute and relative difference of the loss, step by step; infinite where either loss is not finite."""
    absolute, relative = [], []
    for ours, theirs in zip(patched["steps"], stock["steps"], strict=True):
        gap = abs(ours["loss"] - theirs["loss"])
        absolute.append(gap if math.isfinite(gap) else math.inf)
        relative.append(absolute[-1] / max(abs(theirs["loss"]), sys.float_info.min))
    return absolute, relative


def table(histories: dict[Run, History], absolute: list[float], relative: list[float]) -> Table:
    """The comparison as a table."""
    stock = histories[STOCK]
    parameters = f"{stock['parameters'] / 1e6:.1f} M parameters, vocabulary {stock['vocabulary']:,}"
    result = Table(title=f"{parameters}, {len(stock['steps'])} steps, {stock['device']}", title_style="bold")
    result.add_column("")
    for run in histories:
        result.add_column(run.title, justify="right")
    for name, cell in (
        ("beta", lambda history: f"{history['arguments']['beta']:g}"),
        ("final loss", lambda history: f"{history['steps'][-1]['loss']:.6f}"),
        ("seconds a step (median)", lambda history: f"{history['seconds_per_step']:.3f}"),
        ("peak memory, GB", lambda history: f"{history['peak_memory_bytes'] / 1e9:.2f}"),
        ("  of it before training", lambda history: f"{history['memory_before_training_bytes'] / 1e9:.2f}"),
        ("whole run, seconds", lambda history: f"{history['wall_seconds']:.0f}"),
    ):
        result.add_row(name, *(cell(history) for history in histories.values()))
    result.caption = f"worst difference of (a) and (b) at any step: {max(absolute):.1e}, relative {max(relative):.1e}"
    return result


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and the up to `window - 1` before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def draw(histories: dict[Run, History], worst: float, path: Path) -> None:
    """Two panels: the losses of (a) and (b) on top of each other; log-probabilities under (b) and (c)."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    beta = histories[PATCHED]["arguments"]["beta"]
    count = len(histories[PATCHED]["steps"])
    numbers = range(1, count + 1)

    def series(run: Run, metric: str) -> list[float]:
        return [step[metric] for step in histories[run]["steps"]]

    left.plot(numbers, series(STOCK, "loss"), color="#f2b45a", linewidth=6, label=STOCK.title)
    left.plot(numbers, series(PATCHED, "loss"), color="#17324d", linewidth=1.2, label=PATCHED.title)
    left.set(title=f"The same loss: worst relative difference {worst:.0e}", xlabel="step", ylabel="ORPO loss")

    window = max(1, count // 12)
    smoothed = f" (running mean of {window} steps)" if window > 1 else ""
    for run, color, name in ((TUNED, "#b0563b", "fine-tuning, beta 0"), (PATCHED, "#17324d", f"ORPO, beta {beta:g}")):
        for side, style in (("chosen", "-"), ("rejected", "--")):
            means = running_mean(series(run, f"logps/{side}"), window)
            right.plot(numbers, means, style, color=color, linewidth=1.8, label=f"{side}, {name}")
    right.set(title="Fine-tuning raises both answers, ORPO parts them", xlabel="step")
    right.set_ylabel(f"log-probability per token, nats{smoothed}")

    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    output, shared = parse_arguments()
    output.mkdir(parents=True, exist_ok=True)
    progress = Console(stderr=True)
    histories = {run: train(run, output, shared, progress) for run in RUNS}
    check_patching(histories)

    absolute, relative = differences(histories[STOCK], histories[PATCHED])
    picture = output / "demo.png"
    draw(histories, max(relative), picture)
    summary = {
        "worst_absolute_difference": max(absolute),
        "worst_relative_difference": max(relative),
        "runs": {
            run.folder: {"final": history["steps"][-1]} | {k: v for k, v in history.items() if k != "steps"}
            for run, history in histories.items()
        },
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    console = Console()
    console.print(table(histories, absolute, relative))
    console.print(f"Picture: {picture}   Numbers: {output / 'summary.json'}", highlight=False)
    if histories[STOCK]["steps"] == histories[PATCHED]["steps"]:
        console.print(
            "[bold yellow]Not one bit differs between (a) and (b)[/]: for this model orpo_kernels most likely kept "
            "TRL's own path; the warning in the output of (b) says why."
        )
    if max(relative) > TOLERANCE:
        first = next(step for step, gap in enumerate(relative, start=1) if gap > TOLERANCE)
        console.print(
            f"[bold red]FAILED: the loss of (b) is not that of (a)[/]: {max(relative):.1e} relative, where at most "
            f"{TOLERANCE:g} is allowed; first at step {first}. If it begins late in a run with a high learning rate, "
            "compare two runs of (a) with different OMP_NUM_THREADS: they part in the same way."
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
