"""What a family hands over to be exported: its network with all that comes before and after it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Format = Literal["torch", "onnx", "weights"]
"""torch.export's program, an ONNX model, the network's tensors by their names."""


class Exportable(NamedTuple):
    """A network as others run it, with all that comes before and after it: pixels in, probabilities out.

    Attributes:
        network: Takes `inputs` and returns a tuple of tensors.
        inputs: An example of what it takes; uint8 inputs are taken for pixels, of which any will do.
        input_names: A name for each input.
        output_names: A name for each tensor returned.
        dynamic: For each input, the names of the axes whose length is free; axes of one name have one length.
        description: Plain values that a reader of the outputs needs, such as the names of classes.
        unsupported: For each format that cannot hold this network, why.
        check: For a network that chooses, where rounding may choose otherwise and numbers in their order cannot be
            compared: from `network`, inputs, the outputs found for them, and by which share of the greatest numbers may
            part, to how far they part; it raises RunError where they are not what the network may give.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic: tuple[dict[int, str], ...]
    description: dict[str, Any]
    unsupported: Mapping[Format, str] = MappingProxyType({})
    check: Callable[[Any, tuple[Tensor, ...], tuple[Tensor, ...], float], float] | None = None


class LibraryFolder(NamedTuple):
    """A network that a library has a folder format of its own for, such as diffusers.

    Attributes:
        write: Fills an empty folder.
        check: Loads the folder back; a RunError says where it parts from the network.
    """

    write: Callable[[Path], None]
    check: Callable[[Path], None]


Exported = Exportable | Mapping[str, Exportable] | LibraryFolder
"""One network; several that are used apart, each for a folder of its name; or a library's folder."""
