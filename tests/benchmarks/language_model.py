"""Trains the same 10.6 M parameter Llama with our `fit`, a PyTorch loop, transformers' Trainer and litgpt, in turns.

Needs `pip install -e ".[bench]"`; run `python tests/benchmarks/language_model.py` on a machine that does nothing else.
`--quick` shows in a few minutes that everything runs; its figures mean nothing.
"""

import argparse
import logging
import os
import statistics
import warnings
from importlib.util import find_spec

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from contestants import (
    CONTESTANTS,
    QUICK,
    Clock,
    Contestant,
    Data,
    HuggingFace,
    OurFit,
    Setting,
    Size,
    llama,
)
from peak_memory import peak_bytes
from startup import print_startup
from torch import Tensor, nn

WARMUP = 2
SETTINGS = [Setting(), Setting(bf16=True), Setting(bf16=True, compile=True)]
MEBIBYTE = 2**20


def verdict(met: bool) -> str:
    return "PASS" if met else "MISSED"


def start_weights(size: Size) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in llama(size).state_dict().items()}


def same_work(data: Data, weights: dict[str, Tensor], steps: int) -> None:
    """Show that all do the same: from the same weights, the validation loss after each step."""
    print(f"\nSame work: validation loss after each of {steps} steps, fp32 eager, equal AdamW")
    columns: list[list[float]] = []
    for contestant in (kind(data, Setting()) for kind in CONTESTANTS):
        contestant.load(weights)
        clock = Clock(lambda c=contestant: data.validation_loss(c.logits, limit=1))
        contestant.train(steps, clock)
        columns.append([value for _, _, value in clock.probes])
        count = sum(p.numel() for p in contestant.network.parameters())
        print(f"  {contestant.name:<18}{count:>12,} parameters  " + "  ".join(f"{v:.5f}" for v in columns[-1]))
    spread = max(max(row) - min(row) for row in zip(*columns, strict=True))
    print(f"  largest difference {spread:.1e}, at most 1e-3: {verdict(spread <= 1e-3)}")


def step_times(contestants: list[Contestant], weights: dict[str, Tensor], steps: int, rounds: int) -> list[list[float]]:
    """Return each contestant's median step time in each round; they take turns, in changing order."""
    times: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds):
        for place in range(len(contestants))[:: 1 if number % 2 == 0 else -1]:
            clock = Clock()
            contestants[place].load(weights)
            contestants[place].train(WARMUP + steps, clock)
            times[place].append(statistics.median(clock.step_seconds(WARMUP)))
    return times


def print_times(contestants: list[Contestant], times: list[list[float]], against: int, tokens: int) -> list[float]:
    """Print tokens/s, and the speed relative to the contestant `against`: median, least and most of all rounds."""
    medians = []
    for contestant, own in zip(contestants, times, strict=True):
        ratios = [base / mine for base, mine in zip(times[against], own, strict=True)]
        medians.append(statistics.median(ratios))
        print(
            f"  {contestant.name:<18}{contestant.setting!s:<16}{tokens / statistics.median(own):>9,.0f} tokens/s"
            f"{statistics.median(own) * 1e3:>9.1f} ms/step"
            f"   {medians[-1]:.3f} of {contestants[against].name[0]} [{min(ratios):.3f} .. {max(ratios):.3f}]"
        )
    return medians


def speed(data: Data, weights: dict[str, Tensor], steps: int, rounds: int, compiled: bool) -> None:
    tokens = data.size.rows * data.size.length
    for setting in SETTINGS if compiled else SETTINGS[:2]:
        print(f"\nSpeed, {setting}, equal AdamW: {rounds} rounds of {steps} steps, after {WARMUP} not counted")
        contestants = [kind(data, setting) for kind in CONTESTANTS]
        if setting.compile:
            step_times(contestants, weights, 1, 1)
        ratios = print_times(contestants, step_times(contestants, weights, steps, rounds), 1, tokens)
        print(f"  (a) at least 0.98 of (b): {verdict(ratios[0] >= 0.98)}")


def recipe_speed(data: Data, weights: dict[str, Tensor], steps: int, rounds: int, compiled: bool) -> None:
    """Ours with the recipe's settings, the others as people run them."""
    tokens = data.size.rows * data.size.length
    print(f"\nSpeed, as people run them on a CPU and ours with its recipe: {rounds} rounds of {steps} steps")
    ours = [OurFit(data, Setting(own=True, bf16=True))]
    ours += [OurFit(data, Setting(own=True, bf16=True, compile=True))] if compiled else []
    contestants = [*ours, *(kind(data, Setting(own=True)) for kind in CONTESTANTS[2:])]
    step_times(ours, weights, 1, 1)
    times = step_times(contestants, weights, steps, rounds)
    print_times(contestants, times, len(ours), tokens)
    best = min(times[: len(ours)], key=statistics.median)
    for other, theirs in zip(contestants[len(ours) :], times[len(ours) :], strict=True):
        ratio = statistics.median(b / a for a, b in zip(best, theirs, strict=True))
        print(f"  (a) at least 2.2 times ({other.name[0]}): {ratio:.2f}, {verdict(ratio >= 2.2)}")


def memory(data: Data, weights: dict[str, Tensor], compiled: bool) -> None:
    """Print the peak of tensor bytes of two steps, the second of them with the optimizer's state."""
    print("\nPeak memory in tensors, weights and optimizer state included (MiB), and relative to (b)")
    for setting in SETTINGS if compiled else SETTINGS[:2]:
        peaks = []
        for contestant in (kind(data, setting) for kind in CONTESTANTS):
            if setting.compile:
                contestant.train(1, Clock())
            contestant.load(weights)
            peaks.append(peak_bytes(lambda c=contestant: c.train(2, Clock()), held=num_bytes(contestant.network)))
        cells = (f"{kind.name[0]} {peak / MEBIBYTE:,.1f} ({peak / peaks[1]:.2f})" for kind, peak in _pairs(peaks))
        print(f"  {setting!s:<16}" + "   ".join(cells))


def _pairs(peaks: list[int]) -> zip:
    return zip(CONTESTANTS, peaks, strict=True)


def num_bytes(network: nn.Module) -> int:
    return sum(t.nbytes for t in network.state_dict().values())


def time_to_loss(data: Data, weights: dict[str, Tensor], steps: int, our_steps: int, every: int, lr: float) -> None:
    """Time (c)'s whole run, then ours, its validation, samples and checkpoints included, until it is as good."""
    print(f"\nTime to the best validation loss of (c) in {steps} steps; measured every {every} steps, in fp32")
    results = []
    for kind, setting, length in (
        (HuggingFace, Setting(own=True, lr=lr), steps),
        (OurFit, Setting(own=True, bf16=True, recipe_callbacks=True), our_steps),
    ):
        contestant = kind(data, setting)
        contestant.load(weights)
        clock = Clock(lambda c=contestant: data.validation_loss(c.logits), every)
        contestant.train(length, clock)
        results.append(clock)
        curve = "  ".join(f"{step}:{loss:.3f}" for step, _, loss in clock.probes[:: max(1, len(clock.probes) // 10)])
        print(f"  {contestant.name:<18}{length} steps in {clock.ends[-1]:.1f} s   {curve}")
    theirs, ours = results
    goal = min(loss for _, _, loss in theirs.probes)
    reached = next(((step, seconds) for step, seconds, loss in ours.probes if loss <= goal), None)
    first = next(seconds for _, seconds, loss in theirs.probes if loss <= goal)
    print(f"  (c) reaches {goal:.4f} after {first:.1f} s")
    if reached is None:
        print(f"  (a) does not reach it; its best is {min(loss for *_, loss in ours.probes):.4f}: MISSED")
        return
    step, seconds = reached
    print(f"  (a) reaches it after {step} steps, {seconds:.1f} s: {seconds / first:.2f} of (c)'s time")
    print(f"  at most half: {verdict(seconds <= first / 2)}")


def main() -> None:
    parts = ["same", "speed", "recipe", "memory", "loss", "startup"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="Parts to run; all of them by default.")
    parser.add_argument("--steps", type=int, default=8, help="Counted steps of a contestant in each round.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds in which the contestants take turns.")
    parser.add_argument("--run-steps", type=int, default=200, help="Steps of (c)'s whole run.")
    parser.add_argument("--our-steps", type=int, default=100, help="Steps over which our run's schedule is laid.")
    parser.add_argument("--lr", type=float, default=1e-3, help="Learning rate of (c)'s whole run.")
    parser.add_argument("--eager", action="store_true", help="Leave out what is compiled.")
    parser.add_argument("--quick", action="store_true", help="A tiny network and few steps: only shows that all runs.")
    args = parser.parse_args()
    if missing := [name for name in ("litgpt", "accelerate") if find_spec(name) is None]:
        parser.error(f'{" and ".join(missing)} is not installed; run: pip install -e ".[bench]"')
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.quick:
        args.steps, args.rounds, args.run_steps, args.our_steps = 2, 2, 40, 20
    data = Data(QUICK if args.quick else Size())
    weights = start_weights(data.size)
    if "same" in args.only:
        same_work(data, weights, 4)
    if "speed" in args.only:
        speed(data, weights, args.steps, args.rounds, not args.eager)
    if "recipe" in args.only:
        recipe_speed(data, weights, args.steps, args.rounds, not args.eager)
    if "memory" in args.only:
        memory(data, weights, not args.eager)
    if "loss" in args.only:
        time_to_loss(data, weights, args.run_steps, args.our_steps, 2 if args.quick else 5, args.lr)
    if "startup" in args.only:
        print_startup()


if __name__ == "__main__":
    main()
