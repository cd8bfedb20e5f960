"""Shorter ways to what torch makes of tensors without memory.

An optimizer updates all parameters by operations on lists; torch works out the result of each of thousands anew, and
looks for each at all ways to shard it (2.14).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_bigmodels.planner.recall import alike, fresh

aten = torch.ops.aten
_ITEM = aten._local_scalar_dense.default
# of each element by itself, in the format that it has
_ELEMENTWISE = {
    *(aten._foreach_add, aten._foreach_add_, aten._foreach_sub, aten._foreach_sub_, aten._foreach_mul),
    *(aten._foreach_mul_, aten._foreach_div, aten._foreach_div_, aten._foreach_addcmul, aten._foreach_addcmul_),
    *(aten._foreach_addcdiv, aten._foreach_addcdiv_, aten._foreach_lerp, aten._foreach_lerp_, aten._foreach_sqrt),
    *(aten._foreach_sqrt_, aten._foreach_neg, aten._foreach_neg_, aten._foreach_maximum, aten._foreach_maximum_),
}


class Uncompiled(TorchDispatchMode):
    """A mode in which nothing is compiled: torch would keep its compiler away from each operation anew (2.14)."""

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False


def result_of(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hangs_on_shapes: bool) -> Any:
    """Run an operation on tensors that are not sharded.

    Args:
        operator: An overload of torch's.
        args: Its arguments.
        kwargs: Its named arguments.
        hangs_on_shapes: Whether it gives alike results for tensors that are alike.

    Raises:
        DataDependentOutputException: its result hangs on values.
        DynamicOutputShapeException: the shape of its result does.
    """
    if operator.namespace == "profiler":  # marks, which have no tensors
        with torch._C._DisableTorchDispatch():
            return operator(*args, **kwargs)
    if operator is _ITEM and type(args[0]) is FakeTensor and args[0].constant is None:
        raise DataDependentOutputException(operator)  # torch takes longer to say so
    if not hangs_on_shapes or not operator._schema.name.startswith("aten::_foreach_") or _has_lists(kwargs):
        return operator(*args, **kwargs)
    places, chosen = _differing(args, alike)
    result = operator(*_at(args, chosen), **kwargs)
    return [result[place] if chosen[place] == number else fresh(result[place]) for number, place in enumerate(places)]


def run_shards(run: Callable[..., Any], operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on lists of sharded tensors on their shards.

    Args:
        run: Runs an operation on tensors that are not sharded.
        operator: An overload of torch's.
        args: Its arguments.
        kwargs: Its named arguments.

    Returns:
        The result, or NotImplemented where torch has to look at how the tensors are sharded.
    """
    packet = operator._overloadpacket
    if (packet not in _ELEMENTWISE and packet is not aten._foreach_norm) or _has_lists(kwargs):
        return NotImplemented
    if not args or not all(_stays(args[0], value) for value in args):
        return NotImplemented
    specs = None
    if packet is aten._foreach_norm:
        places, chosen = _differing(args, lambda tensor: (tensor._spec.placements, tensor.shape, tensor.stride()))
        # which is not followed, and tells how norms are sharded
        norms = operator(*_at(args, chosen), **kwargs)
        specs = [norms[place]._spec for place in places]
    result = run(operator, tuple(map(_local, args)), kwargs)
    if result is None:
        return None
    specs = specs or [tensor._spec for tensor in args[0]]
    return [DTensor(part, spec, requires_grad=False) for part, spec in zip(result, specs, strict=True)]


def _differing(args: tuple[Any, ...], look: Callable[[Any], Any]) -> tuple[list[int], list[int]]:
    """Return for each place in some lists which of the differing ones is like it, and where these are."""
    lists = [value for value in args if _is_list(value)]
    numbers: dict[Any, int] = {}
    places: list[int] = []
    chosen: list[int] = []
    for number, parts in enumerate(zip(*lists, strict=True)):
        key = tuple(look(part) if isinstance(part, torch.Tensor) else part for part in parts)
        if key not in numbers:
            numbers[key] = len(chosen)
            chosen.append(number)
        places.append(numbers[key])
    return places, chosen


def _at(args: tuple[Any, ...], places: list[int]) -> list[Any]:
    return [[value[place] for place in places] if _is_list(value) else value for value in args]


def _has_lists(kwargs: dict[str, Any]) -> bool:
    """Whether tensors, or numbers of each, are among the named arguments, where they are not looked for."""
    return any(isinstance(value, (list, tuple, torch.Tensor)) for value in kwargs.values())


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _local(value: Any) -> Any:
    if _is_list(value):
        return [_local(part) for part in value]
    return value._local_tensor if isinstance(value, DTensor) else value


def _stays(first: Any, value: Any) -> bool:
    """Whether an argument lies in the same shards as the first one, or is the same number everywhere."""
    if isinstance(value, DTensor):
        same = value._spec.mesh is first[0]._spec.mesh and all(place.is_replicate() for place in value._spec.placements)
        return same and not value.ndim
    if isinstance(value, torch.Tensor):
        return not value.ndim
    if not _is_list(value) or not any(isinstance(part, torch.Tensor) for part in value):
        return True
    return all(map(_are_aligned, first, value)) and len(first) == len(value)


def _are_aligned(one: Any, other: Any) -> bool:
    if type(one) is not DTensor or type(other) is not DTensor or one.dtype != other.dtype:
        return False
    mine, yours = one._spec, other._spec
    plain = not any(placement.is_partial() for placement in mine.placements)
    return plain and mine.mesh is yours.mesh and mine.placements == yours.placements and one.shape == other.shape
