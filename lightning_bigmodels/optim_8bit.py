"""AdamW whose moments take a byte each."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_bigmodels.errors import InputError

_FEWEST = 4096
"""Elements below which a tensor's moments are not worth a table of scales."""
_BLOCKS = range(256, 31, -1)
"""Elements that may share a scale; the first of these by which a row divides."""
_AT_ONCE = 2**23
"""Elements that are updated at once: they are float32 meanwhile, with some copies."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) that keeps its moments in 8 bits: 2 bytes for each weight, and not 8.

    A moment is a byte, which stands for one of 256 levels between -1 and 1, or 0 and 1, times the largest of its block.
    Vectors, tensors of fewer than 4,096 elements, and those whose rows divide into no blocks keep moments of 32 bits.

    It is torch's alone and compiles nothing. A block lies within a row, so that moments are sharded as the weights are,
    and checkpoints hold plain tensors, which load on another number of processes.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", sections 2.1 and 2.2, with the levels
    and blocks of torchao's `AdamW8bit`; a row that does not divide by 256 has blocks of fewer elements here.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the first and the second moment.
        eps: Term for numerical stability.
        weight_decay: Decoupled decay per step and unit of learning rate; groups that set their own keep it.

    Raises:
        InputError: An argument is out of its range, or there is no tensor but vectors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise InputError(f"{name} of AdamW8bit is {value}; it must be 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas of AdamW8bit are {tuple(betas)}; they must be 0 or more and below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if all(p.ndim < 2 for p in _members(self.param_groups)):
            raise InputError(
                "AdamW8bit found no matrix among the parameters, and vectors keep moments of 32 bits; use "
                "torch.optim.AdamW instead, or, with the strategy fsdp, which flattens matrices, fsdp2"
            )
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` recomputes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient = p.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise InputError("AdamW8bit takes no sparse gradients; make the embedding with sparse=False")
        if isinstance(p, DTensor) and isinstance(gradient, DTensor):
            gradient = gradient.redistribute(placements=p.placements)
        state = self.state[p]
        if not state:
            self._begin(p, state)
        state["step"] += 1
        count = state["step"].item()
        (beta1, beta2), lr = group["betas"], group["lr"]
        rate, root = lr / (1 - beta1**count), math.sqrt(1 - beta2**count)
        weights, gradients = _rows(p), _rows(gradient)
        for part in _parts(weights):
            stored, exact = weights[part], gradients[part].to(_wide(p))
            first = self._read(state, "exp_avg", part, exact).lerp_(exact, 1 - beta1)
            second = self._read(state, "exp_avg_sq", part, exact).mul_(beta2).addcmul_(exact, exact, value=1 - beta2)
            self._write(state, "exp_avg", part, first)
            self._write(state, "exp_avg_sq", part, second)
            step_size = second.sqrt().div_(root).add_(group["eps"])
            changed = stored.to(_wide(p)).mul_(1 - lr * group["weight_decay"])
            changed.addcdiv_(first, step_size, value=-rate)
            if changed.dtype != stored.dtype:
                stored.copy_(changed)

    # ---- moments

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.tensor(0.0)
        size = _block_size(p)
        for name in _MOMENTS:
            if size:
                state[name] = torch.zeros_like(p, dtype=torch.uint8, memory_format=torch.contiguous_format)
                state[f"{name}_scale"] = _scales(p, size)
            else:
                state[name] = torch.zeros_like(p, dtype=_wide(p))

    def _read(self, state: dict[str, Any], name: str, part: slice, like: Tensor) -> Tensor:
        """Return some rows of a moment: a copy where it has 8 bits, otherwise itself."""
        stored = _rows(state[name])[part]
        if f"{name}_scale" not in state:
            return stored
        scales = _rows(state[f"{name}_scale"])[part].reshape(-1, 1)
        levels, _ = self._table(name, stored.device)
        values = levels.index_select(0, stored.flatten().int())
        return values.view(len(scales), -1).mul_(scales).view(stored.shape).to(like.dtype)

    def _write(self, state: dict[str, Any], name: str, part: slice, values: Tensor) -> None:
        """Store what `_read` returned, and was changed."""
        if f"{name}_scale" not in state:
            return
        scales = _rows(state[f"{name}_scale"])[part]
        blocks = values.reshape(scales.numel(), -1)
        largest = blocks.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)
        _, middles = self._table(name, values.device)
        codes = torch.bucketize((blocks / largest).float(), middles, out_int32=True, right=True)
        _rows(state[name])[part].copy_(codes.view(values.shape))
        scales.copy_(largest.view(scales.shape))

    def _table(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the levels of a moment, and the middles between them."""
        if (name, device) not in self._tables:
            levels = _levels(signed=name == "exp_avg").to(device)
            self._tables[name, device] = levels, (levels[1:] + levels[:-1]) / 2
        return self._tables[name, device]

    # ---- checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint of this optimizer.

        Raises:
            InputError: It is of another optimizer, or of other parameters.
        """
        # torch's own would give bytes and scales the dtype of the weights
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(saved, _members(self.param_groups), strict=True):
            if index not in state_dict["state"]:
                continue
            given = state_dict["state"][index]
            own: dict[str, Tensor] = {}
            self._begin(p, own)
            other = [name for name in own if name not in given or given[name].shape != own[name].shape]
            if other or len(own) != len(given):
                raise InputError(
                    f"the checkpoint was not trained with AdamW8bit: of a parameter of shape {tuple(p.shape)} it holds "
                    f"{', '.join(given)}; name the optimizer that it was trained with"
                )
            self.state[p] = {name: given[name].to(device=own[name].device, dtype=own[name].dtype) for name in own}


def _members(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _rows(tensor: Tensor) -> Tensor:
    local = _local(tensor)
    return local if local.ndim else local.view(1)


def _parts(rows: Tensor) -> Iterator[slice]:
    size = max(1, _AT_ONCE // max(1, rows.shape[1:].numel()))
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _block_size(p: Tensor) -> int:
    """Return how many elements share a scale, on all processes alike; 0 where moments are not in 8 bits."""
    if p.ndim < 2 or p.numel() < _FEWEST:
        return 0
    row = _local(p).shape[1:].numel()
    return next((size for size in _BLOCKS if row % size == 0), 0)


def _scales(p: Tensor, size: int) -> Tensor:
    """Return a scale for each block, (rows, blocks of a row), which lie on the processes that their blocks lie on."""
    local = _local(p)
    scales = local.new_zeros((len(local), local.shape[1:].numel() // size), dtype=torch.float32)
    if not isinstance(p, DTensor):
        return scales
    rows, blocks = p.shape[0], p.shape[1:].numel() // size
    spread = DTensor.from_local(
        scales, p.device_mesh, p.placements, run_check=False, shape=torch.Size((rows, blocks)), stride=(blocks, 1)
    )
    return spread.to(p.device)  # torch has moved what is in host memory to the mesh's device


def _levels(signed: bool) -> Tensor:
    """Return the 256 values that a byte stands for, in order: a decade has twice as many as the one below it."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        number = 2**decade if signed else 2 ** (decade + 1)
        middles = 0.1 + 0.9 * (torch.arange(number) + 0.5) / number
        values.append(middles * 10.0 ** (decade - 6))
    if signed:
        values += [-middles for middles in values[1:]]
    return torch.cat(values).sort().values
