"""Gradient clipping over parameters that do not all lie on the same processes."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def on_several_meshes(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch's own clipping would refuse these gradients: some are split over more processes than others."""
    return len(_by_mesh(parameters)) > 1


def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`; return the norm before."""
    groups = _by_mesh(parameters)
    norms = []
    for members in groups.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for members in groups.values():
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total


def clip_value(parameters: Iterable[nn.Parameter], max_value: float) -> None:
    """Clamp each element of all gradients to at most `max_value` in size."""
    for members in _by_mesh(parameters).values():
        torch.nn.utils.clip_grad_value_(members, max_value)


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    groups = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter)
    return groups
