"""What a step on tensors without values takes for values: nothing is out of order, and as many rows as there can be.

What holds for all holds, what any may be is not, and numbers are zero: so checks pass and masks of nothing are left
out. Numbers of rows that hang on values, such as the boxes that a detector keeps, are assumed to be their upper bound,
which is that of all rows unless a lower one is known; so memory and operations are an upper bound too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_bigmodels.errors import InputError

aten = torch.ops.aten


def assume(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what takes the place of a result that hangs on values, or whose shape does.

    Args:
        operator: An overload of torch's.
        args: Its arguments.
        kwargs: Its named arguments.

    Raises:
        InputError: nothing can be assumed for this operation; the message names it.
    """
    stand_in = _STAND_INS.get(operator.name())
    if stand_in is None:
        raise InputError(
            f"the step cannot be planned: the result of {operator.name()} hangs on values, which a plan does not have; "
            f"compute it by operations whose shapes are known"
        )
    return stand_in(*args, **kwargs)


def at_most(mask: Tensor, number: int) -> Tensor:
    """Return a mask of which it is known henceforth that no more elements are true, also when it is joined."""
    mask._most_true = min(number, mask.numel())  # type: ignore[attr-defined]
    return mask


def zeros(numbers: Tensor) -> Tensor:
    """Return numbers that are taken henceforth to be zero, all of them, when they are compared with one."""
    numbers._are_zero = True  # type: ignore[attr-defined]
    return numbers


def carry_on(operator: Any, args: tuple[Any, ...], result: Any) -> None:
    """Tell a result what is assumed of the arguments."""
    rule = _RULES.get(operator._overloadpacket)
    if rule is not None:
        rule(args, result)


def _suppose(args: tuple[Any, ...], result: Tensor) -> None:
    result._is_supposed = True  # type: ignore[attr-defined]


def _join(args: tuple[Any, ...], result: Tensor) -> None:
    parts = args[0] if isinstance(args[0], (list, tuple)) else args
    if any(hasattr(part, "_most_true") for part in parts):
        at_most(result, sum(_num_true(part) for part in parts if isinstance(part, Tensor)))


def _compare(args: tuple[Any, ...], result: Tensor) -> None:
    if hasattr(args[0], "_are_zero"):
        at_most(result, result.numel() if args[1] == 0 else 0)


def _num_true(mask: Tensor) -> int:
    return int(getattr(mask, "_most_true", mask.numel()))


def _scalar(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return getattr(tensor, "_is_supposed", False)
    return 0.0 if tensor.is_floating_point() else 0


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty((_num_true(tensor), tensor.ndim), dtype=torch.int64)


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    if hasattr(mask, "_most_true"):
        return tensor.new_empty(_num_true(mask) * (tensor.numel() // mask.numel()))
    return tensor.new_empty(torch.broadcast_shapes(tensor.shape, mask.shape).numel())


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    return torch.ops.aten.index.Tensor(tensor, _as_places(indices))


def _index_put(tensor: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    return tensor  # in place, of any number of rows


def _as_places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices with each mask replaced by as many places as may be true in it."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_empty(_num_true(index), dtype=torch.int64) for _ in range(index.ndim)]
        else:
            found.append(index)
    return found


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return scores.new_empty(len(scores), dtype=torch.int64)


def _unique(tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    size = tensor.numel()
    return (
        tensor.new_empty(size),
        tensor.new_empty(tensor.shape, dtype=torch.int64),
        tensor.new_empty(size, dtype=torch.int64),
    )


_STAND_INS: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _scalar,
    "aten::nonzero": _nonzero,
    "aten::masked_select": _masked_select,
    "aten::index.Tensor": _index,
    "aten::index_put_": _index_put,
    "aten::_unique2": _unique,
    "torchvision::nms": _nms,
}
_RULES: dict[Any, Callable[[tuple[Any, ...], Any], None]] = {
    aten.all: _suppose,
    aten.cat: _join,
    aten.bitwise_or: _join,
    aten.eq: _compare,
}
