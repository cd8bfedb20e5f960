"""How `bigmodels check` reads the files of a part of pictures."""

from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import override

from lightning_bigmodels.data.check import Reader, Record
from lightning_bigmodels.data.vision.examples import Examples
from lightning_bigmodels.errors import InputError

_JOB = 16


class ExamplesReader(Reader):
    """Reads each file of a part once, whole, as a run would, but for augmentation.

    Args:
        examples: The part.
    """

    def __init__(self, examples: Examples[Any]) -> None:
        self.examples = examples

    @override
    def __len__(self) -> int:
        return len(self.examples.distinct())

    @override
    def jobs(self) -> Sequence[Sequence[int]]:
        places = self.examples.distinct()
        return [places[start : start + _JOB] for start in range(0, len(places), _JOB)]

    @override
    def read(self, job: Sequence[int]) -> Iterator[Record]:
        for place in job:
            try:
                example = self.examples.read(place)
                digest = self.examples.digest(place).encode()
            except InputError as error:
                yield Record(place, None, problem=str(error))
            else:
                yield Record(place, digest, tuple(self.examples.shown(place, example)))

    @override
    def name(self, place: int) -> str:
        return self.examples.name(place)
