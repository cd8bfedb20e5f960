"""Trains a GAN and a diffusion model beside the loops that people copy, for equal times, and compares the pictures.

The GAN's opponent is a loop written after the public DCGAN example of PyTorch: pictures are transformed one by one and
loaded by two workers, everything is float32, Adam with 2e-4 and betas 0.5 and 0.999, binary cross entropy behind a
sigmoid, three passes of the discriminator a step, samples with the statistics of their own batch. The diffusion model's
opponent is a loop written after diffusers' example of unconditional training, with its defaults: pictures transformed
one by one, batches of 16, float32, AdamW with 1e-4, betas 0.95 and 0.999 and weight decay 1e-6, a cosine schedule and
500 steps of warm-up, gradients clipped at 1, diffusers' own average of the weights. Both opponents train the very
networks that ours trains, and none of their code is copied.

Ours is the recipe: its model, batches, optimizers, precision and average of the weights. One contestant runs after the
other, on a machine that should do nothing else, and stops when its time is up. Both schedules are laid over that time,
not over a number of steps that nobody knows before. Then both make pictures of the same numbers, and these are compared
with real ones (FID; lower is better) by pixels and, if a checkpoint of an `ImageClassifier` is given, by what that
sees. Diffusion models are sampled in the same way on both sides, as the recipe does.

    python tests/benchmarks/generative.py --root FOLDER --features fashion.ckpt  # about twelve minutes on two cores
    python tests/benchmarks/generative.py --root FOLDER --quick                  # only shows that all runs
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import lightning_bigmodels
from lightning_bigmodels.callbacks import WeightAverage
from lightning_bigmodels.callbacks.picture_features import PIXELS, load_features, metric_name
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.recipe_files import find_config
from lightning_bigmodels.tasks.sample_comparison import SampleComparison
from lightning_bigmodels.tasks.sample_noise import SampleNoise

FASTER = 1.2
WARMUP = 20  # steps
PARTS = 10_000  # of a contestant's time, which schedules take for its steps
EXAMPLE = {"prediction": "epsilon", "noise_schedule": "linear", "min_snr_gamma": None, "channels_last": False}


class Clock:
    """Counts what a contestant does in its time, which begins behind the first steps, in which kernels are made.

    Args:
        seconds: What it may use.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.used = 0.0
        self.steps = self.images = 0
        self._to_come = WARMUP
        self._since = 0.0

    @property
    def rate(self) -> float:
        return self.images / self.used

    @property
    def share(self) -> float:
        """Of the time, from 0 to 1."""
        return min(1.0, self.used / self.seconds)

    def step(self, images: int) -> bool:
        """Count a step, and return whether there is time left."""
        now = time.perf_counter()
        if self._to_come:
            self._to_come -= 1
        else:
            self.used += now - self._since
            self.images += images
            self.steps += 1
        self._since = now
        return self.used < self.seconds


class Recipe:
    """What a recipe trains, built as the command builds it.

    Args:
        name: The recipe's.
        root: Folder of the pictures.
        model: Arguments of the model that differ.
        other: Arguments in which the opponent's model differs from ours.
        quick: Few pictures.
    """

    def __init__(self, name: str, root: str, model: dict[str, Any], other: dict[str, Any], quick: bool) -> None:
        config = yaml.safe_load(Path(find_config(name)).read_text(encoding="utf-8"))
        config["model"]["init_args"] |= model
        config["data"]["init_args"] |= {"root": root, "num_workers": 0}
        theirs = {**config["model"], "init_args": config["model"]["init_args"] | other}
        self.config = {"model": config["model"], "theirs": theirs, "data": config["data"]}
        self.precision = config["trainer"].get("precision", "32-true")
        self.batch_size = config["data"]["init_args"]["batch_size"]
        averages = [one for one in config["trainer"]["callbacks"] if one["class_path"] == "WeightAverage"]
        self.average = averages[0].get("init_args", {}) if averages else None
        self.data = self._built("data")
        self.data.setup("fit")
        part = self.data.parts["train"]
        self.pictures = torch.stack([part.read(index).image for index in range(1000 if quick else len(part))])

    def model(self) -> Any:
        return self._built("model")

    def opponents_model(self) -> Any:
        model = self._built("theirs")
        model.configure_model()
        return model

    def _built(self, part: str) -> Any:
        # a class is known by its short name once it is imported
        getattr(lightning_bigmodels, self.config[part]["class_path"])
        parser = LightningArgumentParser(exit_on_error=False)
        kind = LightningDataModule if part == "data" else LightningModule
        parser.add_lightning_class_args(kind, part, subclass_mode=True)
        return parser.instantiate_classes(parser.parse_object({part: self.config[part]}))[part]


class _Timed(Callback):
    """Stops the Trainer when its time is up."""

    def __init__(self, clock: Clock, batch_size: int) -> None:
        self.clock, self.batch_size = clock, batch_size

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not self.clock.step(self.batch_size):
            trainer.should_stop = True


def by_the_clock(schedule: ScheduleCallable, clock: Clock) -> ScheduleCallable:
    """Return a schedule that is as far as the time is."""

    def make(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        made = schedule(optimizer, PARTS)
        step = made.step

        def step_to_now() -> None:
            made.last_epoch = int(clock.share * PARTS) - 1
            step()

        made.step = step_to_now  # type: ignore[method-assign]
        return made

    return make


Maker = Callable[[Tensor], Tensor]
Opponent = Callable[[Any, Tensor, Clock], Maker]


def ours(recipe: Recipe, clock: Clock) -> Maker:
    """Train the recipe in `fit`, and return what makes pictures of numbers."""
    seed_everything(0, verbose=False)
    model = recipe.model()
    for name in ("schedule", "discriminator_schedule"):
        if getattr(model, name, None) is not None:
            setattr(model, name, by_the_clock(getattr(model, name), clock))
    average = [] if recipe.average is None else [WeightAverage(**recipe.average)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10**6,
        precision=recipe.precision,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*average, _Timed(clock, recipe.batch_size)],
    )
    trainer.fit(model, recipe.data)
    model.eval()
    return lambda numbers: model.generate_pictures(SampleNoise(numbers, seed=1))


class OneByOne(Dataset[Tensor]):
    """Pictures as a data set of torchvision has them: each becomes a Pillow image, is transformed, and a tensor."""

    def __init__(self, pictures: Tensor, steps: list[Any]) -> None:
        self.arrays = pictures[:, 0].numpy()
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.arrays[index], mode="L"))


def epochs(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader


def after_dcgan(model: Any, pictures: Tensor, clock: Clock, batch_size: int = 128) -> Maker:
    """Train the generator and the discriminator of a GAN as PyTorch's public example does."""
    size = model.image_shape[1]
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    data = OneByOne(pictures, [*steps, transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=2)
    generator, discriminator = model.network.train(), model.discriminator.train()
    criterion = nn.BCELoss()
    adams = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (discriminator, generator)]

    def judged(images: Tensor, label: float) -> Tensor:
        output = discriminator(images).sigmoid().view(-1)
        return criterion(output, torch.full_like(output, label))

    for real in epochs(loader):
        discriminator.zero_grad()
        judged(real, 1.0).backward()
        made = generator(torch.randn(len(real), model.latent_dim))
        judged(made.detach(), 0.0).backward()
        adams[0].step()
        generator.zero_grad()
        judged(made, 1.0).backward()
        adams[1].step()
        if not clock.step(len(real)):
            break

    def generate(numbers: Tensor) -> Tensor:
        made = generator(SampleNoise(numbers, seed=1).normal(model.latent_dim))
        return ((made / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    return generate


def after_diffusers(model: Any, pictures: Tensor, clock: Clock, batch_size: int = 16) -> Maker:
    """Train the network of a diffusion model as diffusers' example does; `model` samples by the same schedule."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    size = model.image_shape[1]
    bilinear = transforms.InterpolationMode.BILINEAR
    steps = [transforms.Resize(size, interpolation=bilinear), transforms.CenterCrop(size), transforms.ToTensor()]
    data = OneByOne(pictures, [*steps, transforms.Normalize([0.5], [0.5])])
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=0)
    network = model.network.train()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = LambdaLR(optimizer, lambda step: min(1.0, step / 500) * 0.5 * (1 + math.cos(math.pi * clock.share)))
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for clean in epochs(loader):
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (len(clean),))
        predicted = network(scheduler.add_noise(clean, noise, times), times).sample
        F.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        if not clock.step(len(clean)):
            break
    average.copy_to(network.parameters())
    model.eval()
    return lambda numbers: model.generate_pictures(SampleNoise(numbers, seed=1))


@dataclass
class Judge:
    """Compares pictures of the first numbers with as many real ones."""

    real: Tensor
    networks: dict[str, nn.Module]

    @torch.no_grad()
    def __call__(self, generate: Maker) -> dict[str, float]:
        metrics = {name: SampleComparison() for name in self.networks}
        for numbers in torch.arange(len(self.real)).split(128):
            made = generate(numbers)
            for name, network in self.networks.items():
                metrics[name].update(numbers, network(self.real[numbers]), network(made))
        return {name: float(metric.compute()["fid"]) for name, metric in metrics.items()}


def contest(title: str, recipe: Recipe, opponent: Opponent, judge: Judge, seconds: float) -> None:
    """Run both, and say how many pictures each trained on and how well it paints."""

    print(f"\n{title}, {seconds:.0f} s each")
    clocks, results = [], []
    for place, name in enumerate(("ours", "theirs")):
        clock = Clock(seconds)
        maker = ours(recipe, clock) if place == 0 else opponent(recipe.opponents_model(), recipe.pictures, clock)
        clocks.append(clock)
        results.append(judge(maker))
        values = "".join(f"   FID by {features} {value:.3f}" for features, value in results[-1].items())
        print(f"  {name:<8}{clock.used:6.1f} s{clock.steps:7} steps{clock.rate:8.0f} images/s{values}", flush=True)
    ratio = clocks[0].rate / clocks[1].rate
    print(f"  images/s: {ratio:.2f} times theirs, at least {FASTER}: {'PASS' if ratio >= FASTER else 'MISSED'}")
    for features, value in results[0].items():
        verdict = "PASS" if value <= results[1][features] else "MISSED"
        print(f"  FID by {features}: {value:.3f}, at most theirs, {results[1][features]:.3f}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/usr/share/datasets/fashion-mnist", help="Folder of Fashion-MNIST.")
    parser.add_argument("--features", help="Checkpoint of an ImageClassifier, to compare by too.")
    parser.add_argument("--seconds", type=float, default=150.0, help="Training time of each contestant.")
    parser.add_argument("--pictures", type=int, default=1024, help="Pictures that are compared.")
    parser.add_argument("--only", choices=("gan", "diffusion"), help="One of the two contests.")
    parser.add_argument("--quick", action="store_true", help="Seconds and few pictures: only shows that all runs.")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.pictures = 6.0, 32
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    networks = {PIXELS: load_features(PIXELS)}
    if args.features:
        networks[metric_name(args.features)] = load_features(args.features)
    # the examples know no classes
    contests: dict[str, tuple[str, Opponent, dict[str, Any], dict[str, Any]]] = {
        "gan": ("gan/dcgan", after_dcgan, {"num_classes": 0}, {}),
        "diffusion": ("diffusion/ddpm", after_diffusers, {"num_classes": 0, "guidance_scale": 1.0}, EXAMPLE),
    }
    for kind, (name, opponent, model, other) in contests.items():
        if args.only in (None, kind):
            recipe = Recipe(name, args.root, model, other, args.quick)
            held_out = recipe.data.parts["val"]
            real = held_out.__getitems__(list(range(min(args.pictures, len(held_out)))))["images"]
            contest(name, recipe, opponent, Judge(real, networks), args.seconds)


if __name__ == "__main__":
    main()
