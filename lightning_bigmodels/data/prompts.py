"""Texts to be continued, or to be made pictures of: from a file, and as a data set."""

import re
from pathlib import Path

import torch
from torch.utils.data import Dataset

from lightning_bigmodels.data.batches import PromptBatch
from lightning_bigmodels.data.text_files import kind, read_file
from lightning_bigmodels.errors import InputError


def read_prompts(path: Path, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a text file, or the column `prompt` of a `.jsonl` file.

    Raises:
        InputError: there is no such file, no prompt in it, or a blank line before the last prompt.
    """
    if not path.is_file():
        raise InputError(f"prompts: {path} is not a file; give a text file with one prompt per line, or a .jsonl file")
    prompts = list(read_file(path, "prompt", encoding))
    if kind(path) not in (".jsonl", ".parquet"):
        prompts = _lines(path, prompts[0].removeprefix("\ufeff"))
    if not prompts:
        raise InputError(f"prompts: {path} holds no prompt; write one per line")
    return prompts


def _lines(path: Path, text: str) -> list[str]:
    lines = re.split(r"\r?\n", text)
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}, line {number} is blank; write a prompt there or remove the line")
    return lines


class Prompts(Dataset[PromptBatch]):
    """Texts to be continued; the index `len`, which fills a batch where there are too few, adds nothing to it.

    Args:
        prompts: The texts.
    """

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitems__(self, indices: list[int]) -> PromptBatch:
        """Return a batch, which is empty where all indices are `len`."""
        places = [index for index in indices if index < len(self)]
        return {
            "prompts": [self.prompts[index] for index in places],
            "indices": torch.tensor(places, dtype=torch.int64),
        }

    def __getitem__(self, index: int) -> PromptBatch:
        return self.__getitems__([index])
