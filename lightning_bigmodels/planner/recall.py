"""What operations on tensors without memory return, recalled where the same was done to alike tensors before.

A network repeats its blocks, and torch's own look-up of a result takes longer than the operation on a GPU would (2.14).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMESPACES = ("aten", "fsdp")
_ATTRIBUTES: dict[str, Any] = {}  # of every FakeTensor when it is new


class Call(NamedTuple):
    """An operation and what its result hangs on."""

    key: tuple[Any, ...]
    """The operation, its numbers, and shape, strides and format of its tensors: equal calls have alike results."""
    tensors: list[FakeTensor]
    """The tensors among its arguments."""


@functools.cache
def _hangs_on_shapes(operator: Any) -> bool:
    """Whether an operation's result hangs on no more than its call tells, and its arguments keep their shapes."""
    return operator.namespace in _NAMESPACES and torch.Tag.inplace_view not in operator.tags


def describe(mode: FakeTensorMode, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Return a call, or None if its result may hang on more than is told of it.

    Args:
        mode: That of the tensors.
        operator: An overload of torch's.
        args: Its arguments.
        kwargs: Its named arguments.
    """
    if not _hangs_on_shapes(operator):
        return None
    key: list[Any] = [operator, torch.get_default_dtype(), torch.is_inference_mode_enabled(), *kwargs]
    tensors: list[FakeTensor] = []
    if not _describe(mode, args, key, tensors) or (kwargs and not _describe(mode, kwargs.values(), key, tensors)):
        return None
    return Call(tuple(key), tensors)


def _describe(mode: FakeTensorMode, values: Any, key: list[Any], tensors: list[FakeTensor]) -> bool:
    """Add what is told of some arguments; return whether that is all."""
    key.append(len(values))
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not mode or value.constant is not None or value.is_sparse:
                return False
            tensors.append(value)
            key += alike(value)
        elif kind in (list, tuple, torch.Size):
            if not _describe(mode, value, key, tensors):
                return False
        elif kind in _PLAIN:
            key += (kind, value)  # 1, 1.0 and True are equal
        else:
            return False
    return True


def alike(tensor: FakeTensor) -> tuple[Any, ...]:
    """Return what tensors have in common that operations treat alike."""
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.requires_grad, keys)


class _Output(NamedTuple):
    """A tensor of a result."""

    argument: int | None
    """Which of the arguments it is, or lies in the memory of; None: it has memory of its own."""
    is_view: bool
    """Whether it only lies in that argument's memory."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Pattern:
    """How to make the result of a call from its tensors.

    Args:
        outputs: The tensors of the result; None stands for None.
        kind: list or tuple, if the result is one.
    """

    def __init__(self, outputs: list[_Output | None], kind: type | None) -> None:
        self._outputs = outputs
        self._kind = kind

    def make(self, mode: FakeTensorMode, tensors: list[FakeTensor]) -> tuple[Any, list[Tensor]]:
        """Return the result, and the tensors in it.

        Args:
            mode: That of the tensors.
            tensors: Those of the call.
        """
        found = [None if output is None else _make(mode, output, tensors) for output in self._outputs]
        result = found[0] if self._kind is None else self._kind(found)
        return result, [tensor for tensor in found if tensor is not None]


def _make(mode: FakeTensorMode, output: _Output, tensors: list[FakeTensor]) -> FakeTensor:
    argument, is_view, shape, stride, offset, dtype, device = output
    if argument is not None and not is_view:
        return tensors[argument]
    with torch._C._DisableTorchDispatch():
        made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if argument is not None:
            made.set_(tensors[argument].untyped_storage(), offset, shape, stride)
    return _fake(mode, made, device)


def fresh(tensor: FakeTensor) -> FakeTensor:
    """Return one of the same shape, strides and format, in memory of its own."""
    with torch._C._DisableTorchDispatch():
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return _fake(tensor.fake_mode, made, tensor.fake_device)


def _fake(mode: FakeTensorMode, meta: Tensor, device: torch.device) -> FakeTensor:
    """Do what FakeTensor's constructor does, in a quarter of its time; `pattern_of` sees whether it did."""
    if not _ATTRIBUTES:
        _ATTRIBUTES.update(vars(FakeTensor(mode, meta, device)), fake_mode=None)
    made = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(_ATTRIBUTES, fake_mode=mode, _fake_device=device)
    return made


def pattern_before(operator: Any) -> Pattern | None:
    """Return how to make an operation's result where that is known before it is run, or None.

    What changes many tensors in place returns nothing, which torch finds out by a look at each of them.

    Args:
        operator: An overload of torch's.
    """
    schema = operator._schema
    in_place = schema.name.startswith("aten::_foreach_") and schema.is_mutable and not schema.returns
    return Pattern([None], None) if in_place else None


def pattern_of(mode: FakeTensorMode, result: Any, tensors: list[FakeTensor]) -> Pattern | None:
    """Return how to make a result again, or None if that is not certain.

    Args:
        mode: That of the tensors.
        result: What an operation returned.
        tensors: Those of the call.
    """
    kind = type(result) if type(result) in (list, tuple) else None
    parts = [result] if kind is None else result
    itself = {id(tensor): place for place, tensor in enumerate(tensors)}
    owners: dict[int, list[int]] = {}
    for place, tensor in enumerate(tensors):
        owners.setdefault(tensor.untyped_storage()._cdata, []).append(place)
    outputs: list[_Output | None] = []
    for part in parts:
        if part is None:
            outputs.append(None)
            continue
        if type(part) is not FakeTensor or part.constant is not None or part.is_sparse or part.requires_grad:
            return None
        same, near = itself.get(id(part)), owners.get(part.untyped_storage()._cdata, [])
        if same is None and len(near) > 1:
            return None  # of which one it is a view hangs on more than shapes
        argument = near[0] if same is None and near else same
        stride, offset = part.stride(), int(part.storage_offset())
        outputs.append(_Output(argument, same is None, part.shape, stride, offset, part.dtype, part.fake_device))
    pattern = Pattern(outputs, kind)
    again = pattern.make(mode, tensors)[1]
    known = [part for part in parts if part is not None]
    return pattern if all(map(_are_alike, known, again)) else None


def _are_alike(tensor: Any, other: Any) -> bool:
    if tensor is other:
        return True
    return alike(tensor) == alike(other) and tensor.untyped_storage().nbytes() == other.untyped_storage().nbytes()
