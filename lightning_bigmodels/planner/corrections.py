"""What a step on a CPU holds otherwise than one on CUDA, put right while it is traced there.

Traces run on CPU tensors, since torch cannot run a backward pass on tensors of a GPU that is not there. CUDA's kernels
and defaults differ from the CPU's in what they keep for the backward pass, and that alone is put right here: values are
none's concern, and with real tensors they would be wrong.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

# by their owners; under CUDA's autocast computed in float32, and in their inputs' format under the CPU's
# Source: torch's page on torch.amp, "CUDA Ops that can autocast to float32", less what the CPU's list has too
_IN_FLOAT32: dict[Any, tuple[str, ...]] = {
    F: (
        *("layer_norm", "group_norm", "normalize", "softplus", "cross_entropy", "nll_loss", "l1_loss"),
        *("smooth_l1_loss", "kl_div", "binary_cross_entropy_with_logits"),
    ),
    torch: ("exp", "log", "pow", "rsqrt", "reciprocal"),
    Tensor: ("exp", "log", "pow", "rsqrt", "reciprocal"),
}
# these make their result in float32 without a copy of the input
_INTO_FLOAT32: dict[Any, tuple[str, ...]] = {
    F: ("softmax", "log_softmax"),
    torch: ("softmax", "log_softmax", "sum", "cumsum", "prod"),
    Tensor: ("softmax", "log_softmax", "sum", "cumsum", "prod"),
}
# writes attention out for short rows, on a CPU alone
_BY_HAND = "lightning_bigmodels.modules.diffusion.attention"
_LOW = (torch.bfloat16, torch.float16)


@contextmanager
def on_cuda() -> Iterator[None]:
    """Let functions keep for the backward pass what they keep on CUDA.

    `rms_norm` is one kernel there, which keeps its input and a number per row; on a CPU it is composed, and keeps three
    tensors more. Dropout keeps a mask of one byte per element, and within attention none at all; on a CPU the mask has
    the input's format, and attention with dropout holds every probability. Under autocast more functions are computed
    in float32.
    """
    attention = F.scaled_dot_product_attention
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [(F, "rms_norm", _rms_norm), (F, "dropout", _dropout)]
    replaced += [(F, "scaled_dot_product_attention", partial(_attention, attention))]
    for found, wrap in ((_IN_FLOAT32, _in_float32), (_INTO_FLOAT32, _into_float32)):
        for owner, names in found.items():
            replaced += [(owner, name, wrap(getattr(owner, name))) for name in names]
    with ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        if _BY_HAND in sys.modules:
            stack.enter_context(mock.patch(f"{_BY_HAND}.LONGEST_PLAIN", -1))
        yield


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def widened(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(argument.float() if _is_low(argument) else argument for argument in args)
        return function(*args, **kwargs)

    return widened


def _into_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def widened(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and args and _is_low(args[0]) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return function(*args, **kwargs)

    return widened


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _LOW


def use_cuda_defaults(optimizer: Optimizer) -> None:
    """Let an optimizer update all parameters at once, as it does on CUDA unless it is told otherwise.

    That holds a temporary tensor for each of them at the same time.
    """
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


class _FusedRMSNorm(torch.autograd.Function):
    """Reads, writes and keeps what CUDA's kernel does; its values are none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        rows = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        (gradient,) = gradients
        of_weight = None if weight is None else torch.empty_like(weight)
        return gradient + x, of_weight


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    result: Tensor = _FusedRMSNorm.apply(input, weight)
    return result


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    return function(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
