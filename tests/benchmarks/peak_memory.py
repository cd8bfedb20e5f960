"""Peak memory in tensors while something runs."""

from collections.abc import Callable

import torch

from lightning_bigmodels.peak_memory import CPUMemory


def peak_bytes(run: Callable[[], None], held: int = 0) -> int:
    """Return the most bytes that lived in tensors at a time while `run` ran, on top of the `held` ones before."""
    memory = CPUMemory(torch.device("cpu"), held)
    try:
        memory.begin()
        run()
        return max(memory.peaks())
    finally:
        memory.end()
