"""The files that a network is exported to: how each is written, and how others load and run it.

`model.pt2` needs torch alone (and torchvision, where `description.json` says so):

    program = torch.export.load("FOLDER/model.pt2").module()
    (probabilities,) = program(images)

`model.onnx` needs onnxruntime and NumPy alone:

    session = onnxruntime.InferenceSession("FOLDER/model.onnx")
    (probabilities,) = session.run(None, {"images": images})

`weights.safetensors` holds the network's tensors by their names, for the network's own `load_state_dict`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_bigmodels.errors import InputError, RunError, near, require
from lightning_bigmodels.exportable import Exportable, Format

FILES: dict[Format, str] = {"torch": "model.pt2", "onnx": "model.onnx", "weights": "weights.safetensors"}
Run = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

# Protocol buffers, which an ONNX file is, end at 2 GiB; larger networks have their tensors in a file beside it
_ONE_FILE = 2 * 10**9
# operators that are torch's own
_CORE = {"aten", "prim", "prims", "higher_order", "_operator"}


def chosen(exportable: Exportable, formats: list[Format] | None) -> list[Format]:
    """Return the formats to write: those asked for, or all that can hold the network.

    Raises:
        InputError: one is unknown, cannot hold the network, or needs packages that are not installed.
    """
    if formats is not None and not formats:
        raise InputError(f"formats is empty; name some of {', '.join(FILES)}, or leave it out for all")
    for name in formats or ():
        if name not in FILES:
            raise InputError(f"formats: there is no {name!r}{near(name, FILES)}")
        if name in exportable.unsupported:
            raise InputError(f"{FILES[name]} cannot be written: {exportable.unsupported[name]}; leave {name} out")
    found = [name for name in FILES if name in (formats or FILES) and name not in exportable.unsupported]
    if "onnx" in found:
        _require_onnx()
    return found


def installed(exportable: Exportable) -> Exportable:
    """Return what is exported, unsupported in a format whose packages are not installed."""
    try:
        _require_onnx()
    except InputError as error:
        return exportable._replace(unsupported={"onnx": str(error), **exportable.unsupported})
    return exportable


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="onnx")


def write(exportable: Exportable, weights: nn.Module, formats: list[Format], folder: Path) -> dict[str, Any]:
    """Write the files, and return what is to say of them: the packages that they need, and ONNX's version.

    Args:
        exportable: What is written; its network is on the CPU, in evaluation mode.
        weights: The network whose tensors are the weights, by their names in it.
        formats: Which files.
        folder: Where to.

    Raises:
        RunError: torch cannot write the network in a format.
    """
    notes: dict[str, Any] = {}
    if "weights" in formats:
        # copies: tensors that share memory, as tied weights do, are refused, and loading them one by one is what works
        # with every network; in the plain layout, for safetensors takes no other
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in weights.state_dict().items()
        }
        safetensors.torch.save_file(state, folder / FILES["weights"], metadata={"format": "pt"})
    if "torch" in formats or "onnx" in formats:
        with _explained("torch"):
            program = _trace(exportable)
        notes["packages"] = _packages(program)
    if "torch" in formats:
        with _explained("torch"):
            torch.export.save(program, folder / FILES["torch"])
    if "onnx" in formats:
        with _explained("onnx"):
            notes["opset"] = _write_onnx(exportable, program, folder / FILES["onnx"])
    return notes


def load(folder: Path, name: Format) -> Run:
    """Return what runs an exported file: from a tuple of tensors to a tuple of tensors.

    Raises:
        InputError: there is no such file, or no package to run it.
    """
    path = folder / FILES[name]
    if name == "weights":
        raise InputError(f"{path.name} holds tensors, which do not run by themselves; name torch or onnx")
    if not path.is_file():
        raise InputError(f"{folder} holds no {path.name}; export with --formats [{name}], or name another folder")
    return _load_torch(path) if name == "torch" else _load_onnx(path)


def _load_torch(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(program(*inputs))

    return run


def _load_onnx(path: Path) -> Run:
    runtime: Any = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of how it arranges the network
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        arrays = (given.detach().cpu().numpy() for given in inputs)
        return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True)))))

    return run


def _trace(exportable: Exportable) -> ExportedProgram:
    # torch finds out by itself what lengths an axis can have, such as multiples of what the network halves
    shapes = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in exportable.dynamic)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own workings
        return torch.export.export(exportable.network, exportable.inputs, dynamic_shapes=shapes)


def _write_onnx(exportable: Exportable, program: ExportedProgram, path: Path) -> int:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(
            program,
            input_names=exportable.input_names,
            output_names=exportable.output_names,
            dynamic_shapes=exportable.dynamic,
            dynamo=True,
            verbose=False,
        )
        assert model is not None
        model.save(path, external_data=_num_bytes(program) > _ONE_FILE)
    return int(model.model.opset_imports[""])


def _num_bytes(program: ExportedProgram) -> int:
    tensors = [*program.state_dict.values(), *(c for c in program.constants.values() if isinstance(c, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _packages(program: ExportedProgram) -> list[str]:
    """Return the packages whose operators the program calls, which must be imported before it is loaded."""
    called = (getattr(node.target, "namespace", "aten") for node in program.graph.nodes if node.op == "call_function")
    return sorted({"torch", *called} - _CORE)


@contextmanager
def _explained(name: Format) -> Iterator[None]:
    """Say of which file a failure is; torch and the ONNX exporter have a dozen kinds of errors."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        others = "torch,weights" if name == "onnx" else "weights"
        raise RunError(
            f"torch cannot write the network as {FILES[name]} ({lines[0].strip():.300}); do without: "
            f"--formats [{others}]"
        ) from error
