"""What was exported against the network itself: on several sizes of input, with how far the numbers may part."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_bigmodels.errors import RunError
from lightning_bigmodels.export_formats import FILES, Run
from lightning_bigmodels.exportable import Exportable, Format

TOLERANCES: dict[Format, float] = {"torch": 1e-5, "onnx": 1e-4}
"""How far numbers may part from the network's, as a share of the greatest of them, or of 1 where all are smaller.

Pixels, which are rounded, may part by one of 255; other whole numbers may not part.
"""


class Trial(NamedTuple):
    """Inputs, the lengths of their free axes, and what the network gives for them."""

    lengths: dict[str, int]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def example(exportable: Exportable, lengths: dict[str, int]) -> tuple[Tensor, ...]:
    """Return inputs with such free axes: what the example holds, repeated, but for pixels random ones."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for given, axes in zip(exportable.inputs, exportable.dynamic, strict=True):
        for axis, name in axes.items():
            given = given.index_select(axis, torch.arange(lengths[name]) % given.shape[axis])
        if given.dtype == torch.uint8:
            given = torch.randint(256, given.shape, dtype=torch.uint8, generator=generator)
        found.append(given)
    return tuple(found)


def free_lengths(exportable: Exportable) -> dict[str, int]:
    """Return the length of each free axis in the example."""
    pairs = zip(exportable.inputs, exportable.dynamic, strict=True)
    return {name: given.shape[axis] for given, axes in pairs for axis, name in axes.items()}


def trials(exportable: Exportable) -> list[Trial]:
    """Return the network's own answers: to inputs as the example's, to larger ones, and to a batch of one."""
    given = free_lengths(exportable)
    # half as much again, and every other twice as much: what comes from one axis cannot be taken for another's
    larger = {
        name: length * 2 if i % 2 else length + max(1, length // 2) for i, (name, length) in enumerate(given.items())
    }
    first = {axes[0] for axes in exportable.dynamic if 0 in axes}
    single = {name: 1 if name in first else length for name, length in given.items()}
    tried: list[Trial] = []
    for lengths in (given, larger, single):
        if lengths not in [trial.lengths for trial in tried]:
            inputs = example(exportable, lengths)
            tried.append(Trial(lengths, inputs, run_eagerly(exportable, inputs)))
    return tried


def run_eagerly(exportable: Exportable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what the network gives.

    Raises:
        TypeError: it is no tuple of as many tensors as have names.
    """
    with torch.no_grad():
        found = exportable.network(*inputs)
    if not isinstance(found, tuple) or len(found) != len(exportable.output_names):
        raise TypeError(
            f"an exportable network returns a tuple of {len(exportable.output_names)} tensors, not {found!r:.80}"
        )
    return found


def compare(name: Format, run: Run, tried: Sequence[Trial], exportable: Exportable) -> float:
    """Return how far an exported file parts from the network, as `TOLERANCES` counts.

    Raises:
        RunError: further than it may, or in shape.
    """
    worst = 0.0
    for trial in tried:
        shapes = ", ".join(str(tuple(given.shape)) for given in trial.inputs)
        where = f"{FILES[name]}, loaded back, differs from the network for inputs {shapes}"
        several = run(trial.inputs)
        for output, expected, found in zip(exportable.output_names, trial.outputs, several, strict=True):
            here = f"{where}: output {output!r}"
            if found.shape != expected.shape:
                raise RunError(
                    f"{here} has shape {tuple(found.shape)} and not {tuple(expected.shape)}; {_remedy(name)}"
                )
            if found.dtype != expected.dtype:
                raise RunError(f"{here} is {found.dtype} and not {expected.dtype}; {_remedy(name)}")
            if exportable.check is not None:
                continue
            difference, allowed = _difference(found, expected), _allowed(name, expected)
            if not difference <= allowed:
                raise RunError(f"{here} by up to {difference:.3g}, where {allowed:.3g} is allowed; {_remedy(name)}")
            worst = max(worst, difference)
        if exportable.check is not None:
            try:
                worst = max(worst, exportable.check(exportable.network, trial.inputs, several, TOLERANCES[name]))
            except RunError as error:
                raise RunError(f"{where}: {error}; {_remedy(name)}") from error
    return worst


def check_weights(network: nn.Module, folder: Path) -> None:
    """Compare the file of weights with the network, bit for bit.

    Raises:
        RunError: a tensor differs.
    """
    found = safetensors.torch.load_file(folder / FILES["weights"])
    for name, value in network.state_dict().items():
        if name not in found or not torch.equal(found[name], value.detach().cpu()):
            raise RunError(f"{FILES['weights']}, loaded back, does not hold the network's {name}; is the disk sound?")


def describe(exportable: Exportable, tried: Sequence[Trial]) -> dict[str, Any]:
    """Return as plain values what inputs and outputs are, versions, and what the task has to say."""
    if not tried:
        return {**exportable.description, "versions": _versions()}
    inputs = zip(*(trial.inputs for trial in tried), strict=True)
    outputs = zip(*(trial.outputs for trial in tried), strict=True)
    lengths = [trial.lengths for trial in tried]
    names = chain(exportable.input_names, exportable.output_names)
    tensors = [_tensor(name, several, lengths) for name, several in zip(names, chain(inputs, outputs), strict=True)]
    return {
        **exportable.description,
        "inputs": tensors[: len(exportable.inputs)],
        "outputs": tensors[len(exportable.inputs) :],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "lightning_bigmodels": version("lightning-bigmodels"),
        "torch": version("torch"),
    }


def _tensor(name: str, several: Sequence[Tensor], lengths: Sequence[dict[str, int]]) -> dict[str, Any]:
    dtype = str(several[0].dtype).removeprefix("torch.")
    axes = zip(*(tensor.shape for tensor in several), strict=True)
    return {"name": name, "dtype": dtype, "shape": [_axis(axis, lengths) for axis in axes]}


def _axis(found: Sequence[int], lengths: Sequence[dict[str, int]]) -> int | str:
    """Return an axis's length: a number, the name of a free axis or a multiple of one, or `any`."""
    if len(set(found)) == 1:
        return found[0]
    factors = {name: found[0] // length for name, length in lengths[0].items()}
    for name, factor in sorted(factors.items(), key=lambda item: item[1]):
        if all(here == factor * own[name] for here, own in zip(found, lengths, strict=True)):
            return name if factor == 1 else f"{factor} * {name}"
    return "any"


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    if expected.is_floating_point():
        same = (found == expected) | (found.isnan() & expected.isnan())  # infinities too
        return (found - expected).abs().masked_fill(same, 0.0).nan_to_num(torch.inf).max().item()
    return (found.double() - expected.double()).abs().max().item()


def _allowed(name: Format, expected: Tensor) -> float:
    if expected.dtype == torch.uint8:
        return 1.0
    if not expected.is_floating_point() or not expected.numel():
        return 0.0
    greatest = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return TOLERANCES[name] * max(1.0, greatest)


def _remedy(name: Format) -> str:
    return f"do without {name}: --formats [{','.join(other for other in FILES if other != name)}]"
