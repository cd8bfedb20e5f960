"""Batch normalization over the batches of all processes on CPUs, for `trainer.sync_batchnorm`, and of too few rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce, get_world_size, is_initialized
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_bigmodels.errors import InputError


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        all_reduce(total, group=ctx.group)
        return total, None


class SynchronizedBatchNorm(_BatchNorm):
    """What torch's SyncBatchNorm, which refuses the tensors of a CPU (torch 2.14), does on GPUs.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1, over the union of all processes' batches.

    Args:
        num_features: Channels C.
        kind: The layer whose place it takes.
        process_group: The processes; None: all.
        kwargs: The arguments of torch's batch norm.
    """

    def __init__(
        self, num_features: int, kind: type[_BatchNorm], process_group: ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_features, **kwargs)
        self.kind = kind
        self.process_group = process_group

    @override
    def _check_input_dim(self, input: Tensor) -> None:
        self.kind._check_input_dim(self, input)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, ...), normalized for each channel."""
        if not self.training or not is_initialized() or get_world_size(self.process_group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.float()
        count = _Sum.apply(torch.tensor(float(x.numel() // x.shape[1])), self.process_group)
        mean = _Sum.apply(x.sum(axes), self.process_group) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes), self.process_group) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        output = centred * scale.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class SynchronizedLayers(LayerSync):
    """What `trainer.sync_batchnorm` does to a network.

    Args:
        group: The processes whose batches count as one; None: all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        return _replace(model, _BatchNorm, self._synchronized)

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        return _replace(model, SynchronizedBatchNorm, _plain)

    def _synchronized(self, norm: Any) -> nn.Module:
        if isinstance(norm, SynchronizedBatchNorm):
            return norm
        new = SynchronizedBatchNorm(norm.num_features, type(norm), self.group, **_settings(norm))
        return _with_tensors_of(norm, new)


def synchronize(network: nn.Module, strategy: Strategy, mesh: DeviceMesh | None = None) -> nn.Module:
    """Return the network with batch norm over all processes where the Trainer's `sync_batchnorm` asks for it.

    A DDP strategy applies Lightning's plugin itself, later; on a CPU it is given ours. FSDP2, which knows none, is
    about to shard the network.

    Args:
        network: What is about to be trained.
        strategy: The Trainer's.
        mesh: The processes that see different data, under FSDP2.
    """
    layers = getattr(strategy, "_layer_sync", None)
    if type(layers) is TorchSyncBatchNorm and strategy.root_device.type == "cpu":
        layers = SynchronizedLayers(None if mesh is None else mesh.get_group())
        strategy._layer_sync = layers  # type: ignore[attr-defined]
    return network if mesh is None or layers is None else layers.apply(network)


@contextmanager
def one_value_explained() -> Iterator[None]:
    """Say what to do where torch refuses to train batch norm, on one value per channel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "batch norm cannot be trained on one value per channel, all that one row has behind pooling; set "
            "data.batch_size to 2 or more, or trainer.sync_batchnorm on several devices"
        ) from error


@contextmanager
def one_value_allowed() -> Iterator[list[torch.Size]]:
    """Let batch norm train on one value per channel, as if there were two of it; hand out the shapes where it did."""
    plain = F.batch_norm
    allowed: list[torch.Size] = []

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        others = (running_mean, running_var, weight, bias, training, momentum, eps)
        if not training or input.numel() > input.shape[1]:
            return plain(input, *others)
        allowed.append(input.shape)
        return plain(torch.cat([input, input]), *others)[:1]

    with mock.patch.object(F, "batch_norm", batch_norm):
        yield allowed


def _plain(norm: Any) -> nn.Module:
    return _with_tensors_of(norm, norm.kind(norm.num_features, **_settings(norm)))


def _settings(norm: _BatchNorm) -> dict[str, Any]:
    names = ("eps", "momentum", "affine", "track_running_stats")
    return {name: getattr(norm, name) for name in names} | {"device": "meta"}


def _with_tensors_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a layer another one's own parameters and buffers, which optimizers and hooks may hold, and its mode."""
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    return new.train(old.training)


def _replace(module: nn.Module, kind: type[nn.Module], new: Any) -> nn.Module:
    """Return a module in which each layer of a kind is what `new` returns for it."""
    if isinstance(module, kind):
        return new(module)
    for name, child in module.named_children():
        replaced = _replace(child, kind, new)
        if replaced is not child:
            setattr(module, name, replaced)
    return module
