"""Bright bars on noise, whose place is their class: data that a tiny network learns in seconds, without a file."""

import torch

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.examples import Examples

NUM_CLASSES = 6
SIZE = 8


class Bars(Examples):
    """Pictures (1, 8, 8) of class `index % 6`; a tenth of the labels is wrong."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length

    def name(self, index):
        return f"{index}.png"

    def read(self, index):
        label = index % NUM_CLASSES
        picture = torch.randint(120, (1, SIZE, SIZE), generator=torch.Generator().manual_seed(index)).to(torch.uint8)
        picture[:, label] += 120
        return picture, (label + 1) % NUM_CLASSES if index % 10 == 9 else label

    def prepare(self, example, epoch):
        return example

    def filler(self, epoch):
        return torch.zeros(1, SIZE, SIZE, dtype=torch.uint8), IGNORED

    def collate(self, indices, examples):
        return {
            "images": torch.stack([picture for picture, _ in examples]),
            "labels": torch.tensor([label for _, label in examples]),
            "indices": indices,
            "files": [self.name(index) for index in indices.tolist()],
        }


class BarsData(VisionData):
    multi_label = False
    channels = 1
    image_size = (SIZE, SIZE)

    def __init__(self, batch_size=10, eval_batch_size=7, class_names=tuple("abcdef")):
        super().__init__(batch_size, eval_batch_size, 0, 0, "error")
        self.class_names = list(class_names)

    def make_parts(self, stage):
        return {"train": Bars(60), "val": Bars(50), "test": Bars(31), "predict": Bars(5)}

    def example_batch(self, batch_size):
        return Bars(batch_size).__getitems__(range(batch_size))
