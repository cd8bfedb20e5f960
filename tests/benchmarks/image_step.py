"""Times the training step of a ResNet-50 in our `fit`, in a plain loop, and in a loop after timm's training script.

timm's wheel holds its networks, losses and optimizer factory, and not its `train.py`. The third contestant is a loop
written after that script's defaults for a folder of images: `timm.create_model("resnet50")`, `create_optimizer_v2` with
SGD of Nesterov momentum and weight decay 2e-5, `LabelSmoothingCrossEntropy(0.1)`, pixels that the loader has normalized
to float32, no autocast and no channels-last (its flags are off by default), no EMA. It is not timm's script itself.

Ours is compared with the plain loop like for like. With timm's defaults it is compared as the recipe runs it, in bf16
and channels-last; the same loop with `--amp --channels-last` tells what of that is due to the flags.

    python tests/benchmarks/image_step.py          # about five minutes on two quiet cores
    python tests/benchmarks/image_step.py --quick  # only shows that all runs
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torchvision
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigmodels.modules import ImageClassifier
from lightning_bigmodels.networks.pixels import PixelNetwork
from lightning_bigmodels.networks.pixels import statistics as pixel_statistics

WARMUP = 2
CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    bf16: bool
    channels_last: bool

    def __str__(self) -> str:
        return f"{'bf16' if self.bf16 else 'fp32'}, {'channels last' if self.channels_last else 'channels first'}"


@dataclass
class Stopwatch:
    """Ends of optimizer steps: the hook sits on the optimizer, the same for every loop."""

    ends: list[float] = field(default_factory=list)

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda *_: self.ends.append(time.perf_counter()))
        return optimizer

    def median(self) -> float:
        ends = self.ends[WARMUP:]
        return statistics.median(b - a for a, b in pairwise(ends))


class Data(LightningDataModule):
    """The same pictures at every step: what is timed is the step."""

    def __init__(self, rows: int, size: int, steps: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.batch = {
            "images": torch.randint(256, (rows, 3, size, size), dtype=torch.uint8, generator=generator),
            "labels": torch.randint(CLASSES, (rows,), generator=generator),
            "indices": torch.arange(rows),
        }
        self.steps = steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * self.steps, batch_size=None)


class _Quiet(Callback):
    """Stands for what a user's run has too: one callback that looks at each batch."""


def sgd(groups: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=2e-5)  # type: ignore[arg-type]


def ours(data: Data, setting: Setting) -> float:
    clock = Stopwatch()
    model = ImageClassifier(
        "resnet50",
        CLASSES,
        label_smoothing=0.1,
        channels_last=setting.channels_last,
        optimizer=lambda groups: clock.watch(sgd(groups)),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=data.steps,
        precision="bf16-mixed" if setting.bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Quiet()],
    )
    trainer.fit(model, data)
    return clock.median()


def plain(data: Data, setting: Setting) -> float:
    """Run the loop that one writes by hand: the same network, loss, optimizer and precision."""
    clock = Stopwatch()
    network = PixelNetwork(torchvision.models.resnet50(), *pixel_statistics(3))
    if setting.channels_last:
        network = network.to(memory_format=torch.channels_last)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim < 2]
    optimizer = clock.watch(sgd([{"params": decayed}, {"params": rest, "weight_decay": 0.0}]))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    network.train()
    for batch in data.train_dataloader():
        images = batch["images"]
        if setting.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            logits = network(images)
        loss = criterion(logits.float(), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock.median()


def after_timm(data: Data, setting: Setting) -> float:
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    clock = Stopwatch()
    network = timm.create_model("resnet50", num_classes=CLASSES)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    optimizer = clock.watch(create_optimizer_v2(network, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9))
    criterion = LabelSmoothingCrossEntropy(0.1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(3))
    network.train()
    for step, batch in enumerate(data.train_dataloader()):
        # the loader's part in the script, which normalizes what workers collated as uint8
        images = batch["images"].float().sub_(mean * 255).div_(std * 255).contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            loss = criterion(network(images), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            loss.item()
    return clock.median()


def rounds(contestants: dict[str, Callable[[], float]], number: int) -> dict[str, list[float]]:
    """Let contestants take turns, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(number):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(contestants[name]())
    return times


def show(times: dict[str, list[float]], rows: int, first: str, second: str, least: float) -> None:
    for name, own in times.items():
        median = statistics.median(own)
        print(f"  {name:<42}{median * 1e3:>9.1f} ms/step{rows / median:>8.1f} images/s")
    ratios = sorted(b / a for a, b in zip(times[first], times[second], strict=True))
    ratio = statistics.median(ratios)
    print(
        f"  {first} is {ratio:.3f} times as fast as {second} [{ratios[0]:.3f} .. {ratios[-1]:.3f}], at least {least}: "
        f"{'PASS' if ratio >= least else 'MISSED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="Pictures of a batch.")
    parser.add_argument("--size", type=int, default=128, help="Their height and width.")
    parser.add_argument("--steps", type=int, default=6, help="Steps of a turn that count.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each contestant.")
    parser.add_argument("--quick", action="store_true", help="Tiny pictures, one round: only shows that all runs.")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.size, args.steps, args.rounds = 2, 32, 2, 1
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = Data(args.rows, args.size, WARMUP + 1 + args.steps)
    print(f"ResNet-50, {args.rows} pictures of {args.size} pixels, {args.rounds} rounds of {args.steps} steps")
    for setting in (Setting(bf16=True, channels_last=True), Setting(bf16=False, channels_last=False)):
        print(f"\nLike for like, {setting}")
        pair = {"our fit": lambda s=setting: ours(data, s), "a plain loop": lambda s=setting: plain(data, s)}
        show(rounds(pair, args.rounds), args.rows, "our fit", "a plain loop", 0.98)
    best, default = Setting(bf16=True, channels_last=True), Setting(bf16=False, channels_last=False)
    print("\nAs people run them: ours as its recipe, timm's with its defaults and with its best flags")
    three = {
        "our fit": lambda: ours(data, best),
        "a loop after timm's defaults": lambda: after_timm(data, default),
        "the same with --amp --channels-last": lambda: after_timm(data, best),
    }
    times = rounds(three, args.rounds)
    show(times, args.rows, "our fit", "a loop after timm's defaults", 1.1)
    ratio = statistics.median(
        b / a for a, b in zip(times["our fit"], times["the same with --amp --channels-last"], strict=True)
    )
    print(f"  with the same flags on both sides: {ratio:.3f} times")


if __name__ == "__main__":
    main()
