"""FSDP2, tensor parallelism and both at once, as strategies with a name."""

import atexit
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.strategies.precision import WorldGradScaler
from lightning_bigmodels.strategies.sharded_checkpoint import ShardedCheckpoints
from lightning_bigmodels.strategies.tensor_parallel import parallelize

_PRECISIONS = (MixedPrecision, HalfPrecision, DoublePrecision)
_HOST = torch.device("cpu")


class FSDP2Strategy(ShardedCheckpoints):
    """FSDP2 over all processes, on GPUs or CPUs, or over groups of them that split each layer (tensor parallelism).

    Which layers are gathered as a whole and which are split comes from the `Task`.

    Args:
        data_parallel_size: Groups of processes that see different data; auto: as many as `tensor_parallel_size` leaves.
        tensor_parallel_size: Processes that split each layer and see the same data; auto: those of a node.
        offload: Whether each process keeps its part of weights, gradients and optimizer state in host memory. A block's
            weights come to the device for its forward and its backward pass, and the optimizer steps on the CPU.
        kwargs: The arguments of `ShardedCheckpoints` and of Lightning's ModelParallelStrategy.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        offload: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size, **kwargs)
        self.offload = offload

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
            scaler = WorldGradScaler.like(plugin.scaler, plugin.device)
            if self.offload:
                # where the gradients are: a copy from the GPU would be read before it has arrived (torch 2.14)
                scaler._lazy_init_scale_growth_tracker(_HOST)
            plugin.scaler = scaler
        self._precision_plugin = plugin

    @override
    def setup_environment(self) -> None:
        data, tensor = mesh_sizes(
            self._data_parallel_size, self._tensor_parallel_size, self.num_processes, self.num_nodes
        )
        self._tensor_parallel_size, self._data_parallel_size = tensor, data
        # advice on collectives, from each process, that nobody who names a strategy can follow
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        super().setup_environment()
        if self.offload and self.root_device.type == "cuda":
            # which Lightning does for a backend of this one name alone (2.6)
            atexit.register(_destroy_dist_connection)
        if tensor > 1:
            self._seed_alike()

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # norms of gradients are summed where these are
        return "cpu:gloo,cuda:nccl" if self.offload and backend == "nccl" else backend

    @override
    def setup(self, trainer: Trainer) -> None:
        if not self.offload:
            super().setup(trainer)
            return
        # what Lightning would make, and move, on the device
        _materialize_distributed_module(self._module(), _HOST)
        super().setup(trainer)
        _optimizers_to_device(self.optimizers, _HOST)

    @override
    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()
            return
        self._move_what_is_whole(self.root_device)
        _update_properties(self._module(), device=self.root_device)

    def _move_what_is_whole(self, device: torch.device) -> None:
        """Move buffers, metrics, and what else is not sharded."""

        def move(tensor: Tensor) -> Tensor:
            return tensor if isinstance(tensor, DTensor) else tensor.to(device)

        self._module()._apply(move)

    @contextmanager
    def _on_one_device(self) -> Iterator[None]:
        """Have buffers where the weights are, without which torch takes no weights that are not sharded (2.14)."""
        if self.offload:
            self._move_what_is_whole(_HOST)
        try:
            yield
        finally:
            if self.offload:
                self._move_what_is_whole(self.root_device)

    @override
    def _load_file(self, path: Path, optimizers: list[Optimizer], weights_only: bool | None) -> dict[str, Any]:
        with self._on_one_device():
            return super()._load_file(path, optimizers, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        with self._on_one_device():
            super().load_model_state_dict(checkpoint, strict)

    def _seed_alike(self) -> None:
        """Let processes that split a layer draw the same random numbers, which they do by themselves when seeded."""
        seeds = gather(torch.initial_seed())
        first = int(self.device_mesh["tensor_parallel"].mesh.flatten()[0])
        if seeds[first] != torch.initial_seed():
            torch.manual_seed(seeds[first])


def mesh_sizes(
    data_parallel_size: Literal["auto"] | int,
    tensor_parallel_size: Literal["auto"] | int,
    devices: int,
    num_nodes: int,
) -> tuple[int, int]:
    """Return how many groups see different data, and how many processes split a layer.

    Args:
        data_parallel_size: As for `FSDP2Strategy`.
        tensor_parallel_size: As for `FSDP2Strategy`.
        devices: Processes of a node.
        num_nodes: Nodes.

    Raises:
        InputError: They do not make up the processes.
    """
    world = devices * num_nodes
    given = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
    for name, size in given.items():
        if size != "auto" and not isinstance(size, int):
            raise InputError(f"{name} is {size!r}; set it to auto, or to 1 or more of the {world} processes")
    tensor = devices if tensor_parallel_size == "auto" else tensor_parallel_size
    data = world // max(1, tensor) if data_parallel_size == "auto" else data_parallel_size
    if tensor < 1 or data * tensor != world:
        times = "" if data_parallel_size == "auto" else f" times data_parallel_size {data}"
        raise InputError(
            f"tensor_parallel_size {tensor}{times} does not make up the {world} processes (devices {devices} times "
            f"num_nodes {num_nodes}); change one of them"
        )
    return data, tensor


def keeps_on_host(strategy: Strategy) -> bool:
    """Whether weights, gradients and optimizer state are in host memory, whatever the device."""
    return isinstance(strategy, FSDP2Strategy) and strategy.offload


def shard(
    network: nn.Module,
    strategy: Strategy,
    blocks: Sequence[nn.Module],
    styles: dict[str, ParallelStyle],
    precision: str,
) -> None:
    """Split layers over a mesh's `tensor_parallel` processes, and shard everything over its `data_parallel` ones.

    Args:
        network: The network, changed in place.
        strategy: The Trainer's, which has the mesh.
        blocks: Modules gathered as a whole; what is outside of them is gathered for the whole step.
        styles: From layers' names to how they are split; used where there is more than one process to split over.
        precision: The Trainer's.

    Raises:
        InputError: The network cannot be split so.
    """
    assert isinstance(strategy, ModelParallelStrategy)
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        parallelize(network, mesh["tensor_parallel"], styles)
    data = mesh["data_parallel"]
    lower = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    # autocast alone would gather the blocks in float32, twice the bytes; what passes between blocks stays float32 as
    # under autocast, and so does what is outside of them
    policy = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=None if lower is None else torch.float32, cast_forward_inputs=lower is None
    )
    # memory that is not pinned, as a machine without a GPU has, is copied while computing waits
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if keeps_on_host(strategy) else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=data, mp_policy=policy, offload_policy=place)
    # also on a mesh of size one, or loading fails (Lightning 2.6)
    fully_shard(network, mesh=data, offload_policy=place)
    # of in-place operations on what a network returns, which no Task does; a linear layer returns a view (torch 2.14)
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
