"""Where pictures lie among the codes of an autoencoder, and what lies between them."""

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.callbacks.report import report_picture
from lightning_bigmodels.callbacks.validation_view import ValidationView
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError, require
from lightning_bigmodels.pictures import as_rgb
from lightning_bigmodels.strategies.collectives import gather

# more classes than this have no legend
_MOST_NAMES = 20


class _Codes(Protocol):
    def encode_pictures(self, images: Tensor) -> Tensor: ...
    def decode_latents(self, latents: Tensor) -> Tensor: ...


class Latents(ValidationView):
    """Draw after each validation a map of the codes of its first pictures, and walks from one code to another.

    The map shows codes of two values as they are, and of more values their two principal components, in the colours of
    the pictures' classes. A walk goes in a straight line; its ends are reconstructions. Maps go to the loggers and to
    `latent_map/` in the run's folder, walks to `latent_walk/`.

    Args:
        num_points: Pictures in the map; 0: no map.
        num_walks: Walks, each a row of pictures; 0: none.
        num_steps: Pictures of a walk.
        every_n_validations: How often.
    """

    def __init__(
        self, num_points: int = 1000, num_walks: int = 6, num_steps: int = 10, every_n_validations: int = 1
    ) -> None:
        super().__init__(every_n_validations)
        bounds = [("num_points", num_points, 0), ("num_walks", num_walks, 0), ("num_steps", num_steps, 2)]
        for name, value, least in bounds:
            if value < least:
                raise InputError(f"{name} is {value}; set it to {least} or more")
        self.num_points = num_points
        self.num_walks = num_walks
        self.num_steps = num_steps
        self._seen: list[tuple[int, Tensor, int]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "encode_pictures"):
            raise InputError(f"{type(pl_module).__name__} makes no codes that Latents could show; remove it")

    @override
    def look(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        indices = batch["indices"]
        # the same on all processes, since a sharded network answers only to all of them
        before = batch_idx * len(indices) * trainer.world_size
        if trainer.sanity_checking or before >= max(self.num_points, 2 * self.num_walks):
            return
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            codes = cast(_Codes, module).encode_pictures(batch["images"]).float().cpu()
        labels = batch["labels"].cpu()
        if labels.ndim > 1:  # several classes of a picture have no one colour
            labels = torch.full(labels.shape[:1], -1)
        for index, code, label in zip(indices.tolist(), codes, labels.tolist(), strict=True):
            if index != FILLER:
                self._seen.append((index, code, label))

    @override
    def show(self, trainer: Trainer, module: LightningModule) -> None:
        seen = sorted((one for own in gather(self._seen) for one in own), key=lambda one: one[0])
        self._seen = []
        if len(seen) < 2:
            return
        codes = torch.stack([code for _, code, _ in seen])
        if self.num_points:
            labels = torch.tensor([label for _, _, label in seen[: self.num_points]])
            names = getattr(getattr(trainer, "datamodule", None), "class_names", None) or []
            points, shares = principal_components(codes[: self.num_points].flatten(1))
            report_picture(trainer, "latent_map", draw_map(points, labels, names, shares))
        if self.num_walks:
            pairs = codes[: len(codes) // 2 * 2][: 2 * self.num_walks].unflatten(0, (-1, 2))
            walks = straight_walks(pairs[:, 0], pairs[:, 1], self.num_steps).to(module.device)
            with trainer.precision_plugin.forward_context(), torch.no_grad():
                pictures = cast(_Codes, module).decode_latents(walks.flatten(0, 1)).cpu()
            report_picture(trainer, "latent_walk", in_rows(pictures, self.num_steps))


def principal_components(codes: Tensor) -> tuple[Tensor, list[float]]:
    """Return two coordinates (N, 2) of codes (N, D), and the share of the variance that each has.

    Of two values they are the values themselves, of one the second coordinate is 0. A component's sign is that which
    makes its greatest weight positive, so that maps of successive epochs do not flip by chance.
    """
    centred = codes - codes.mean(0)
    variance = centred.square().sum().clamp(min=torch.finfo(codes.dtype).tiny)
    if codes.shape[1] <= 2:
        points = torch.nn.functional.pad(codes, (0, 2 - codes.shape[1]))
    else:
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        axes = torch.nn.functional.pad(axes[:2], (0, 0, 0, max(0, 2 - len(axes))))
        greatest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        points = centred @ (axes * torch.where(greatest < 0, -1.0, 1.0)).T
    spread = (points - points.mean(0)).square().sum(0)
    return points, (spread / variance).tolist()


def straight_walks(starts: Tensor, ends: Tensor, num_steps: int) -> Tensor:
    """Return (n, num_steps, ...) codes from `starts` to `ends`, (n, ...) each."""
    shares = torch.linspace(0, 1, num_steps).view(1, -1, *([1] * (starts.ndim - 1)))
    return torch.lerp(starts[:, None], ends[:, None], shares)


def in_rows(pictures: Tensor, columns: int) -> Tensor:
    """Return one picture (3, H, W) uint8 of several (n, C, h, w) uint8, enlarged where they are tiny."""
    make_grid = require("torchvision.utils", extra="vision").make_grid
    factor = max(1, -(-48 // pictures.shape[-1]))
    large = torch.stack([as_rgb(picture) for picture in pictures])
    large = large.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return cast(Tensor, make_grid(large, nrow=columns, padding=2, pad_value=255))


def draw_map(points: Tensor, labels: Tensor, names: list[str], shares: list[float]) -> Tensor:
    """Return (3, H, W) uint8: points (N, 2) in the colours of their labels (N,), negative ones in gray."""
    figure_module = require("matplotlib.figure", extra="vision")
    canvas_module = require("matplotlib.backends.backend_agg", extra="vision")
    colours = require("matplotlib", extra="vision").colormaps["tab20" if len(names) > 10 else "tab10"]
    figure = figure_module.Figure(figsize=(8, 6), layout="constrained")
    # its own canvas: no window system is asked
    canvas = canvas_module.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label in sorted(set(labels.tolist())):
        own = points[labels == label].numpy()
        known = 0 <= label < len(names)
        colour = colours(label % colours.N) if label >= 0 else "gray"
        axes.scatter(own[:, 0], own[:, 1], s=8, color=colour, label=names[label] if known else None)
    axes.set_xlabel(f"first component, {shares[0]:.0%} of the variance")
    axes.set_ylabel(f"second component, {shares[1]:.0%} of the variance")
    if 1 < len(names) <= _MOST_NAMES:
        figure.legend(loc="outside right center", markerscale=2)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].permute(2, 0, 1).contiguous()
