"""What a step on a CPU holds otherwise than one on CUDA, put right while it is traced there.

Traces run on CPU tensors, since torch cannot run a backward pass on tensors of a GPU that is not there. CUDA's kernels
and defaults differ from the CPU's in what they keep for the backward pass, and that alone is put right here: values are
none's concern, and with real tensors they would be wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from typing_extensions import override

# computed in float32 under CUDA's autocast, and in their inputs' format under the CPU's
# Source: torch's page on torch.amp, "CUDA Ops that can autocast to float32", less what the CPU's list has too
_IN_FLOAT32: set[Callable[..., Any]] = {
    *(F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.normalize),
    *(F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.l1_loss, F.smooth_l1_loss, F.kl_div),
    *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt),
    *(torch.reciprocal, Tensor.reciprocal, F.softplus, torch.norm, Tensor.norm),
}
# these make their result in float32 without a copy of the input
_INTO_FLOAT32: set[Callable[..., Any]] = {
    *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    *(torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod),
}
_LOW = (torch.bfloat16, torch.float16)


class OnCUDA(TorchFunctionMode):
    """Lets functions keep for the backward pass what they keep on CUDA.

    `rms_norm` is one kernel there, which keeps its input and a number per row; on a CPU it is composed, and keeps three
    tensors more. Dropout keeps a mask of one byte per element, and within attention none at all; on a CPU the mask has
    the input's format, and attention with dropout holds every probability. Under autocast more functions are computed
    in float32.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            if func in _IN_FLOAT32:
                args = tuple(_widened(argument) for argument in args)
            elif func in _INTO_FLOAT32 and kwargs.get("dtype") is None and _is_low(args[0] if args else None):
                kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **kwargs)


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _LOW


def _widened(value: Any) -> Any:
    return value.float() if _is_low(value) else value
