"""Measures images/s of loading against torchvision's ImageFolder with Pillow: `python tests/benchmarks/images.py`.

Both read the same JPEG files with the same number of worker processes and give batches of random resized crops, half of
them mirrored. The other side is the pipeline of torchvision's own examples: Pillow decodes, and crop, flip, conversion
to float32 and normalization run on each picture. Ours gives uint8, which the network normalizes; the last column does
that too, with each batch as it arrives, on the same CPU. Contestants take turns within a round, and each round has a
ratio of its own.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photos
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_bigmodels.data.images import Images
from lightning_bigmodels.networks.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelNetwork

_SIZE = 224
_PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")


def write_pictures(folder: Path, number: int) -> int:
    """Write JPEG files of about 500 x 375, windows of photos with some grain, in ten classes; return their bytes."""
    generator = np.random.default_rng(0)
    sources = [getattr(photos, name)() for name in _PHOTOS]
    size = 0
    for index in range(number):
        source = sources[index % len(sources)]
        height = int(min(source.shape[0], source.shape[1] * 0.75) * generator.uniform(0.5, 1.0))
        width = int(height / 0.75)
        top, left = (generator.integers(0, source.shape[i] - n + 1) for i, n in enumerate((height, width)))
        window = Image.fromarray(source[top : top + height, left : left + width])
        shape = (500 + int(generator.integers(-20, 21)), 375 + int(generator.integers(-20, 21)))
        pixels = np.asarray(window.resize(shape, Image.Resampling.BICUBIC))
        grainy = (pixels + generator.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        path = folder / str(index % 10) / f"{index:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(grainy).save(path, quality=90)
        size += path.stat().st_size
    return size


def torchvision_loader(folder: Path, batch_size: int, num_workers: int) -> DataLoader:
    """Return torchvision's pipeline: one picture at a time, from Pillow to normalized float32."""
    steps = [
        transforms.RandomResizedCrop(_SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    return DataLoader(
        ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def our_loader(folder: Path, batch_size: int, num_workers: int) -> DataLoader:
    """Return the loader of `Images` with its defaults: random resized crops and flips."""
    data = Images(str(folder), val_fraction=0.0, image_size=_SIZE, batch_size=batch_size, num_workers=num_workers)
    data.setup("fit")
    return data.train_dataloader()


def images_per_second(loader: DataLoader, arrive: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the rate of an epoch, from asking for its first batch to having its last."""
    start, number = time.perf_counter(), 0
    for batch in loader:
        images = batch["images"] if isinstance(batch, dict) else batch[0]
        number += len(arrive(images))
    return number / (time.perf_counter() - start)


def main() -> None:
    """Print the rates of each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    normalize = PixelNetwork(torch.nn.Identity(), IMAGENET_MEAN, IMAGENET_STD).normalize
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_pictures(folder, args.number)
        print(f"{args.number} JPEG files of {size / args.number / 1e3:.0f} kB, {args.num_workers} workers")
        ours = our_loader(folder, args.batch_size, args.num_workers)
        contestants = {
            "torchvision": (torchvision_loader(folder, args.batch_size, args.num_workers), torch.Tensor.detach),
            "ours": (ours, torch.Tensor.detach),
            "ours, normalized": (ours, normalize),
        }
        for loader, arrive in contestants.values():
            images_per_second(loader, arrive)  # workers start, files come into the system's cache
        print(f"{'round':<8}" + "".join(f"{name:>20}" for name in contestants) + f"{'ratio':>9}{'normalized':>12}")
        ratios: list[tuple[float, float]] = []
        for number in range(args.rounds):
            rates = [images_per_second(*contestant) for contestant in contestants.values()]
            ratios.append((rates[1] / rates[0], rates[2] / rates[0]))
            row = "".join(f"{rate:>20,.0f}" for rate in rates)
            print(f"{number:<8}{row}{ratios[-1][0]:>9.2f}{ratios[-1][1]:>12.2f}")
        medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
        print(f"{'median':<68}{medians[0]:>9.2f}{medians[1]:>12.2f}")


if __name__ == "__main__":
    main()
