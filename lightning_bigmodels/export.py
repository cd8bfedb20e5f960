"""A trained network as a folder that others load, compared with the original before it counts as done."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_bigmodels import export_formats
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.export_comparison import check_weights, compare, describe, example, free_lengths, trials
from lightning_bigmodels.export_formats import FILES
from lightning_bigmodels.exportable import Exportable, Exported, Format, LibraryFolder

DESCRIPTION = "description.json"


def export(module: LightningModule, folder: str | Path, formats: list[Format] | None = None) -> Path:
    """Write a module's network in the formats that others load, and return the folder.

    A network of transformers becomes a Hugging Face folder: safetensors, configuration, tokenizer; one of another
    library that folder which its own classes load. Any other, with what comes before and after it (`exportable`),
    becomes torch.export's `model.pt2`, `model.onnx` and `weights.safetensors`, with a `description.json`; parts that
    are used apart have a folder each. All is written beside its place, loaded back, compared, and only then moved
    there.

    Args:
        module: A LightningModule with `network` built and its weights loaded.
        folder: Where to; it must not exist, or be empty.
        formats: Which of the files; None: all that can hold the network and whose packages are installed.

    Raises:
        InputError: `folder` holds something, or there is no such format for this network.
        RunError: What was written, loaded back, does not give what the module gives.
    """
    from transformers import PreTrainedModel

    network: Any = getattr(module, "network", None)
    ask: Callable[[], Exported | None] = getattr(module, "exportable", lambda: None)
    exported = ask()
    if exported is None and not isinstance(network, PreTrainedModel):
        raise InputError(f"no export format is known for the network of {type(module).__name__}")
    if formats is not None and (exported is None or isinstance(exported, LibraryFolder)):
        raise InputError("formats is set, and this network becomes a Hugging Face folder; leave formats out")
    parts = _parts(exported, network)
    if formats is None:
        parts = {name: (export_formats.installed(each), weights) for name, (each, weights) in parts.items()}
    chosen = {subfolder: export_formats.chosen(each, formats) for subfolder, (each, _) in parts.items()}
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"the output {str(target)!r} exists already; name another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
        # TemporaryDirectory makes it private to the user; an exported folder follows the user's umask
        half = Path(part, "half")
        half.mkdir()
        if exported is None:
            with _no_progress_bars():
                _write_hugging_face(network, getattr(module, "tokenizer", None), half)
                _compare_hugging_face(network, half)
        elif isinstance(exported, LibraryFolder):
            exported.write(half)
            exported.check(half)
        for subfolder, (each, weights) in parts.items():
            (half / subfolder).mkdir(exist_ok=True)
            _write_files(each, weights, chosen[subfolder], type(module).__name__, half / subfolder)
        for path in half.rglob("*"):
            if path.is_file():
                path.chmod(half.stat().st_mode & 0o666)  # safetensors makes its files private too
        if target.is_dir():
            target.rmdir()
        half.replace(target)
    return target


def load_exported(folder: str | Path, name: Format = "torch") -> Callable[..., dict[str, Tensor]]:
    """Return what runs an exported network: from its inputs to its outputs by their names.

    Args:
        folder: What `export` has written.
        name: Which file: torch (`model.pt2`) or onnx (`model.onnx`).

    Raises:
        InputError: it is not there, or cannot be run here.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} holds no {DESCRIPTION}; name a folder that bigmodels export has written")
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    run = export_formats.load(folder, name)
    names = [output["name"] for output in description["outputs"]]
    return lambda *inputs: dict(zip(names, run(inputs), strict=True))


def unsupported(folder: Path) -> dict[str, str]:
    """Return the files that an exported folder lacks although nobody left them out, and why."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob(DESCRIPTION)):
        reasons: dict[Format, str] = json.loads(path.read_text(encoding="utf-8"))["unsupported"]
        found |= {str(path.with_name(FILES[name]).relative_to(folder)): reason for name, reason in reasons.items()}
    return found


def _parts(exported: Exported | None, network: Any) -> dict[str, tuple[Exportable, Any]]:
    """Return by its folder's name what is exported, with the network whose tensors are its weights."""
    if isinstance(exported, Exportable):
        return {"": (exported, network)}
    if isinstance(exported, Mapping):
        return {name: (part, part.network) for name, part in exported.items()}
    return {}


def _write_files(exportable: Exportable, network: Any, formats: list[Format], title: str, folder: Path) -> None:
    # a copy: the module stays where it is and how its weights lie, and in training if it was
    plain = copy.deepcopy(exportable.network).cpu().eval().to(memory_format=torch.contiguous_format)
    exportable = exportable._replace(network=plain, inputs=tuple(given.cpu() for given in exportable.inputs))
    # weights alone are run by nobody
    tried = trials(exportable) if set(formats) - {"weights"} else []
    # an axis of one element would be taken for one that never has more
    lengths = {name: max(2, length) for name, length in free_lengths(exportable).items()}
    notes = export_formats.write(exportable._replace(inputs=example(exportable, lengths)), network, formats, folder)
    differences: dict[str, float] = {}
    for name in formats:
        if name == "weights":
            check_weights(network, folder)
        else:
            differences[name] = compare(name, export_formats.load(folder, name), tried, exportable)
    description = {
        "model": title,
        **describe(exportable, tried),
        "files": {name: FILES[name] for name in formats},
        "unsupported": dict(exportable.unsupported),
        "largest_difference": differences,
        **notes,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers, which shows a bar for each file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_hugging_face(network: Any, tokenizer: Any, folder: Path) -> None:
    config = network.config
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(tokenizer, name)
            if value is not None:
                setattr(config, name, value)
                setattr(network.generation_config, name, value)
    network.save_pretrained(folder)


def _compare_hugging_face(network: Any, folder: Path) -> None:
    copy = type(network).from_pretrained(folder, dtype=network.dtype).to(network.device).eval()
    length = min(32, getattr(network.config.get_text_config(), "max_position_embeddings", 32))
    vocabulary = network.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0)).to(network.device)
    was_training = network.training
    network.eval()
    with torch.no_grad():
        expected, found = network(input_ids=ids).logits, copy(input_ids=ids).logits
    network.train(was_training)
    if not torch.equal(expected, found):
        worst = (expected - found).abs().max().item()
        raise RunError(f"the exported network's logits differ from the original's by up to {worst:.3g}")
