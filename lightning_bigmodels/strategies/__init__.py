"""Strategies by name, beside Lightning's own: FSDP2, tensor parallelism, DDP with compressed gradients."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_bigmodels.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_bigmodels.strategies.fsdp2 import FSDP2Strategy

__all__ = ["CompressedDDPStrategy", "FSDP2Strategy"]

StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes")
StrategyRegistry.register(
    "fsdp2_async", FSDP2Strategy, description="FSDP2 that trains on while it saves", async_checkpoints=True
)
StrategyRegistry.register(
    "fsdp2_offload", FSDP2Strategy, description="FSDP2 with weights and optimizer in host memory", offload=True
)
StrategyRegistry.register("tp", FSDP2Strategy, description="Layers split over a node", tensor_parallel_size="auto")
for _size in (2, 4, 8):
    StrategyRegistry.register(
        f"fsdp2_tp{_size}",
        FSDP2Strategy,
        description=f"FSDP2 over groups of {_size} processes that split each layer",
        tensor_parallel_size=_size,
    )
for _name in ("fp16", "bf16"):
    StrategyRegistry.register(
        f"ddp_{_name}_gradients",
        CompressedDDPStrategy,
        description=f"DDP with gradients sent in {_name}",
        compression=_name,
    )
StrategyRegistry.register(
    "ddp_powersgd", CompressedDDPStrategy, description="DDP with gradients sent at low rank", compression="powersgd"
)
