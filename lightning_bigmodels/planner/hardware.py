"""What a device can hold, compute and send: a table with a source for each row, and this machine measured."""

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.peak_memory import GIB, available_host_memory
from lightning_bigmodels.planner.cpu_rates import Rates, least_seconds, measure_rates

_TABLE = Path(__file__).with_name("hardware.csv")
_PEAKS = {
    "fp32_tflops": torch.float32,
    "bf16_tflops": torch.bfloat16,
    "fp16_tflops": torch.float16,
    "fp8_tflops": torch.float8_e4m3fn,
}
_NEEDED = ("name", "memory_gib", "memory_gb_s", *_PEAKS, "tf32_tflops", "link_gb_s", "network_gb_s", "source")
_TYPICAL = {
    # of devices that nothing was calibrated on: between the two that were
    "product_efficiency": 0.55,
    "attention_efficiency": 0.4,
    # the middle of 0.5 to 1.3 GiB, as seen with newer and older torch
    "context_gib": 0.9,
    # of PCIe 4.0 x16
    "host_gb_s": 32.0,
}
"""What a table may leave out, column or cell, with what is taken then."""
_NUMBERS = (*(column for column in _NEEDED if column not in ("name", "source")), *_TYPICAL)
# what older devices lack is computed in the next wider format
_WIDER = {torch.float8_e4m3fn: torch.bfloat16, torch.float16: torch.bfloat16, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Hardware:
    """A kind of device. Speeds are the maker's, without sparsity: what a program reaches of them is for `timing`.

    Attributes:
        name: Name in the table, or `cpu`.
        memory: Bytes of one device that programs may use.
        memory_bandwidth: Bytes per second.
        peak_flops: Floating-point operations per second by the format of a product's factors; float32 without TF32.
        tf32_flops: Of float32 products where `torch.set_float32_matmul_precision` allows TF32.
        product_efficiency: Share of these peaks that products reach in training; the table's source says on which
            measurements it was calibrated.
        attention_efficiency: Share of these peaks that attention reaches, what it leaves out not counted.
        link_bandwidth: Bytes per second in one direction, of one device to the others of its node.
        network_bandwidth: Bytes per second in one direction, of one device to other nodes.
        source: Where the numbers are from.
        host_bandwidth: Bytes per second in one direction, of one device to host memory.
        context: Bytes that a process takes before its first tensor: the driver's context and loaded kernels.
        rates: What each operation reaches, where that was measured: on this CPU.
    """

    name: str
    memory: int
    memory_bandwidth: float
    peak_flops: dict[torch.dtype, float]
    tf32_flops: float
    product_efficiency: float
    attention_efficiency: float
    link_bandwidth: float
    network_bandwidth: float
    source: str
    context: int = int(_TYPICAL["context_gib"] * GIB)
    host_bandwidth: float = _TYPICAL["host_gb_s"] * 1e9
    rates: Rates | None = None

    def flops_of(self, dtype: torch.dtype | None) -> float:
        """Return the peak for products of a format; of a format that the device lacks, that of a wider one."""
        if dtype is None or dtype == torch.float64:
            return self.peak_flops[torch.float32]
        while dtype not in self.peak_flops:
            dtype = _WIDER.get(dtype, torch.float32)
        return self.peak_flops[dtype]


def find_hardware(name: str, table: str | None = None) -> Hardware:
    """Return a kind of device by its name; `cpu` is this machine, measured.

    Args:
        name: A name in the table, in any case.
        table: As for `known_hardware`.

    Raises:
        InputError: There is no such device, or the table cannot be read.
    """
    known = known_hardware(table)
    key = name.strip().lower()
    if key in known:
        return known[key]
    if key == "cpu":
        return _this_machine()
    raise InputError(
        f"no device {name!r} in the table; one of your own (--gpu_table) can add it{near(key, [*known, 'cpu'])}"
    )


def known_hardware(table: str | None = None) -> dict[str, Hardware]:
    """Return all kinds of devices by name.

    Args:
        table: A CSV file of the user's with the columns of the package's `planner/hardware.csv`, whose rows come over
            those. An empty peak is one that the device lacks; an empty efficiency, context or host link, or one that
            the table has no column for, is that of typical devices.

    Raises:
        InputError: The table cannot be read; the message names the line.
    """
    known = _read(_TABLE)
    if table is not None:
        known |= _read(Path(table))
    return known


def _read(path: Path) -> dict[str, Hardware]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _NEEDED if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path}:1: no column {', '.join(missing)} in the hardware table; it needs {','.join(_NEEDED)}"
                )
            found = [_row(row, f"{path}:{reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"the hardware table {path} cannot be read ({error}); name a CSV file with the columns {','.join(_NEEDED)}"
        ) from error
    return {hardware.name: hardware for hardware in found}


def _row(row: dict[str, str | None], place: str) -> Hardware:
    name = (row["name"] or "").strip().lower()
    if not name or name == "cpu":
        raise InputError(
            f"{place}: the name is {row['name']!r}; give the device one, other than cpu, which is measured"
        )
    values = {column: _number(row.get(column), column, place) for column in _NUMBERS}
    peaks = {dtype: value * 1e12 for column, dtype in _PEAKS.items() if (value := values[column]) is not None}

    def needed(column: str) -> float:
        value = values[column]
        if value is None:
            raise InputError(
                f"{place}: {column} of {name} is empty; only efficiencies, context_gib, host_gb_s and peaks of formats "
                f"that it lacks may be"
            )
        return value

    def typical(column: str) -> float:
        return values[column] or _TYPICAL[column]

    needed("fp32_tflops")
    return Hardware(
        name=name,
        memory=int(needed("memory_gib") * GIB),
        memory_bandwidth=needed("memory_gb_s") * 1e9,
        peak_flops=peaks,
        tf32_flops=(values["tf32_tflops"] or needed("fp32_tflops")) * 1e12,
        product_efficiency=typical("product_efficiency"),
        attention_efficiency=typical("attention_efficiency"),
        link_bandwidth=needed("link_gb_s") * 1e9,
        network_bandwidth=needed("network_gb_s") * 1e9,
        source=(row["source"] or "").strip(),
        context=int(typical("context_gib") * GIB),
        host_bandwidth=typical("host_gb_s") * 1e9,
    )


def _number(text: str | None, column: str, place: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise InputError(f"{place}: {column} is {text!r}; it must be a number above 0")
    return value


# ---- this machine


@functools.cache
def _this_machine() -> Hardware:
    """Measure products, copies and steps of small networks on all threads of this process, in about a second."""
    peaks = {dtype: _product_flops(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    source = torch.ones(2**26, dtype=torch.uint8)  # larger than the caches of most processors
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / least_seconds(lambda: target.copy_(source))
    return Hardware(
        name="cpu",
        memory=available_host_memory(),
        memory_bandwidth=bandwidth,
        peak_flops=peaks,
        tf32_flops=peaks[torch.float32],
        product_efficiency=0.9,
        attention_efficiency=0.5,
        # processes of one machine copy into a socket and out of it: four passes over memory
        link_bandwidth=bandwidth / 4,
        network_bandwidth=1.25e9,
        source="measured here: products of 1024 x 1024 matrices, copies of 64 MiB, operations of small networks; "
        "10 Gbit/s network assumed",
        rates=measure_rates(),
    )


def _product_flops(dtype: torch.dtype) -> float:
    """Return operations per second of square products: as large as take no more than some hundredths of a second."""
    size = 128
    while True:
        factor = torch.ones(size, size, dtype=dtype)
        seconds = least_seconds(lambda factor=factor: factor @ factor)  # type: ignore[misc]
        if size >= 1024 or seconds > 0.005:
            return 2 * size**3 / seconds
        size *= 2
