"""Pictures with boxes that need no disk: scikit-learn's digits pasted on canvases."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_bigmodels.data.loading import sample_generator
from lightning_bigmodels.data.vision.annotated import DetectionExample, DetectionExamples
from lightning_bigmodels.errors import require

DIGIT_NAMES = [str(digit) for digit in range(10)]
_SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
_MAX_OBJECTS = 5
_ATTEMPTS = 20
_EMPTY_EVERY = 20


class DigitPictures(DetectionExamples):
    """Colour pictures with up to five handwritten digits of several sizes on a noisy ground, none in each twentieth.

    Seed, part and index alone make a picture. Each part has handwritten digits of its own.

    Args:
        part: `train`, `val` or `test`.
        num_pictures: How many.
        size: Height and width of a picture in pixels.
        kwargs: The arguments of `DetectionExamples`.
    """

    def __init__(self, part: str, num_pictures: int, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.part = part
        self.num_pictures = num_pictures
        self.size = size

    @override
    def __len__(self) -> int:
        return self.num_pictures

    @override
    def name(self, index: int) -> str:
        return f"digits/{self.part}/{index}"

    @override
    def digest(self, index: int) -> str:
        return f"{self.name(index)} of seed {self.seed}"

    @override
    def classes(self, index: int) -> list[str]:
        return [DIGIT_NAMES[label - 1] for label in self.read(index).target["labels"].tolist()]

    @override
    def read(self, index: int) -> DetectionExample:
        glyphs, digits = _glyphs()
        first, last = (int(share * len(digits)) for share in _SHARES[self.part])
        generator = sample_generator(self.seed, -1 - list(_SHARES).index(self.part), index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        ground = 90 * torch.rand(3, 1, 1, generator=generator)
        canvas = ground + 20 * torch.rand(3, self.size, self.size, generator=generator)
        boxes: list[list[int]] = []
        labels: list[int] = []
        wanted = 0 if index % _EMPTY_EVERY == _EMPTY_EVERY - 1 else draw(1, _MAX_OBJECTS + 1)
        for _ in range(_ATTEMPTS):
            if len(boxes) == wanted:
                break
            number = draw(first, last)
            height = draw(self.size // 5, self.size * 2 // 5)
            width = max(4, round(height * glyphs[number].shape[1] / glyphs[number].shape[0]))
            left, top = draw(0, self.size - width + 1), draw(0, self.size - height + 1)
            box = [left, top, left + width, top + height]
            if any(_overlap(box, other) for other in boxes):
                continue
            ink = functional.interpolate(glyphs[number][None, None], (height, width), mode="bilinear")[0]
            colour = 140 + 115 * torch.rand(3, 1, 1, generator=generator)
            place = canvas[:, top : top + height, left : left + width]
            place.copy_(place + ink * (colour - place))
            boxes.append(box)
            labels.append(int(digits[number]) + 1)
        corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        return DetectionExample(
            canvas.round().clamp(0, 255).to(torch.uint8),
            {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.int64)},
        )


def _overlap(box: list[int], other: list[int]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


@cache
def _glyphs() -> tuple[list[Tensor], Tensor]:
    """Return the digits' ink, each (h, w) float32 in [0, 1] cut to where there is any, and which digits they are."""
    data = require("sklearn.datasets", extra="vision").load_digits()
    glyphs = []
    for pixels in torch.from_numpy(data.images).float() / 16:
        rows, columns = ((pixels > 0.2).any(dim=axis).nonzero().flatten() for axis in (1, 0))
        glyphs.append(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return glyphs, torch.from_numpy(data.target)
