"""The part of a network's weights that lies on this process, under every strategy."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

_FSDP1_WRAPPER = "_fsdp_wrapped_module."


def local_weights(strategy: Strategy, module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and floating-point buffers by name; writing into them changes the network.

    Of a sharded parameter it is this process's shard. Names are those of the network that is not sharded. A gathered
    copy that the last forward pass left is dropped, or the next one would go on with it.
    """
    whole = strategy.model if isinstance(strategy.model, nn.Module) else module
    for part in whole.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel):
            handle = part._handle
            if handle is not None and handle.uses_sharded_strategy:
                _reshard(part, handle, True)
    found: dict[str, Tensor] = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            here = tensor.detach()
            found[plain_name(name)] = here.to_local() if isinstance(here, DTensor) else here
    return found


def plain_name(name: str) -> str:
    """Return what a parameter is called where FSDP1 wraps nothing."""
    return name.replace(_FSDP1_WRAPPER, "")


def load_weights(strategy: Strategy, weights: Mapping[str, Any]) -> None:
    """Load some of the network's weights, as its strategy's `lightning_module_state_dict` or a plain file has them."""
    if isinstance(strategy, FSDPStrategy):
        # its own method does nothing (Lightning 2.6)
        assert strategy.model is not None
        _load_raw_module_state(dict(weights), module=strategy.model, world_size=strategy.world_size, strict=False)
    else:
        strategy.load_model_state_dict({"state_dict": weights}, strict=False)
