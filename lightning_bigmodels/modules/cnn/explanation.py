"""Where a network of images looks: its pixels, its layer for Grad-CAM, and the picture with the heat map over it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from lightning_bigmodels.attribution import Explainable, Layer, explaining
from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.networks.pixels import PixelNetwork

_WINDOWS = 7  # in a row of a picture, where they do not overlap
_SMALLEST = 160  # pixels of a side that a caption can be read under


def explainable_pictures(
    network: PixelNetwork,
    images: Tensor,
    layer: str | None = None,
    baseline: float | None = None,
    window: int | None = None,
) -> Explainable:
    """Return a network of images with some pictures.

    Args:
        network: Gives logits (B, K).
        images: (B, C, H, W) uint8, or in [0, 1].
        layer: Name in the network of the layer for Grad-CAM; None finds one, see `find_layer`.
        baseline: Gray level in [0, 1] that stands for nothing; None: the mean that the network normalizes with.
        window: Side of the square that occlusion hides at a time, in pixels; None: a seventh of the shorter side.
            It moves by half of it.

    Raises:
        InputError: the baseline is no gray level, or the window not in the picture.
    """
    pixels = images.float() if images.is_floating_point() else images.float() / 255
    channels, side = pixels.shape[1], min(pixels.shape[2:])
    if baseline is not None and not 0 <= baseline <= 1:
        raise InputError(f"baseline is {baseline}; set it to a gray level from 0, black, to 1, white")
    if window is not None and not 1 <= window <= side:
        raise InputError(f"window is {window}; set it to 1 or more pixels, and at most {side}, the picture's side")
    size = window or max(1, side // _WINDOWS)
    step = max(1, size // 2)
    return Explainable(
        network=network,
        forward=network,
        inputs=pixels,
        baseline=network.mean.float()[None] if baseline is None else torch.full_like(pixels[:1], baseline),
        summed=1,
        window=(channels, size, size),
        stride=(channels, step, step),
        layer=lambda: find_layer(network, pixels, layer),
    )


def find_layer(network: nn.Module, pixels: Tensor, name: str | None = None) -> Layer:
    """Return the layer for Grad-CAM.

    Without a name it is, for a convolutional network, the last layer that gives maps of the size of its last
    convolution's; for a ViT the norm before the last attention, behind which only the class token counts; for a Swin
    the norm before pooling.

    Args:
        network: Takes pixels.
        pixels: (B, C, H, W), of which the first is tried.
        name: As in `network.named_modules()`; the `body.` that all begin with may be left out.

    Raises:
        InputError: there is no such layer, it gives no maps, or the network has no convolution.
    """
    modules = dict(network.named_modules())
    if name is None:
        transformer = next((m for m in modules.values() if isinstance(m, (VisionTransformer, SwinTransformer))), None)
        chosen = _last_maps(network, pixels) if transformer is None else _last_norm(transformer)
    else:
        named = {key.removeprefix("body."): module for key, module in modules.items() if key not in ("", "body")}
        if name.removeprefix("body.") not in named:
            raise InputError(f"the network has no layer {name!r}{near(name, named)}")
        chosen = named[name.removeprefix("body.")]
    outputs = [output for module, output in _outputs(network, pixels) if module is chosen]
    place = name or "the layer"
    if len(outputs) != 1:
        raise InputError(f"{place} is run {len(outputs)} times in a forward pass; name a layer that is run once")
    return _layout(network, chosen, outputs[0], place)


def _outputs(network: nn.Module, pixels: Tensor) -> list[tuple[nn.Module, Any]]:
    """Return each module with its output, in the order of their ends, for the first picture."""
    seen: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda m, _, output: seen.append((m, output))) for module in network.modules()
    ]
    try:
        with explaining(network), torch.no_grad():
            network(pixels[:1].clone())
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _last_maps(network: nn.Module, pixels: Tensor) -> nn.Module:
    seen = [(m, o) for m, o in _outputs(network, pixels) if isinstance(o, Tensor) and o.ndim == 4]
    # those on single pixels weigh channels, as in squeeze-and-excitation
    sizes = [o.shape[2:] for m, o in seen if isinstance(m, nn.Conv2d) and o.shape[2] * o.shape[3] > 1]
    if not sizes:
        raise InputError(
            f"grad_cam needs the maps of a convolution, of a ViT or a Swin, and {type(body_of(network)).__name__} has "
            f"none; choose integrated_gradients or occlusion"
        )
    counts: dict[nn.Module, int] = {}
    for module, _ in seen:
        counts[module] = counts.get(module, 0) + 1
    return [m for m, o in seen if o.shape[2:] == sizes[-1] and counts[m] == 1][-1]


def _last_norm(transformer: VisionTransformer | SwinTransformer) -> nn.Module:
    return transformer.encoder.layers[-1].ln_1 if isinstance(transformer, VisionTransformer) else transformer.norm


def body_of(network: nn.Module) -> nn.Module:
    """Return the network behind the scaling of pixels."""
    return network.body if isinstance(network, PixelNetwork) else network


def _layout(network: nn.Module, module: nn.Module, output: Any, name: str) -> Layer:
    """Return how the layer's output becomes maps (B, C, h, w)."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    if len(shape) == 4 and shape[2] * shape[3] > 1:
        if isinstance(body_of(network), SwinTransformer) and not _channels_first(body_of(network), module):
            return Layer(module, lambda o: o.permute(0, 3, 1, 2), lambda _, maps: maps.permute(0, 2, 3, 1))
        return Layer(module)
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        extra = shape[1] - side * side  # the class token comes first
        if side > 1 and extra in (0, 1):

            def from_map(output: Tensor, maps: Tensor) -> Tensor:
                return torch.cat([output[:, :extra], maps.flatten(2).transpose(1, 2)], dim=1)

            return Layer(module, lambda o: o[:, extra:].transpose(1, 2).unflatten(2, (side, side)), from_map)
    found = f"a tensor of shape {(*('B',), *shape[1:])}" if shape else type(output).__name__
    raise InputError(f"{name} gives {found}, no maps of places; name a layer that does, such as a convolution")


def _channels_first(swin: SwinTransformer, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) or module is swin.permute


def draw_heat(images: Tensor, heat: Tensor, captions: Sequence[Sequence[str]]) -> list[Tensor]:
    """Return each picture beside itself in gray with its heat map over it, and lines of text below: (3, H, W) uint8.

    Args:
        images: (B, C, H, W) uint8, or in [0, 1]; other than 1 or 3 channels are averaged.
        heat: (B, H, W), 0 or more; the highest of a picture is yellow.
        captions: For each picture, lines of text.
    """
    pixels = (images.float() if images.is_floating_point() else images.float() / 255).cpu()
    pixels = pixels if pixels.shape[1] in (1, 3) else pixels.mean(1, keepdim=True)
    heat = heat.float().cpu() / heat.float().cpu().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    heat = heat[:, None]
    gray = pixels.mean(1, keepdim=True)
    # no heat, red, yellow: colours that a picture in gray has not
    hot = (2 * heat - torch.tensor([0.0, 1.0, 2.0]).view(-1, 1, 1)).clamp(0, 1)
    over = 0.7 * gray * (1 - heat) + hot * heat
    factor = max(1, math.ceil(_SMALLEST / min(pixels.shape[2:])))
    sides = [F.interpolate(side, scale_factor=factor, mode="nearest") for side in (pixels.expand_as(over), over)]
    gap = torch.ones(len(pixels), 3, factor * pixels.shape[2], 2)
    pair = torch.cat([sides[0], gap, sides[1]], dim=3)
    pictures = (pair * 255).round().to(torch.uint8)
    return [_with_text(picture, lines) for picture, lines in zip(pictures, captions, strict=True)]


def _with_text(picture: Tensor, lines: Sequence[str]) -> Tensor:
    font = ImageFont.load_default(14)
    above: Image.Image = to_pil_image(picture)
    page = Image.new("RGB", (above.width, above.height + 18 * len(lines) + 4), "white")
    page.paste(above)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        while line and draw.textlength(line, font=font) > page.width - 8:
            line = line.removesuffix("…")[:-1] + "…"
        draw.text((4, above.height + 2 + 18 * number), line, fill="black", font=font)
    return pil_to_tensor(page)
