"""Says where the time goes between `bigmodels fit` and its first step: `python tests/benchmarks/startup.py`."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

IMPORTS = ["torch", "transformers", "torchmetrics", "lightning.pytorch", "lightning.pytorch.cli", "wandb"]
COMMAND = ["fit", "--config", "text/quickstart", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
COMMAND += ["--trainer.enable_progress_bar", "false"]


def child(began: float) -> None:
    """Run the command in this process and print the moments at which its parts ended."""
    marks: list[tuple[str, float]] = [("start Python", time.time() - began)]

    def mark(part: str) -> None:
        marks.append((part, time.time() - began))

    for name in IMPORTS:
        __import__(name)
        mark(f"import {name}")
    from lightning_bigmodels import cli
    from lightning_bigmodels.callbacks import Throughput
    from lightning_bigmodels.data import Text
    from lightning_bigmodels.modules import CausalLanguageModel
    from lightning_bigmodels.optim import MuonWithAdamW

    mark("import lightning_bigmodels")

    def around(owner: type, method: str, part: str, before: str) -> None:
        """Mark the end of a method, and what ran before it, the first time that it is called."""
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if all(part != known for known, _ in marks):
                mark(before)
                result = inner(*args, **kwargs)
                mark(part)
                return result
            return inner(*args, **kwargs)

        setattr(owner, method, outer)

    around(cli.CLI, "parse_arguments", "read the configuration", "build the parser")
    around(cli.CLI, "instantiate_classes", "build Trainer, model, data, loggers", "seed")
    around(Text, "prepare_data", "tokenizer and tokens", "enter fit")
    around(Text, "setup", "open the tokens", "start of the loggers: W&B")
    around(Throughput, "setup", "Throughput: a matrix product", "other callbacks' setup")
    around(CausalLanguageModel, "configure_model", "build the network", "go on to the network")
    around(CausalLanguageModel, "configure_optimizers", "build the optimizer", "strategy")
    around(Throughput, "on_fit_start", "Throughput, on_fit_start", "go on to on_fit_start")
    around(CausalLanguageModel, "on_train_start", "on_train_start", "loaders, other callbacks: first Samples")
    around(CausalLanguageModel, "training_step", "first forward pass", "first batch")
    around(MuonWithAdamW, "step", "first optimizer step", "the optimizer's outer half")
    cli.run(COMMAND)
    mark("after the first step, to the end")
    parts: Counter[str] = Counter()
    last = 0.0
    for part, moment in marks:
        parts[part] += moment - last
        last = moment
    print("\n" + json.dumps(parts))


def run_child(folder: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "WANDB_MODE": "offline"}
    command = [sys.executable, *flags, str(Path(__file__).resolve()), "--child", repr(time.time())]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)


def packages_by_import_time(report: str) -> Counter[str]:
    """Return the seconds that each top-level package's own modules take, from what `-X importtime` writes."""
    seconds: Counter[str] = Counter()
    for match in re.finditer(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", report):
        seconds[match[2].split(".")[0]] += int(match[1]) / 1e6
    return seconds


def print_startup(runs: int = 3) -> None:
    """Print seconds from the command to the first step: with nothing cached, then the best of some runs."""
    print("\nFrom `bigmodels fit --config text/quickstart` to its first step, seconds")
    with tempfile.TemporaryDirectory() as folder:
        cold = json.loads(run_child(folder).stdout.splitlines()[-1])
        end = "after the first step, to the end"

        def total(parts: dict[str, float]) -> float:
            return sum(seconds for part, seconds in parts.items() if part != end)

        warm = [json.loads(run_child(folder).stdout.splitlines()[-1]) for _ in range(runs)]
        best = min(warm, key=total)
        report = run_child(folder, "-X", "importtime").stderr
    print(f"  {'':<46}{'first run':>10}{f'best of {runs}':>12}")
    for part in [*(part for part in cold if part != end), end]:
        print(f"  {part:<46}{cold[part]:>10.2f}{best[part]:>12.2f}")
    print(f"  {'to the first step':<46}{total(cold):>10.2f}{total(best):>12.2f}")
    print("  Packages whose own modules take longest to import, seconds (-X importtime, which itself takes time):")
    costly = packages_by_import_time(report).most_common(16)
    print("   ", ", ".join(f"{name} {seconds:.2f}" for name, seconds in costly))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="Runs with a warm cache.")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
    else:
        print_startup(args.runs)


if __name__ == "__main__":
    main()
