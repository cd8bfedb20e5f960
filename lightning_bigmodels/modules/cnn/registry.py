"""torchvision's networks by name, and weights from its hub or a file."""

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import safetensors.torch
import torch
import torchvision
from torch import nn

from lightning_bigmodels.errors import InputError, near

Kind = Literal["classification", "detection", "segmentation"]
_HOMES: dict[Kind, ModuleType] = {
    "classification": torchvision.models,
    "detection": torchvision.models.detection,
    "segmentation": torchvision.models.segmentation,
}


def network_names(kind: Kind) -> list[str]:
    """Return the names of torchvision's networks of a kind."""
    return list(torchvision.models.list_models(module=_HOMES[kind]))


def check_network(kind: Kind, name: str, own: tuple[str, ...] = ()) -> None:
    """Refuse a name that is neither torchvision's nor one of our `own`.

    Raises:
        InputError: with the near match.
    """
    known = [*own, *network_names(kind)]
    if name not in known:
        raise InputError(f"no {kind} network is named {name!r}{near(name, known)}")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.safetensors` file, or of one of `torch.save`: a state dict, bare or in a checkpoint.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights; correct the path")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch each have errors of their own
        raise InputError(f"{path} holds no weights that torch.load(weights_only=True) reads; name another") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{path} holds no state dict; name a file that does")
    return content


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor], where: str) -> list[str]:
    """Copy weights into a network, and return the names of those parameters that found none of their shape.

    Raises:
        InputError: none fits.
    """
    own = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise InputError(f"no tensor in {where} fits the network; name weights of the same architecture")
    network.load_state_dict(fitting, strict=False)
    return [name for name, _ in network.named_parameters() if name not in fitting]
