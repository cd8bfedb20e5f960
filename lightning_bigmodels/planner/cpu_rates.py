"""What this CPU reaches in the operations that networks are made of, measured in steps of small ones."""

import math
import time
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_bigmodels.planner.tensors import tensors_in
from lightning_bigmodels.planner.trace import Operation, StepTrace

_LEAST_TRAFFIC = 2**17
"""Bytes, below which an operation's time is that of being started."""
_RUNS = 2
"""Of each step; of each operation the faster counts, as others may want the cores."""

_Key = tuple[str, torch.dtype | None]


@dataclass(frozen=True)
class Rates:
    """What operations reach on a CPU, by their names and the format of their factors.

    Attributes:
        arithmetic: Of products, convolutions and attention: binary logarithms of the operations for each byte that is
            read or written, rising, and of the operations per second there.
        traffic: Of all others: bytes per second.
        start: Seconds from one operation to the next, besides what they take.
    """

    arithmetic: dict[_Key, list[tuple[float, float]]]
    traffic: dict[_Key, float]
    start: float

    def seconds(self, operation: Operation) -> float | None:
        """Return what an operation takes, or None of one that was not measured."""
        key = operation.name, operation.dtype
        if not operation.flops:
            rate = self.traffic.get(key)
            return None if rate is None else operation.traffic / rate
        points, flops = self.arithmetic.get(key), operation.flops - operation.skipped
        if points is None or not operation.traffic:
            return None
        return float(flops / 2 ** _between(points, math.log2(flops / operation.traffic)))


def _between(points: list[tuple[float, float]], place: float) -> float:
    """Return the height of a line through points; before the first, traffic bounds it, behind the last, arithmetic."""
    index = bisect_left(points, (place,))
    if index == 0:
        return points[0][1] + place - points[0][0]
    if index == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[index - 1 : index + 1]
    return low + (high - low) * (place - left) / (right - left)


def measure_rates() -> Rates:
    """Train small networks of the usual parts in float32 and bfloat16, on all threads of this process.

    Random state stays as it is.
    """
    sums: dict[tuple[str, torch.dtype | None, int | None], tuple[int, float]] = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for call in _calls():
            work, logarithms = sums.get(call[:3], (0, 0.0))
            sums[call[:3]] = work + call.work, logarithms + call.work * math.log2(call.work / call.seconds)
        start = _start_seconds()
    arithmetic: defaultdict[_Key, list[tuple[float, float]]] = defaultdict(list)
    traffic = {}
    for (name, dtype, place), (work, logarithms) in sums.items():
        # their geometric mean is as often too high as too low, by layouts that differ tenfold
        if place is None:
            traffic[name, dtype] = 2 ** (logarithms / work)
        else:
            insort(arithmetic[name, dtype], (float(place), logarithms / work))
    return Rates(arithmetic, traffic, start)


class _Call(NamedTuple):
    """An operation that was run."""

    name: str
    dtype: torch.dtype | None
    place: int | None
    """Logarithm of its operations for each byte; None where only bytes count."""
    work: int
    """Operations or bytes."""
    seconds: float


class _Stopwatch(StepTrace):
    """Notes what operations do and how long they take."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    @override
    def _run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        result = operator(*args, **kwargs)
        seconds = time.perf_counter() - start
        operation = self._operation(operator, args, kwargs, result, list(tensors_in(result)))
        if operation is not None and operation.traffic >= _LEAST_TRAFFIC:
            work, place = operation.traffic, None
            if operation.flops:
                work = operation.flops - operation.skipped
                place = round(math.log2(work / operation.traffic))
            self.calls.append(_Call(operation.name, operation.dtype, place, work, seconds))
        return result


def _calls() -> Iterator[_Call]:
    """Yield what is run in a step of each network, with the least time that it takes."""
    for step in _steps():
        step()  # in which the optimizer makes its state
        runs = []
        for _ in range(_RUNS):
            with _Stopwatch() as watch:
                step()
            runs.append(watch.calls)
        for same in zip(*runs, strict=True):
            yield min(same, key=lambda call: call.seconds)


def _steps() -> Iterator[Callable[[], object]]:
    """Yield steps in either format: of pictures in both layouts, of words, and of products as small as Muon's."""
    for half in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last):
            pictures = torch.rand(8, 3, 32, 32).to(memory_format=layout)
            yield _step(_pictures().to(memory_format=layout), partial(_square, x=pictures), half)
        yield _step(_Words(), lambda net: net(torch.arange(256).view(1, 256)), half)
        small = torch.rand(128, 128, dtype=torch.bfloat16 if half else torch.float32)
        yield partial(torch.addmm, small, small, small)


def _square(network: nn.Module, x: Tensor) -> Tensor:
    """Return a loss for pictures."""
    result: Tensor = network(x)
    return result.square().mean()


def _step(network: nn.Module, loss: Callable[[nn.Module], Tensor], half: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters())

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(network)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return run


def _pictures() -> nn.Module:
    """Convolutions of many and of few operations for each byte, and what is mostly between them."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 32, 1)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(64, 64, 4, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU()),
        *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1)),
    )


class _Words(nn.Module):
    """A language model of a block: attention in one operation and in several."""

    def __init__(self, vocabulary: int = 1024, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixing = nn.Linear(width, 3 * width)
        self.inner = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        query, key, value = self.mixing(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        pairs = torch.softmax((query @ key.transpose(-1, -2)).float(), dim=-1).to(value.dtype)
        x = x + (pairs @ value).transpose(1, 2).flatten(2)
        x = x + self.inner[1](F.gelu(self.inner[0](self.norms[1](x))))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), words.flatten())


def _start_seconds() -> float:
    """Return what is between operations: a step of a network too small to take any time, by its operations."""
    network = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(8)))
    x = torch.rand(4, 4)
    step = _step(network, lambda net: net(x).mean(), half=False)
    seconds = least_seconds(step, runs=5)
    with StepTrace() as trace:
        step()
    return seconds / sum(trace.operations.values())


def least_seconds(work: Callable[[], object], runs: int = 3) -> float:
    """Return the least time of some runs after one that warms up."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
