"""A trained network as a folder that others load, compared with the original before it counts as done."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_bigmodels.errors import InputError


def export(module: LightningModule, folder: str | Path) -> Path:
    """Write a module's network in the format that its library loads, and return the folder.

    A network of transformers becomes a Hugging Face folder: safetensors, configuration, tokenizer. It is written beside
    its place, loaded back, compared, and only then moved there.

    Args:
        module: A LightningModule with `network` built and its weights loaded.
        folder: Where to; it must not exist, or be empty.

    Raises:
        InputError: `folder` holds something, or there is no format for this kind of network.
        RuntimeError: The folder, loaded back, does not give what the module gives.
    """
    from transformers import PreTrainedModel

    network: Any = getattr(module, "network", None)
    if not isinstance(network, PreTrainedModel):
        raise InputError(f"no export format is known for the network of {type(module).__name__}")
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"the output {str(target)!r} exists already; name another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
        # TemporaryDirectory makes it private to the user; an exported folder follows the user's umask
        half = Path(part, "half")
        half.mkdir()
        with _no_progress_bars():
            _write_hugging_face(network, getattr(module, "tokenizer", None), half)
            _compare_hugging_face(network, half)
        if target.is_dir():
            target.rmdir()
        half.replace(target)
    return target


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
        shutil.rmtree(folder)
        raise RuntimeError(f"the exported network's logits differ from the original's by up to {worst:.3g}")
