"""Detectors by name: torchvision's registry and the small ones of our own, with weights of a hub or a file."""

import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops.misc import FrozenBatchNorm2d

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.cnn.registry import check_network, load_weights, network_names, read_weights
from lightning_bigmodels.networks.detection import (
    SharedFCOSHead,
    fasterrcnn_small,
    fcos_small,
    maskrcnn_small,
    retinanet_small,
)

OWN: dict[str, Callable[..., nn.Module]] = {
    "fcos_small": fcos_small,
    "retinanet_small": retinanet_small,
    "fasterrcnn_small": fasterrcnn_small,
    "maskrcnn_small": maskrcnn_small,
}
_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "fasterrcnn": (detection.FasterRCNN, ("classifier", "box_reg", "objectness", "rpn_box_reg")),
    "maskrcnn": (detection.MaskRCNN, ("classifier", "box_reg", "objectness", "rpn_box_reg", "mask")),
    "retinanet": (detection.RetinaNet, ("classification", "bbox_regression")),
    "fcos": (detection.FCOS, ("classification", "bbox_regression", "bbox_ctrness")),
    "ssd300": (detection.ssd.SSD, ("classification", "bbox_regression")),
    "ssdlite320": (detection.ssd.SSD, ("classification", "bbox_regression")),
}
_FILES = (".pth", ".pt", ".ckpt", ".safetensors")
_FPN = "_fpn"


def detector_names() -> list[str]:
    """Return the names of all detectors of boxes or masks."""
    return [*OWN, *(name for name in network_names("detection") if not name.startswith("keypoint"))]


def check_detector(name: str) -> None:
    """Refuse a name that is none of `detector_names`.

    Raises:
        InputError: with the near match.
    """
    check_network("detection", name, tuple(OWN))
    if name not in detector_names():
        raise InputError(
            f"{name} finds keypoints, which neither DetectionImages nor ObjectDetector know; name one of "
            f"{', '.join(detector_names())}"
        )


def kind_of(name: str) -> str:
    """Return the detector's family, such as fcos."""
    return name.split("_", 1)[0]


def loss_names(name: str) -> tuple[str, ...]:
    """Return what the network's losses are called, without torchvision's `loss_` before some."""
    return _KINDS[kind_of(name)][1]


def build_body(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Return a detector with random weights.

    Args:
        name: One of `detector_names`.
        num_classes: Classes, the background not counted.
        options: More arguments of the network's builder or class, such as min_size and max_size in pixels.

    Raises:
        InputError: the name is unknown, or an option is none of the network's.
    """
    check_detector(name)
    builder = OWN.get(name) or torchvision.models.get_model_builder(name)
    _check_options(name, builder, options)
    arguments: dict[str, Any] = {"num_classes": num_classes + 1, **options}
    if name not in OWN:
        arguments |= {"weights": None, "weights_backbone": None}
        if kind_of(name) == "fcos":
            arguments.setdefault("head", SharedFCOSHead(256, 1, num_classes + 1))
    try:
        return builder(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be built: {error}; correct model.network_args") from error


def _check_options(name: str, builder: Callable[..., nn.Module], options: Mapping[str, Any]) -> None:
    signatures = [inspect.signature(builder), inspect.signature(_KINDS[kind_of(name)][0].__init__)]
    if kind_of(name) == "maskrcnn":
        signatures.append(inspect.signature(detection.FasterRCNN.__init__))
    known = {key for signature in signatures for key in signature.parameters}
    known -= {"self", "kwargs", "backbone", "num_classes", "weights", "weights_backbone", "progress"}
    known -= {"trainable_backbone_layers"}
    for key in options:
        if key not in known:
            raise InputError(f"{name} has no argument {key!r} in network_args{near(key, known)}")


# ---- weights


def load_detector(body: nn.Module, name: str, weights: str) -> list[str]:
    """Copy a whole detector's weights; return the parameters that keep random ones, those of other classes.

    Args:
        body: What `build_body` made.
        name: The network's name.
        weights: DEFAULT, the name of torchvision's weights, or a file.

    Raises:
        InputError: there are no such weights, or they are another network's.
    """
    state = _read(name, weights, lambda: torchvision.models.get_model_weights(name), own=name in OWN)
    missing = load_weights(body, state, weights)
    head = ("head.", "roi_heads.box_predictor.", "roi_heads.mask_predictor.")
    other = [parameter for parameter in missing if not parameter.startswith(head)]
    if other:
        raise InputError(
            f"{weights} has no weights of the right shape for {len(other)} parameters of {name}, the first {other[0]}; "
            f"name weights of {name}, or the network that they belong to"
        )
    return missing


def load_backbone(body: nn.Module, name: str, weights: str) -> None:
    """Copy a classifier's weights into a detector's backbone.

    torchvision's detectors take classifiers apart and leave the order of their layers, by which weights are matched.

    Args:
        body: What `build_body` made.
        name: The network's name.
        weights: DEFAULT, the name of torchvision's weights of the classifier, or a file.

    Raises:
        InputError: there are no such weights, or they are another network's.
    """
    if name in OWN:
        raise InputError(f"there are no classifiers like the backbone of {name}; set backbone_weights to null")
    if kind_of(name) == "ssdlite320":
        # torchvision halves the backbone's last stage unless it is pretrained
        raise InputError(f"no classifier has the backbone of {name}; set weights, of a whole detector, or null")
    classifier = next(c for c in ("resnet50", "mobilenet_v3_large", "vgg16") if c in name)
    state = _read(classifier, weights, lambda: torchvision.models.get_model_weights(classifier), own=False)
    with torch.device("meta"):
        whole = torchvision.models.get_model(classifier, weights=None)
    heads = ("fc.", "classifier.")
    wanted = [key for key in whole.state_dict() if not key.startswith(heads) and not key.endswith("tracked")]
    backbone = body.backbone
    assert isinstance(backbone, nn.Module)
    own = [(key, value) for key, value in backbone.state_dict().items() if not key.endswith("tracked")]
    if kind_of(name) == "ssd300":
        own = [(key, value) for key, value in own if key != "scale_weight"]
    fitting = {}
    for key, (mine, value) in zip(wanted, own, strict=False):
        if key not in state or state[key].shape != value.shape:
            raise InputError(
                f"{weights} has no tensor {key!r} of shape {tuple(value.shape)}; name weights of {classifier}, "
                f"the backbone of {name}"
            )
        fitting[mine] = state[key]
    backbone.load_state_dict(fitting, strict=False)


def _read(name: str, weights: str, known: Callable[[], Any], own: bool) -> dict[str, Tensor]:
    """Return the tensors of a file or of torchvision's hub."""
    if Path(weights).suffix in _FILES:
        return {_bare(key): value for key, value in read_weights(weights).items()}
    if own:
        raise InputError(f"there are no weights {weights!r} for {name}; name a file, or null for random weights")
    names = ["DEFAULT", *(entry.name for entry in known())]
    wanted = weights.rpartition(".")[2]
    if wanted not in names:
        raise InputError(
            f"{name} has no weights {weights!r}{near(wanted, names)}; or name a file that ends in {', '.join(_FILES)}"
        )
    entry = known()[wanted]
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise InputError(
            f"the weights {entry} cannot be fetched ({error}); fetch {entry.url} elsewhere and name the file"
        ) from error


def _bare(key: str) -> str:
    """Return a parameter's name without what trainers and this package put before it."""
    return key.removeprefix("module.").removeprefix("network.").removeprefix("body.")


# ---- fine-tuning


def has_stages(name: str) -> bool:
    """Return whether a detector's backbone can learn in part."""
    return _FPN in name and name not in OWN


def freezes_norms(name: str, pretrained: bool) -> bool:
    """Return whether torchvision holds the batch norms of a detector: the pretrained ones of its first versions."""
    return pretrained and name.endswith(_FPN) and name not in OWN


def freeze_norms(module: nn.Module) -> None:
    """Put constants, which neither learn nor follow the batches, in the place of all batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def freeze_backbone(body: nn.Module, name: str, trainable: int) -> None:
    """Let only the last stages of the backbone learn.

    Args:
        body: What `build_body` made.
        name: The network's name.
        trainable: Stages from the end that learn, of 5 of a ResNet and 6 of a MobileNet.

    Raises:
        InputError: the backbone has not so many stages, or no stages.
    """
    stages = _stages(body, name)
    if not 0 <= trainable <= len(stages):
        raise InputError(f"trainable_backbone_layers is {trainable}; {name} takes 0 to {len(stages)}")
    for stage in stages[: len(stages) - trainable]:
        for module in stage:
            module.requires_grad_(False)


def _stages(body: nn.Module, name: str) -> list[list[nn.Module]]:
    if not has_stages(name):
        raise InputError(f"{name} has no stages to freeze; set trainable_backbone_layers to null")
    children = dict(body.backbone.body.named_children())  # type: ignore[union-attr]
    if "layer1" in children:
        return [[children["conv1"], children["bn1"]], *([children[f"layer{number}"]] for number in (1, 2, 3, 4))]
    layers = list(children.values())
    strided = [number for number, layer in enumerate(layers) if getattr(layer, "_is_cn", False)]
    return [layers[start:stop] for start, stop in pairwise([0, *strided, len(layers) - 1, len(layers)])]
