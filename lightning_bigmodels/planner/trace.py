"""What a step allocates, computes and sends: each tensor's storage from creation to release, real or fake."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.tensor import DTensor
from typing_extensions import Self, override

from lightning_bigmodels.planner.assumptions import assume, carry_on
from lightning_bigmodels.planner.flops import count_flops, count_skipped
from lightning_bigmodels.planner.recall import Pattern, describe, pattern_before, pattern_of
from lightning_bigmodels.planner.shortcuts import Uncompiled, result_of, run_shards
from lightning_bigmodels.planner.tensors import group_size, storages, tensors_in
from lightning_bigmodels.planner.time_limit import check_time

Kind = Literal[
    "parameters",
    "gradients",
    "optimizer state",
    "inputs",
    "activations",
    "communication",
    "temporary",
    "workspace",
    "host",
]
Phase = Literal["forward", "backward", "update"]

_KINDS_OF_PHASES: dict[Phase, Kind] = {"forward": "activations", "backward": "temporary", "update": "temporary"}
_DEVICE_OF = torch.ops.prim.device.default
# collectives, and what FSDP2 copies into and out of their buffers
_COMMUNICATION = ("c10d", "_c10d_functional", "fsdp")
_IN_PLACE = ("c10d", "fsdp")
TO_DEVICE, TO_HOST = "host_to_device", "device_to_host"
"""Names of the transfers between host memory and a device."""


class Moment(NamedTuple):
    """The memory at one place of the step."""

    operation: int
    """Number of the operation since the step began."""
    phase: Phase
    """What the step was at."""
    held: dict[Kind, int]
    """Bytes of each kind."""
    name: str = ""
    """The operation that ran, as torch calls it."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.held.values())


class Change(NamedTuple):
    """Bytes that were taken or given back, or that turned out to be of another kind: then there are two of these."""

    operation: int
    """Number of the operation since the step began."""
    phase: Phase
    """What the step was at."""
    kind: Kind
    """Of what there is more or less."""
    difference: int
    """Bytes, below 0 where they were given back."""


class Operation(NamedTuple):
    """What an operation costs, whatever device it runs on."""

    name: str
    """As torch calls it, such as `aten::mm`."""
    phase: Phase
    """When it ran."""
    flops: int
    """Floating-point operations, a multiplication and an addition counted as two; 0 where only memory counts."""
    traffic: int
    """Bytes read and written, each input and output once."""
    dtype: torch.dtype | None
    """Of its first floating-point input."""
    skipped: int = 0
    """How many of the floating-point operations are left out, as causal attention does with half of its own."""


class Transfer(NamedTuple):
    """A collective."""

    name: str
    """As torch calls it, such as `_allgather_base_`."""
    phase: Phase
    """When it ran."""
    size: int
    """Bytes of the larger of what goes in and what comes out, on this process."""
    processes: int
    """How many take part."""


@dataclass
class _Held:
    kind: Kind
    size: int
    reference: "weakref.ref[torch.UntypedStorage]"


class _Known(NamedTuple):
    """What the same operation on alike tensors does each time."""

    pattern: Pattern
    operation: Operation | None
    workspace: int


# by the rule for what operations hold while they run; kept for other settings of a network, which run the same
_KNOWN: defaultdict[Any, dict[tuple[Any, ...], _Known | None]] = defaultdict(dict)


class StepTrace(Uncompiled):
    """Follows operations and the storages that they make, as long as it is entered.

    Nothing is counted twice: a view has the storage of what it shows, a DTensor that of its own shard. What extensions
    allocate outside of torch's dispatcher is not seen.

    Args:
        block_size: Bytes that an allocator's blocks are a multiple of, 512 on CUDA.
        workspace: From an operation, its arguments and its result to the bytes that it holds while it runs.
        offloads: Whether shards are in host memory, where the optimizer steps; what is there is of no other kind.

    Attributes:
        phase: What the step is at; set by who runs it.
        peak: The moment at which most was held.
        start: Bytes held by kind when the step began.
        changes: What was taken and given back since, in this order.
        operations: How often each operation ran; alike ones are one.
        transfers: How often each collective ran.
        assumptions: Names of operations whose result hangs on values, and was assumed.
        mode: That of tensors without memory, to recall what is run on them; None with real ones.
        host_peak: The most bytes of host memory in the step.
    """

    def __init__(
        self,
        block_size: int = 1,
        workspace: Callable[[Any, tuple[Any, ...], Any], int] | None = None,
        offloads: bool = False,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.offloads = offloads
        self._workspace = workspace
        self._known = _KNOWN[workspace]
        self.mode: FakeTensorMode | None = None
        self._host = 0
        self.phase: Phase = "forward"
        self._held: dict[int, _Held] = {}
        self._sums: Counter[Kind] = Counter()
        self._total = 0
        self._running: Any = None
        self._resize: Callable[..., Any] | None = None
        self.assumptions: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Begin a step: forget what was, but for what is held."""
        self._number = 0
        self._over = False
        self.start = self.held
        self.changes: list[Change] = []
        self.operations: Counter[Operation] = Counter()
        self.transfers: Counter[Transfer] = Counter()
        self.peak = Moment(0, self.phase, self.held)
        self.host_peak = self._host

    def end(self) -> None:
        """End the step: what is given back later, as all is in the end, is no part of it."""
        self._over = True

    @property
    def history(self) -> list[tuple[int, int]]:
        """(operation, bytes held) whenever the bytes have changed."""
        totals = accumulate((change.difference for change in self.changes), initial=sum(self.start.values()))
        return list(zip((0, *(change.operation for change in self.changes)), totals, strict=True))

    # ---- memory

    @property
    def held(self) -> dict[Kind, int]:
        """Bytes held now, by kind."""
        return {kind: size for kind, size in self._sums.items() if size}

    def note(self, tensors: Iterable[Any], kind: Kind) -> None:
        """Say what tensors are, whether they are followed already or not."""
        for tensor in tensors:
            on_host = self.offloads and (isinstance(tensor, DTensor) or self.phase == "update")
            meant: Kind = "host" if on_host else kind
            for storage in storages(tensor):
                known = self._held.get(storage._cdata)
                if known is None:
                    self._follow(storage, meant)
                elif known.kind != meant:
                    self._count(known.kind, -known.size)
                    self._count(meant, known.size)
                    known.kind = meant

    def _follow(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        key, size = storage._cdata, self._rounded(storage.nbytes())

        def release(_: Any) -> None:
            gone = self._held.pop(key)
            self._change(gone.kind, -gone.size)

        self._held[key] = _Held(kind, size, weakref.ref(storage, release))
        self._change(kind, size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._held.get(storage._cdata)
        if known is not None:
            difference = self._rounded(storage.nbytes()) - known.size
            known.size += difference
            self._change(known.kind, difference)

    def _rounded(self, size: int) -> int:
        return -(-size // self.block_size) * self.block_size

    def _count(self, kind: Kind, difference: int) -> None:
        if kind == "host":
            self._host += difference
            self.host_peak = max(self.host_peak, self._host)
            return
        self._sums[kind] += difference
        self._total += difference
        if not self._over:
            self.changes.append(Change(self._number, self.phase, kind, difference))

    def _change(self, kind: Kind, difference: int) -> None:
        self._count(kind, difference)
        if self._total > self.peak.total:
            name = "" if self._running is None else self._running.name()
            self.peak = Moment(self._number, self.phase, self.held, name)

    # ---- operations

    @override
    def __enter__(self) -> Self:
        self._resize = resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        # FSDP2 empties and fills the storages of gathered parameters, past the dispatcher
        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    @override
    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign,assignment]
        super().__exit__(*raised)

    @override
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator is _DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device  # asked for more often than all operations together
        kwargs = kwargs or {}
        if any(kind is not FakeTensor and issubclass(kind, DTensor) for kind in types):
            # its own operations on the shards come back here
            return run_shards(self._run, operator, args, kwargs)
        return self._run(operator, args, kwargs)

    def _run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_time()
        self._running = operator
        call = None if self.mode is None else describe(self.mode, operator, args, kwargs)
        known = None if call is None else self._known.get(call.key)
        if self.mode is not None and call is not None and known is not None:
            result, outputs = known.pattern.make(self.mode, call.tensors)
            carry_on(operator, args, result)
            self._hold(operator, args, kwargs, outputs, known.workspace)
            self._count_operation(known.operation)
            return result
        pattern = None if call is None else pattern_before(operator)
        try:
            result = None if pattern else result_of(operator, args, kwargs, call is not None)
        except (DataDependentOutputException, DynamicOutputShapeException):
            result = assume(operator, args, kwargs)
            self.assumptions.add(operator.name())
            call = None
        carry_on(operator, args, result)
        outputs = list(tensors_in(result))
        workspace = 0 if self._workspace is None else self._workspace(operator, args, result)
        self._hold(operator, args, kwargs, outputs, workspace)
        if operator.namespace in _COMMUNICATION[:2]:
            self._note_transfer(operator, args, outputs)
            return result
        operation = self._operation(operator, args, kwargs, result, outputs)
        self._count_operation(operation)
        if self.mode is not None and call is not None and call.key not in self._known:
            pattern = pattern or pattern_of(self.mode, result, call.tensors)
            self._known[call.key] = None if pattern is None else _Known(pattern, operation, workspace)
        return result

    def _hold(
        self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], workspace: int
    ) -> None:
        """Follow what an operation has made, and what it held while it ran."""
        self._number += 1
        kind: Kind = "communication" if operator.namespace in _COMMUNICATION else _KINDS_OF_PHASES[self.phase]
        if self.offloads and self.phase == "update":
            kind = "host"
        for tensor in outputs:
            for storage in storages(tensor):
                if storage._cdata not in self._held:
                    self._follow(storage, kind)
        if workspace:
            self._change("temporary", workspace)
            self._change("temporary", -workspace)
        if self.offloads and self.phase != "update":
            self._note_shards(args, outputs)
        if operator.namespace in _IN_PLACE:
            self._note_buffers([*outputs, *tensors_in(kwargs.get("out", ()))])

    def _note_buffers(self, written: list[Tensor]) -> None:
        """Note what was sent or gathered into, which was made like any other tensor."""
        for tensor in written:
            for storage in storages(tensor):
                known = self._held.get(storage._cdata)
                if known is not None and known.kind in _KINDS_OF_PHASES.values():
                    self.note([tensor], "communication")

    def _note_shards(self, args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """Note what an operation on the device reads of host memory: shards, which are copied before they are gathered.

        The trace knows one memory alone, in which they are there already.
        """
        shards = [tensor for tensor in tensors_in(args) if self._is_on_host(tensor)]
        if not shards or any(self._is_on_host(tensor) for tensor in outputs):
            return
        held = sum(self._rounded(shard.nbytes) for shard in shards)
        self.transfers[Transfer(TO_DEVICE, self.phase, sum(shard.nbytes for shard in shards), 1)] += 1
        self._change("communication", held)
        self._change("communication", -held)

    def _is_on_host(self, tensor: Tensor) -> bool:
        found = (self._held.get(storage._cdata) for storage in storages(tensor))
        return any(known is not None and known.kind == "host" for known in found)

    def note_gradient(self, parameter: Tensor) -> None:
        """Note the gradient of a parameter, which goes to host memory if shards are there."""
        self.note([parameter.grad], "gradients")
        if self.offloads and isinstance(parameter.grad, DTensor):
            self.transfers[Transfer(TO_HOST, self.phase, parameter.grad._local_tensor.nbytes, 1)] += 1

    def _note_transfer(self, operator: Any, args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        tensors = [*tensors_in(args), *outputs]
        sizes = [size for argument in args if (size := group_size(argument))]
        if tensors and sizes:
            size = max(tensor.nbytes for tensor in tensors)
            self.transfers[Transfer(operator._overloadpacket.__name__, self.phase, size, sizes[0])] += 1

    def _operation(
        self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, outputs: list[Tensor]
    ) -> Operation | None:
        """Return what an operation costs in the forward pass; None of a view."""
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        known = {storage._cdata for tensor in inputs for storage in storages(tensor)}
        made = [tensor for tensor in outputs if known.isdisjoint(storage._cdata for storage in storages(tensor))]
        flops = count_flops(operator, args, kwargs, result)
        in_place = operator._schema.is_mutable
        if not flops and not made and not in_place:
            return None
        dtype = next((tensor.dtype for tensor in inputs if tensor.is_floating_point()), None)
        traffic = sum(tensor.nbytes for tensor in (*inputs, *(outputs if in_place else made)))
        return Operation(operator.name(), "forward", flops, traffic, dtype, count_skipped(operator, args, flops))

    def _count_operation(self, operation: Operation | None) -> None:
        if operation is None:
            return
        phase = self.phase
        # a loss may take its own gradient in the forward pass
        if phase == "forward" and torch._C._current_autograd_node() is not None:
            phase = "backward"
        self.operations[operation if phase == "forward" else operation._replace(phase=phase)] += 1
