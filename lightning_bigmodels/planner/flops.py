"""Floating-point operations of torch's operations, as `torch.utils.flop_counter` has them, and what it lacks."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
# attention on a CPU, and where among the arguments it stands whether it is causal
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: 4,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 7,
}


def count_flops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the floating-point operations of a call, a multiplication and an addition counted as two.

    Only matrix products, convolutions and attention count: the rest is bound by memory. Causal attention counts as a
    whole, as everybody counts it, although half of it is left out.

    Args:
        operator: An overload of torch's.
        args: Its arguments.
        kwargs: Its named arguments.
        result: What it returned.
    """
    packet = operator._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = _shapes(args[:3])
        return int(sdpa_flop_count(query, key, value))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        gradient, query, key, value = _shapes(args[:4])
        return int(sdpa_backward_flop_count(gradient, query, key, value))
    if packet is aten.convolution_backward:
        # as many for each gradient as in the forward pass; torch's formula multiplies that by the groups (2.14)
        gradient, x, weight = _shapes(args[:3])
        transposed, wanted = args[7], args[10]
        positions = math.prod((x if transposed else gradient)[2:])
        return 2 * gradient[0] * positions * math.prod(weight) * sum(wanted[:2])
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def count_skipped(operator: Any, args: tuple[Any, ...], flops: int) -> int:
    """Return how many of a call's `flops` are left out, since causal attention looks at half of all pairs."""
    place = ATTENTION.get(operator._overloadpacket)
    return flops // 2 if place is not None and len(args) > place and args[place] is True else 0


def _shapes(tensors: tuple[Tensor, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]
