"""Layers cut over processes by name: transformers' plans, turned into torch's parallel styles."""

from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_bigmodels.errors import InputError

# transformers' names for the layouts, which its releases spell in two ways
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "colwise_rep": partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise_split_input": partial(RowwiseParallel, input_layouts=Replicate()),
    "rowwise_rep": partial(RowwiseParallel, input_layouts=Replicate()),
    "embedding_rowwise": partial(RowwiseParallel, input_layouts=Replicate()),
    "embedding_colwise": partial(ColwiseParallel, output_layouts=Replicate()),
    # a norm over the last dimension of each head: a process has its own heads, whatever dimension they lie in, so its
    # part of the weight's gradient is summed over processes
    "replicated_with_grad_allreduce": partial(SequenceParallel, sequence_dim=0, use_local_output=True),
}


def parallel_styles(plan: dict[str, str], network: nn.Module) -> dict[str, ParallelStyle]:
    """Return torch's style of each layer of `network` that a transformers plan names.

    Args:
        plan: From layers' names, `*` for any one part between dots, to names of styles.
        network: Layers that it lacks, such as those that its configuration leaves out, are left out.

    Raises:
        InputError: A style has no counterpart in torch; the message names the layer.
    """
    styles = {}
    for pattern, style in plan.items():
        for name, module in network.named_modules():
            if not _matches(name, pattern):
                continue
            splits = "wise" in style
            if style not in _STYLES or (splits and not isinstance(module, (nn.Linear, nn.Embedding))):
                raise InputError(
                    f"tensor parallelism of {type(network).__name__} needs the style {style!r} for {name} "
                    f"({type(module).__name__}), which is not supported; use the strategy fsdp2"
                )
            styles[name] = _STYLES[style]()
    return styles


def parallelize(network: nn.Module, mesh: DeviceMesh, styles: dict[str, ParallelStyle]) -> None:
    """Cut the layers named in `styles` over the processes of `mesh`; all others are made equal on each of them.

    Layers that share a parameter share it afterwards too, so both must be cut alike.

    Raises:
        InputError: There is nothing to cut, or a layer's width does not divide.
    """
    if not styles:
        raise InputError(f"{type(network).__name__} has no tensor-parallel plan; use the strategy fsdp2")
    for name, style in styles.items():
        _check_width(name, network.get_submodule(name), style, mesh.size())
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append((module, name))
    parallelize_module(network, mesh, styles)
    for (first, name), *others in owners.values():
        for module, other_name in others:
            module.register_parameter(other_name, getattr(first, name))
    for tensor in (*network.parameters(), *network.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            # without a seed each process drew its own numbers
            on_mesh = tensor.data.to(mesh.device_type)
            torch.distributed.broadcast(on_mesh, group=mesh.get_group(), group_src=0)
            tensor.data.copy_(on_mesh)


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _check_width(name: str, module: nn.Module, style: ParallelStyle, size: int) -> None:
    """Refuse a layer whose pieces would differ in width: what lies between two layers has no global shape."""
    if not isinstance(module, nn.Linear):
        return
    width = None
    if isinstance(style, ColwiseParallel) and not style.output_layouts[0].is_replicate():
        width = module.out_features
    elif isinstance(style, RowwiseParallel) and not style.input_layouts[0].is_replicate():
        width = module.in_features
    if width is not None and width % size:
        raise InputError(
            f"the width {width} of {name} does not divide over {size} tensor-parallel processes; choose a size that "
            f"divides it, or the strategy fsdp2"
        )
