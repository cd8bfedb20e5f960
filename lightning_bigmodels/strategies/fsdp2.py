"""FSDP2, tensor parallelism and both at once, as strategies with a name."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ParallelStyle
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.strategies.precision import WorldGradScaler
from lightning_bigmodels.strategies.sharded_checkpoint import ShardedCheckpoints
from lightning_bigmodels.strategies.tensor_parallel import parallelize

_PRECISIONS = (MixedPrecision, HalfPrecision, DoublePrecision)


class FSDP2Strategy(ShardedCheckpoints):
    """FSDP2 over all processes, on GPUs or CPUs, or over groups of them that split each layer (tensor parallelism).

    Which layers are gathered as a whole and which are split comes from the `Task`.

    Args:
        data_parallel_size: Groups of processes that see different data; auto: as many as `tensor_parallel_size` leaves.
        tensor_parallel_size: Processes that split each layer and see the same data; auto: those of a node.
        kwargs: The arguments of `ShardedCheckpoints` and of Lightning's ModelParallelStrategy.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size, **kwargs)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning checks the precision of a strategy's instance, and not of one that is named
        if plugin is not None and type(plugin) is not Precision and not isinstance(plugin, _PRECISIONS):
            raise InputError(
                f"{type(self).__name__} does not run with {type(plugin).__name__}; set trainer.precision to 32-true, "
                f"64-true, 16-mixed, bf16-mixed, 16-true or bf16-true"
            )
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None and plugin.scaler.is_enabled():
            plugin.scaler = WorldGradScaler.like(plugin.scaler, plugin.device)
        self._precision_plugin = plugin

    @override
    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        tensor = self.num_processes if self._tensor_parallel_size == "auto" else self._tensor_parallel_size
        data = world // max(1, tensor) if self._data_parallel_size == "auto" else self._data_parallel_size
        if tensor < 1 or data * tensor != world:
            given = "" if self._data_parallel_size == "auto" else f" times data_parallel_size {data}"
            raise InputError(
                f"tensor_parallel_size {tensor}{given} does not make up the {world} processes (devices "
                f"{self.num_processes} times num_nodes {self.num_nodes}); change one of them"
            )
        self._tensor_parallel_size, self._data_parallel_size = tensor, data
        # advice on collectives, from each process, that nobody who names a strategy can follow
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        super().setup_environment()
        if tensor > 1:
            self._seed_alike()

    def _seed_alike(self) -> None:
        """Let processes that split a layer draw the same random numbers, which they do by themselves when seeded."""
        seeds = gather(torch.initial_seed())
        first = int(self.device_mesh["tensor_parallel"].mesh.flatten()[0])
        if seeds[first] != torch.initial_seed():
            torch.manual_seed(seeds[first])


def shard(
    network: nn.Module,
    mesh: DeviceMesh,
    blocks: Sequence[nn.Module],
    styles: dict[str, ParallelStyle],
    precision: str,
) -> None:
    """Split layers over the mesh's `tensor_parallel` processes, and shard everything over its `data_parallel` ones.

    Args:
        network: The network, changed in place.
        mesh: The strategy's mesh.
        blocks: Modules gathered as a whole; what is outside of them is gathered for the whole step.
        styles: From layers' names to how they are split; used where there is more than one process to split over.
        precision: The Trainer's.

    Raises:
        InputError: The network cannot be split so.
    """
    if mesh["tensor_parallel"].size() > 1:
        parallelize(network, mesh["tensor_parallel"], styles)
    data = mesh["data_parallel"]
    lower = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    # autocast alone would gather the blocks in float32, twice the bytes; what passes between blocks stays float32 as
    # under autocast, and so does what is outside of them
    policy = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=None if lower is None else torch.float32, cast_forward_inputs=lower is None
    )
    for block in blocks:
        fully_shard(block, mesh=data, mp_policy=policy)
    # also on a mesh of size one, or loading fails (Lightning 2.6)
    fully_shard(network, mesh=data)
    # of in-place operations on what a network returns, which no Task does; a linear layer returns a view (torch 2.14)
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
