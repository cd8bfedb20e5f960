"""How near an enlarged picture comes to the true one, by the protocol of the field's tables.

Both pictures are 8-bit. A border is shaved: as many pixels as the scale. Y is MATLAB's luma (BT.601, 16 to 235).
Each picture counts the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

_LUMA = (65.481, 128.553, 24.966)
# half of the 11-pixel window: farther in, no pixel outside of the picture has a part
_HALF_WINDOW = 5
# of equal pictures it would be infinite, and with it the mean
_MOST_DECIBELS = 100.0


def luma(picture: Tensor) -> Tensor:
    """Return Y (1, H, W) float64, from 16 to 235, of a picture (3, H, W) uint8: MATLAB's `rgb2ycbcr`, not rounded."""
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=picture.device).view(3, 1, 1)
    return 16 + (picture.double() / 255 * weights).sum(0, keepdim=True)


def psnr(found: Tensor, expected: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in decibels of two pictures (C, H, W) from 0 to 255, at most 100."""
    value = peak_signal_noise_ratio(found.double(), expected.double(), data_range=255.0)
    return value.clamp(max=_MOST_DECIBELS)


def ssim(found: Tensor, expected: Tensor) -> Tensor:
    """Return the structural similarity of two pictures (C, H, W) from 0 to 255, the mean over channels.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity": a Gaussian
    window of 11 x 11 pixels, only where it lies in the picture.
    """
    # autocast would convolve in bfloat16
    with torch.autocast(found.device.type, enabled=False):
        _, whole = structural_similarity_index_measure(
            found.float()[None], expected.float()[None], data_range=255.0, return_full_image=True
        )
    inside = slice(_HALF_WINDOW, -_HALF_WINDOW)
    return whole[..., inside, inside].double().mean()


def bicubic(picture: Tensor, scale: int) -> Tensor:
    """Return a picture (3, H, W) uint8 enlarged by bicubic, with MATLAB's and Pillow's kernel, as (3, s H, s W) uint8.

    torch without antialiasing has a sharper kernel (-0.75 in place of -0.5), which does worse on photos.
    """
    large = F.interpolate(picture.float()[None], scale_factor=float(scale), mode="bicubic", antialias=True)[0]
    return large.round().clamp(0, 255).to(torch.uint8)


def shave(picture: Tensor, border: int) -> Tensor:
    """Return a picture (C, H, W) without its border."""
    return picture[:, border:-border, border:-border]


class PictureMean(Metric):
    """A mean over pictures, exact over processes: each picture counts once."""

    full_state_update = False
    total: Tensor
    number: Tensor

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        for name in ("total", "number"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: dict[str, Tensor]) -> None:
        """Add one picture's value."""
        self.total += values[self.key].detach().to(self.total.dtype)
        self.number += 1

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.number


def quality_metrics(phase: str, scale: int) -> MetricCollection:
    """Return the means of what `measure` returns, under names that say the protocol."""
    names = {
        "loss": "loss",
        **{f"{kind}_{of}_shave{scale}": f"{kind}_{of}" for kind in ("psnr", "ssim") for of in ("y", "rgb")},
        **{f"{kind}_y_shave{scale}_bicubic": f"{kind}_y_bicubic" for kind in ("psnr", "ssim")},
    }
    metrics: dict[str, Metric | MetricCollection] = {name: PictureMean(key) for name, key in names.items()}
    return MetricCollection(metrics, prefix=f"{phase}_", compute_groups=False)


def measure(small: Tensor, found: Tensor, expected: Tensor, scale: int) -> dict[str, Tensor]:
    """Return all measures of one picture, and those of bicubic enlargement beside.

    Args:
        small: (3, H, W) uint8, what was enlarged.
        found: (3, s H, s W) uint8.
        expected: (3, s H, s W) uint8.
        scale: s, and the border in pixels.
    """
    found_rgb, expected_rgb = shave(found, scale), shave(expected, scale)
    found_y, expected_y = luma(found_rgb), luma(expected_rgb)
    baseline_y = luma(shave(bicubic(small, scale), scale))
    return {
        "loss": (found.double() - expected.double()).abs().mean() / 255,
        "psnr_y": psnr(found_y, expected_y),
        "psnr_rgb": psnr(found_rgb, expected_rgb),
        "psnr_y_bicubic": psnr(baseline_y, expected_y),
        "ssim_y": ssim(found_y, expected_y),
        "ssim_rgb": ssim(found_rgb, expected_rgb),
        "ssim_y_bicubic": ssim(baseline_y, expected_y),
    }
