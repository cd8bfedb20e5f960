"""What made a classifier say so: how much each place of its input counts, by Grad-CAM, gradients or occlusion."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bigmodels.errors import InputError, near, require

METHODS = ("grad_cam", "integrated_gradients", "occlusion")
NUM_STEPS = 50
"""Places on the way from the baseline to the input at which integrated gradients are taken."""


def _same(values: Tensor) -> Tensor:
    return values


class Layer(NamedTuple):
    """A layer whose output still knows places, for Grad-CAM.

    Attributes:
        module: Its output is one tensor.
        to_map: From that to (B, C, *places).
        from_map: From the module's output and (B, C, *places) back to the module's output.
    """

    module: nn.Module
    to_map: Callable[[Tensor], Tensor] = _same
    from_map: Callable[[Tensor, Tensor], Tensor] = lambda output, maps: maps


class Explainable(NamedTuple):
    """A classifier with its inputs, as every method sees it: all that a family has to say.

    B examples, K classes; `places` is what a number is wanted for, such as height and width, tokens or columns.

    Attributes:
        network: Put into evaluation mode meanwhile, and back.
        forward: From `inputs` to logits (B, K).
        inputs: (B, ...) of floating point: pixels, embeddings of tokens, columns.
        baseline: What stands for an input that says nothing, of a shape that broadcasts to that of `inputs`.
        summed: The axis of `inputs` that is no place, such as channels; None: all are places.
        window: The part of an example that occlusion hides at a time: its length along each axis but the first.
        stride: By how much the window moves.
        layer: Finds the layer for Grad-CAM.
    """

    network: nn.Module
    forward: Callable[[Tensor], Tensor]
    inputs: Tensor
    baseline: Tensor
    summed: int | None
    window: tuple[int, ...]
    stride: tuple[int, ...]
    layer: Callable[[], Layer]


@runtime_checkable
class Explains(Protocol):
    """What a classifier of any family has, so that `explain` shows what made it say so.

    Attributes:
        class_names: Names of the K classes; None: they have numbers alone.
    """

    class_names: list[str] | None

    def explainable(
        self, batch: Any, layer: str | None = None, baseline: float | None = None, window: int | None = None
    ) -> Explainable:
        """Return the network with the inputs of a batch.

        Args:
            batch: Of the family's data.
            layer: Name of the layer for Grad-CAM; None: the family finds one.
            baseline: The value that stands for an input that says nothing; None: the family's.
            window: Length of what occlusion hides at a time; None: the family's.

        Raises:
            InputError: one of them does not fit the network or the batch.
        """

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (B, K) probabilities of logits (B, K)."""

    def draw_explanations(self, batch: Any, heat: Tensor, captions: Sequence[Sequence[str]]) -> list[Tensor]:
        """Return each input with how much each of its places counts: (3, H, W) uint8.

        Args:
            batch: B examples.
            heat: (B, *places), 0 or more.
            captions: For each example, lines of text.
        """


def check_method(method: str) -> None:
    """Refuse a method that is not there.

    Raises:
        InputError: with the near match.
    """
    if method not in METHODS:
        raise InputError(f"no method of explanation is named {method!r}{near(method, METHODS)}")


@contextmanager
def explaining(network: nn.Module) -> Iterator[None]:
    """Let gradients flow through a network in evaluation mode and in its own precision; put all back after.

    The gradients that its parameters hold are not touched, neither here nor by the methods.
    """
    modes = [(module, module.training) for module in network.modules()]
    device = next((parameter.device.type for parameter in network.parameters()), "cpu")
    try:
        network.eval()
        with (
            # a Trainer validates and predicts in inference mode, whose tensors have no gradient
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
            # hooks on layers pass a compiled network by
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def attribute(explainable: Explainable, method: str, classes: Tensor) -> Tensor:
    """Return how much each place of each input speaks for a class: (B, *places), 0 where it does not or speaks against.

    - `grad_cam`: the maps of a layer, each weighed by the mean gradient of the class's logit, summed, and enlarged to
      the input's size.
    - `integrated_gradients`: the gradient of the logit, averaged on the straight way from the baseline to the input,
      times their difference. With what speaks against the class, which is left out, it sums up to the difference of the
      logits.
    - `occlusion`: by how much the logit falls when a window on the place shows the baseline, averaged over the windows.

    Args:
        explainable: The classifier and B inputs.
        method: One of `METHODS`.
        classes: (B,) int64, the class of each input that is asked for.

    Raises:
        InputError: there is no such method, or no layer for Grad-CAM.

    Source: Selvaraju et al. 2017 (arXiv:1610.02391); Sundararajan et al. 2017 (arXiv:1703.01365); Zeiler and Fergus
    2013 (arXiv:1311.2901). All by captum.
    """
    check_method(method)
    with explaining(explainable.network):
        # tensors of inference mode become ordinary ones; without a gradient of its own a frozen network had none at all
        inputs = explainable.inputs.clone().requires_grad_()
        baseline = explainable.baseline.clone().expand_as(inputs)
        run = explainable._replace(inputs=inputs, baseline=baseline)
        found = {"grad_cam": _grad_cam, "integrated_gradients": _integrated_gradients, "occlusion": _occlusion}[method](
            run, classes.clone()
        )
    return found.detach().float().clamp(min=0)


def _grad_cam(run: Explainable, classes: Tensor) -> Tensor:
    captum = require("captum.attr", extra="explain")
    layer = run.layer()
    maps = nn.Identity()  # what captum watches in the layer's place, whose output may have its places on other axes

    def pass_maps(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # a copy, since an activation in place may follow
        return layer.from_map(output, maps(layer.to_map(output)).clone())

    handle = layer.module.register_forward_hook(pass_maps)
    try:
        found = captum.LayerGradCam(run.forward, maps).attribute(run.inputs, classes, relu_attributions=True)
    finally:
        handle.remove()
    shape = _places(run)
    mode = {1: "linear", 2: "bilinear"}[len(shape)]
    return F.interpolate(found.float(), size=shape, mode=mode, align_corners=False)[:, 0]


def _integrated_gradients(run: Explainable, classes: Tensor) -> Tensor:
    captum = require("captum.attr", extra="explain")
    method = captum.IntegratedGradients(run.forward)
    # one step of all examples at a time: the memory is that of one batch
    found = method.attribute(run.inputs, run.baseline, classes, n_steps=NUM_STEPS, internal_batch_size=len(run.inputs))
    return found if run.summed is None else found.sum(run.summed)


def _occlusion(run: Explainable, classes: Tensor) -> Tensor:
    captum = require("captum.attr", extra="explain")
    with torch.no_grad():
        found = captum.Occlusion(run.forward).attribute(
            run.inputs, run.window, strides=run.stride, baselines=run.baseline, target=classes
        )
    # all that a window hides has the whole of its effect
    return found if run.summed is None else found.mean(run.summed)


def _places(run: Explainable) -> tuple[int, ...]:
    shape = list(run.inputs.shape)
    if run.summed is not None:
        del shape[run.summed]
    return tuple(shape[1:])
