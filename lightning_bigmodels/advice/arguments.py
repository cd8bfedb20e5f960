"""The command line of `bigmodels advise`: read, and explained, without torch."""

import argparse
import math
from dataclasses import dataclass
from typing import NoReturn

from lightning_bigmodels.errors import InputError

HELP = """usage: bigmodels advise --data FOLDER_OR_FILE --gpu NAME --hours HOURS [options]

Look at your data, and name the recipes that suit them: what each needs and takes on the hardware,
best first, why, and the command that runs it. The data are read; nothing is trained, fetched or
written. No GPU is needed. It needs the extra [vision].

  --data PATH       a folder with a folder of pictures for each class; a folder of pictures, perhaps with a
                    .txt caption, a mask or a .xml file for each, or a table beside them; a COCO .json file;
                    text (.txt, .md, .jsonl, .parquet, also .gz and .zst); a table (.csv, .tsv, .parquet);
                    a .npz file; MNIST's files; python-docs
  --gpu NAME        what it is to run on: l4, a100, h100, rtx-4090, ..., or cpu, which is this machine
  --hours HOURS     how long a run may take
  --devices N       how many of them, in one machine (1)
  --task TASK       what is to be learned, where the data can teach several things: classify, generate,
                    denoise, enlarge
  --plans N         how many recipes are planned, at about five seconds each, the first ten (3)
  --gpu_table FILE  a table of devices of your own, over the package's
  --json            the answer for programs
  -h, --help        this text

Time is that of training alone, as planned: loading of data and validation come on top. How sure a
plan is says 'bigmodels plan', which also finds what makes a large network fit.

examples:
  bigmodels advise --data photos --gpu l4 --hours 8
  bigmodels advise --data book.txt --gpu cpu --hours 0.5
  bigmodels advise --data photos --gpu h100 --hours 24 --task generate --json
"""
_USAGE = "write: bigmodels advise --data FOLDER_OR_FILE --gpu NAME --hours HOURS"


@dataclass(frozen=True)
class Arguments:
    """What the user asks for.

    Attributes:
        data: A file, a folder or the name of a source.
        gpu: Name of the hardware.
        hours: How long a run may take.
        devices: Devices of the machine.
        task: What is to be learned; None: what the data were most likely made for.
        plans: Recipes to plan.
        gpu_table: A table of devices of the user's; None: the package's alone.
        json: Whether the answer is for programs.
    """

    data: str
    gpu: str
    hours: float
    devices: int = 1
    task: str | None = None
    plans: int = 3
    gpu_table: str | None = None
    json: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {_USAGE}")


def parse(arguments: list[str]) -> Arguments:
    """Return what a command line asks for.

    Raises:
        InputError: an option is missing, unknown or out of its range.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--gpu"):
        parser.add_argument(name, required=True)
    parser.add_argument("--hours", required=True, type=_number)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--task")
    parser.add_argument("--plans", type=int, default=3)
    parser.add_argument("--gpu_table")
    parser.add_argument("--json", action="store_true")
    given = Arguments(**vars(parser.parse_args(arguments)))
    if not (given.hours > 0 and math.isfinite(given.hours)):
        raise InputError(f"--hours is {given.hours:g}; set it above 0, such as 8 or 0.5")
    for name, value in {"devices": given.devices, "plans": given.plans}.items():
        if value < 1:
            raise InputError(f"--{name} is {value}; set it to 1 or more")
    if not given.data:
        raise InputError("--data is empty; name the folder or file that holds your data")
    return given


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours") from None
