"""A model that paints pictures out of noise with one layer, and pictures to compare them with."""

import math

import numpy as np
import torch
from torch import nn

from lightning_bigmodels import Images
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from tests.toy_pictures import pixels

SIZE = 12


class Painter(PictureGeneration):
    """Pictures of a linear layer's numbers, brighter by class.

    Args:
        num_classes: Classes; 0: none.
        noise: Factor on the noise; 0: all pictures are one.
        channels: Of a picture.
    """

    def __init__(self, num_classes: int = 0, noise: float = 1.0, channels: int = 3) -> None:
        super().__init__(image_size=SIZE, channels=channels, num_classes=num_classes)
        self.save_hyperparameters()
        self.factor = noise
        self.calls = 0

    def build_network(self):
        return nn.Linear(8, math.prod(self.image_shape))

    def step(self, phase, batch):
        loss = self.network(self.noise(phase, batch["indices"]).normal(8)).square().mean()
        self.log(f"{phase}_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch["indices"]))
        return loss

    def generate_pictures(self, noise, labels=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        bright = 0 if labels is None else 20 * labels.view(-1, 1, 1, 1)
        made = self.network(self.factor * noise.normal(8)).view(-1, *self.image_shape)
        return (made * 60 + 110 + bright).clamp(0, 255).to(torch.uint8)


def write_pictures(path, number=40, classes=2):
    """Write pictures with their classes, and return the file."""
    labels = np.arange(number) % classes
    pictures = np.stack([pixels(label, place, (SIZE, SIZE)) for place, label in enumerate(labels)])
    np.savez(path, images=pictures, labels=labels)
    return path


def pictures(path, **changes):
    """Return `Images` of the file, of which a quarter are for validation and another for testing."""
    values = {
        "source": str(path),
        "val_fraction": 1 / 4,
        "test_fraction": 1 / 4,
        "image_size": SIZE,
        "channels": 3,
        "crop_scale": None,
        "batch_size": 4,
        "eval_batch_size": 4,
    }
    return Images(**{**values, **changes})
