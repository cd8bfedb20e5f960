"""Pictures whose class is decided by a patch in a known place, and a network that learns them in seconds."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_bigmodels.networks.pixels import PixelNetwork

SIDE, PATCH, HALF = 32, 16, 24
STRIPES = (255 * (torch.arange(PATCH) // 2 % 2)).to(torch.uint8).expand(PATCH, PATCH)


def make_patches(number, seed):
    """Return pictures (N, 3, 32, 32) uint8, labels (N,) and where the patch is (N, 32, 32).

    A patch of 16 x 16 pixels lies anywhere on gray noise; its stripes stand (class 0) or lie (class 1).
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (number,), generator=generator)
    pictures = _noise(number, SIDE, generator)
    masks = torch.zeros(number, SIDE, SIDE, dtype=torch.bool)
    for picture, mask, label in zip(pictures, masks, labels.tolist(), strict=True):
        _paste(picture, mask, STRIPES.T if label else STRIPES, 0, SIDE, generator)
    return pictures, labels, masks


def make_pairs(number, seed):
    """Return pictures (N, 3, 32, 48), labels, where the patch that decides is, and where one is that says nothing.

    One patch lies in each half; the other one is of black and white pixels at random, as bright and as dark.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (number,), generator=generator)
    pictures = _noise(number, 2 * HALF, generator)
    decides, silent = torch.zeros(2, number, SIDE, 2 * HALF, dtype=torch.bool)
    for row, label in enumerate(labels.tolist()):
        half = int(torch.randint(2, (1,), generator=generator))
        dots = 255 * torch.randint(2, (PATCH, PATCH), generator=generator, dtype=torch.uint8)
        _paste(pictures[row], decides[row], STRIPES.T if label else STRIPES, half * HALF, HALF, generator)
        _paste(pictures[row], silent[row], dots, (1 - half) * HALF, HALF, generator)
    return pictures, labels, decides, silent


def _noise(number, width, generator):
    return torch.randint(112, 144, (number, 3, SIDE, width), generator=generator, dtype=torch.uint8)


def _paste(picture, mask, patch, left, width, generator):
    y = int(torch.randint(SIDE - PATCH + 1, (1,), generator=generator))
    x = left + int(torch.randint(width - PATCH + 1, (1,), generator=generator))
    picture[:, y : y + PATCH, x : x + PATCH] = patch
    mask[y : y + PATCH, x : x + PATCH] = True


class TinyCNN(nn.Module):
    """Two convolutions, their mean, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def pixel_network(body, channels=3):
    """Return a network of pictures with a mean of one half."""
    return PixelNetwork(body, (0.5,) * channels, (0.25,) * channels).eval()


def learn_patches(steps=60):
    """Return a network that tells the two classes apart, with and without a patch that says nothing."""
    torch.manual_seed(0)
    network = pixel_network(TinyCNN())
    kinds = [make_patches(128, seed=0)[:2], make_pairs(128, seed=0)[:2]]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(steps):
        for pictures, labels in kinds:
            rows = torch.randint(len(labels), (32,))
            loss = F.cross_entropy(network(pictures[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return network
