"""What compiled networks keep for the backward pass, without compiling them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from lightning_bigmodels.planner.flops import ATTENTION
from lightning_bigmodels.planner.shortcuts import Uncompiled
from lightning_bigmodels.planner.tensors import storages, tensors_in
from lightning_bigmodels.tasks import Task


def fuse(task: Task) -> None:
    """Let the blocks of a network that is not built yet keep what they keep when they are compiled.

    Nothing is compiled for it. Blocks that are computed anew as a whole keep nothing either way.
    """
    build = task.build_network

    def build_fused() -> nn.Module:
        task.network = network = build()  # which is asked for its blocks
        for block in task.blocks() or [network]:
            block.forward = partial(_run_fused, block.forward)
        return network

    if task.compile_network and not getattr(task, "activation_checkpointing", False):
        task.build_network = build_fused  # type: ignore[method-assign]


def _run_fused(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    fusion = _Fusion()
    with saved_tensors_hooks(fusion.pack, fusion.unpack), fusion:
        return forward(*args, **kwargs)


class _Saved:
    """A tensor that autograd wants to keep, or what it is computed anew from.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.sources: list[Tensor] = []

    def recompute_from(self, sources: list[Tensor]) -> None:
        """Let go of the tensor, and hold on to others."""
        self.tensor, self.sources = None, sources


class _Fusion(Uncompiled):
    """Keeps what products, convolutions and attention read and write; all between them is computed anew.

    That is what the min-cut partitioner of torch's AOTAutograd keeps of a block of Llama, tensor for tensor: fused
    code computes element-wise operations in the backward pass from the last tensors that were written to memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, list[Tensor]] = {}
        self._pending: list[_Saved] = []

    def pack(self, tensor: Tensor) -> Any:
        """Note that autograd saves a tensor; the operation that comes next says what of it is kept."""
        saved = _Saved(tensor)
        self._pending.append(saved)
        return saved

    def unpack(self, saved: _Saved) -> Tensor:
        """Return the tensor, or one like it that takes its place."""
        if saved.tensor is not None:
            return saved.tensor
        return torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)

    @override
    def __exit__(self, *error: Any) -> None:
        self._settle(set())
        self._sources.clear()
        super().__exit__(*error)

    @override
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operations on the shards come back here
        kwargs = kwargs or {}
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        read = {storage._cdata for tensor in inputs for storage in storages(tensor)}
        packet = operator._overloadpacket
        product = packet in flop_registry or packet in ATTENTION
        self._settle(read if product else set())
        result = operator(*args, **kwargs)
        sources = {id(source): source for tensor in inputs for source in self._sources_of(tensor)}
        for tensor in tensors_in(result):
            for storage in storages(tensor):
                if storage._cdata not in read:  # no view of an input, and not the input itself
                    self._sources[storage._cdata] = [tensor] if product else list(sources.values())
        return result

    def _settle(self, read: set[int]) -> None:
        """Keep of the saved tensors those that a product reads, or that are not computed here."""
        for saved in self._pending:
            assert saved.tensor is not None
            places = {storage._cdata for storage in storages(saved.tensor)}
            sources = self._sources_of(saved.tensor)
            own = {storage._cdata for source in sources for storage in storages(source)}
            if not (places & read or places & own):
                saved.recompute_from(sources)
        self._pending.clear()

    def _sources_of(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors in memory that one is computed from: itself, if it was there before."""
        found = [self._sources.get(storage._cdata) for storage in storages(tensor)]
        return [source for sources in found for source in ([tensor] if sources is None else sources)]
