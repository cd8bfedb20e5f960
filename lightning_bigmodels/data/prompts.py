"""Texts to be continued, as a data set."""

import torch
from torch.utils.data import Dataset

from lightning_bigmodels.data.batches import PromptBatch


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
