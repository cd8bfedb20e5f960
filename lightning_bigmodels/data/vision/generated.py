"""Pictures that are not there yet, as a data set: which ones a model is to make."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from lightning_bigmodels.data.batches import GenerationBatch


class PicturesToMake(Dataset[GenerationBatch]):
    """Numbers of pictures; the index `len`, which fills a batch where there are too few, adds nothing to it.

    Args:
        num_pictures: How many.
        classes: What they show, in turn; empty: the model chooses.
    """

    def __init__(self, num_pictures: int, classes: Sequence[str] = ()) -> None:
        self.num_pictures = num_pictures
        self.class_names = list(classes)

    def __len__(self) -> int:
        return self.num_pictures

    def __getitems__(self, indices: list[int]) -> GenerationBatch:
        """Return a batch, which is empty where all indices are `len`."""
        places = [index for index in indices if index < len(self)]
        batch: GenerationBatch = {"indices": torch.tensor(places, dtype=torch.int64)}
        if self.class_names:
            batch["classes"] = [self.class_names[index % len(self.class_names)] for index in places]
        return batch

    def __getitem__(self, index: int) -> GenerationBatch:
        return self.__getitems__([index])
