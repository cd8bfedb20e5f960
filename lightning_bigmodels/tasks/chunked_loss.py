"""Cross entropy over a vocabulary without ever holding all logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


def chunked_cross_entropy(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    parameters: Sequence[nn.Parameter],
    chunk_size: int,
) -> Tensor:
    """Return the summed cross entropy of `logits_of(hidden)`, holding `chunk_size` rows of logits at a time.

    The gradient of each chunk is taken right after its loss, inside the forward pass, so nothing is computed twice and
    no chunk's logits outlive it. `torch.nn.functional.linear_cross_entropy` (torch 2.14) does the same for a bare
    linear layer; here the head is any function, for networks that cap or scale their logits.

    Args:
        logits_of: The head, from (n, D) to (n, V).
        hidden: (N, D).
        labels: (N,) int64; rows labelled -100 do not count.
        parameters: What `logits_of` trains; each of them gets its gradient through this loss.
        chunk_size: Rows at a time.

    Returns:
        Scalar float32: the sum in nats, differentiable once.
    """
    trained = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        loss: Tensor = _ChunkedCrossEntropy.apply(logits_of, chunk_size, labels, hidden, *trained)
        return loss
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, targets in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
        total += _summed(logits_of, rows, targets)
    return total


def _summed(logits_of: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(rows).float(), targets, ignore_index=IGNORED, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        chunk_size: int,
        labels: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden)
        sums: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                loss = _summed(logits_of, rows, labels[part])
                grads = torch.autograd.grad(loss, (rows, *parameters), allow_unused=True)
            total += loss.detach()
            hidden_grad[part] = grads[0]
            for i, grad in enumerate(grads[1:]):
                if grad is not None:
                    so_far = sums[i]
                    sums[i] = grad if so_far is None else so_far.add_(grad)
        ctx.grads = (hidden_grad, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("chunked_cross_entropy keeps its gradient for one backward pass only")
        grads, ctx.grads = ctx.grads, None
        return (None, None, None, *(None if g is None else g.mul_(grad_outputs[0]) for g in grads))
