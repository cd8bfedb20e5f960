"""The checkpoint that a command line names, and the model that a checkpoint names."""

from pathlib import Path
from typing import Any

import torch

from lightning_bigmodels import runs
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies.checkpoint_io import META_FILE


def is_option(arg: str, name: str) -> bool:
    """Whether a word of the command line is this option, with or without its value."""
    return arg == f"--{name}" or arg.startswith(f"--{name}=")


def names_model(arg: str) -> bool:
    """Whether a word of the command line says which class the model is."""
    return is_option(arg, "model") or is_option(arg, "model.class_path")


def without_model_options(args: list[str]) -> list[str]:
    """Drop `--model.x 1`, which means nothing before the model's class is known, and what prints and exits."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if arg.startswith("--"):
            skip = arg.startswith("--model.")
            if arg.startswith("--print_config"):
                continue
            if skip and "=" in arg:
                skip = False
                continue
        if not skip:
            kept.append(arg)
    return kept


def find_checkpoint(checkpoint: str, root: str) -> str:
    """Return the checkpoint that `--ckpt_path` means.

    Args:
        checkpoint: A path, an address, or best or last of the latest fit.
        root: Folder of the runs.

    Raises:
        InputError: there is no such file.
    """
    if checkpoint in ("best", "last"):
        return str(runs.find_checkpoint(root or runs.DEFAULT_ROOT, checkpoint))
    # Lightning's own words, and addresses, are its own matter
    if checkpoint in ("hpc", "registry") or ":" in checkpoint or Path(checkpoint).exists():
        return checkpoint
    raise InputError(f"--ckpt_path {checkpoint}: no such file; name a checkpoint, or: best, last")


def model_of(path: Path) -> dict[str, Any]:
    """Return class and arguments of the model in a checkpoint, a file or the folder of a sharded one.

    Raises:
        InputError: the checkpoint is not whole, or does not say.
    """
    if path.is_dir() and not (path / META_FILE).is_file():
        raise InputError(f"{path} is not a whole checkpoint, it lacks {META_FILE}; name another one")
    # memory-mapped: only the hyper-parameters are read
    content = torch.load(
        path / META_FILE if path.is_dir() else path, weights_only=True, map_location="cpu", mmap=path.is_file()
    )
    arguments = dict(content.get("hyper_parameters", {}))
    arguments.pop("_instantiator", None)
    class_path = arguments.pop("_class_path", None)
    if class_path is None:
        raise InputError(f"{path} does not say which model it holds; name it with --model CLASS or --config")
    return {"class_path": class_path, "init_args": arguments}
