"""Pictures that need no disk, with captions made by rule: coloured shapes, and where one lies beside the other.

The grammar: `a COLOUR SHAPE`, or `a COLOUR SHAPE RELATION a COLOUR SHAPE` of two different objects, such as `a red
circle left of a blue square`. Some objects, `UNSEEN`, occur in no training caption, although their colour and their
shape do in others: whoever draws them has understood that the two are put together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bigmodels.data.loading import sample_generator
from lightning_bigmodels.errors import InputError, near

NAME = "shapes"
DEFAULT_SIZE = 20_000
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 30),
    "purple": (190, 40, 220),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
UNSEEN = (("red", "triangle"), ("blue", "circle"), ("yellow", "square"))
"""The objects that no training caption names."""
PARTS = {"train": 0, "val": 1, "test": 2}

_ALONE = 4  # of that many captions one has a single object
_SIDES = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom")}
_SIDES["below"] = ("bottom", "top")


class Object(NamedTuple):
    """A colour and a shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """What a caption says.

    Attributes:
        first: An object.
        relation: Where it lies; None: it is alone.
        second: The other one.
    """

    first: Object
    relation: str | None = None
    second: Object | None = None

    @property
    def caption(self) -> str:
        """The words."""
        return f"a {self.first}" if self.second is None else f"a {self.first} {self.relation} a {self.second}"

    @property
    def unseen(self) -> bool:
        """Whether training shows no such thing."""
        return self.first in UNSEEN or self.second in UNSEEN

    def placed(self) -> list[tuple[Object, str]]:
        """Return the objects with their places: `alone`, `left`, `right`, `top` or `bottom`."""
        if self.second is None or self.relation is None:
            return [(self.first, "alone")]
        return list(zip((self.first, self.second), _SIDES[self.relation], strict=True))


def scenes() -> list[Scene]:
    """Return all that the grammar can say."""
    objects = [Object(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [Scene(a, relation, b) for a in objects for relation in RELATIONS for b in objects if a != b]
    return [*map(Scene, objects), *pairs]


def read_caption(caption: str) -> Scene:
    """Return what a caption says.

    Raises:
        InputError: it is none of the grammar's.
    """
    known = {scene.caption: scene for scene in scenes()}
    if caption not in known:
        raise InputError(f"{caption!r} is no caption of shapes{near(caption, known)}")
    return known[caption]


class ShapeScenes:
    """The captions and pictures of a part; part and index alone make them.

    Args:
        part: `train` or `val`, whose objects training shows, or `test`, where one at least is `UNSEEN`.
        length: How many.
        size: Height and width of a picture in pixels.
    """

    def __init__(self, part: str, length: int, size: int) -> None:
        self.part = part
        self.length = length
        self.size = size
        mine = [scene for scene in scenes() if scene.unseen == (part == "test")]
        self._alone = [scene for scene in mine if scene.second is None]
        self._pairs = [scene for scene in mine if scene.second is not None]

    def scene(self, index: int) -> Scene:
        """Return what a caption says: each fourth one has a single object."""
        if index % _ALONE == _ALONE - 1:
            return self._alone[index // _ALONE % len(self._alone)]
        generator = sample_generator(PARTS[self.part], 0, index)
        return self._pairs[int(torch.randint(len(self._pairs), (), generator=generator))]

    def picture(self, index: int) -> Tensor:
        """Return (3, size, size) uint8."""
        return draw(self.scene(index), self.size, sample_generator(PARTS[self.part], 1, index))


def shape_parts(source: str, size: int) -> dict[str, ShapeScenes]:
    """Return the three parts of `shapes` or `shapes:N`, which has N training pictures and a tenth of it in the others.

    Raises:
        InputError: N is no number above 0.
    """
    _, _, number = source.partition(":")
    if number and (not number.isdecimal() or int(number) < 1):
        raise InputError(f"{source!r}: {number!r} is no number of pictures; write {NAME}:{DEFAULT_SIZE}")
    length = int(number or DEFAULT_SIZE)
    lengths = {"train": length, "val": max(1, length // 10), "test": max(1, length // 10)}
    return {part: ShapeScenes(part, count, size) for part, count in lengths.items()}


def is_shapes(source: str) -> bool:
    """Return whether a source is the generated one."""
    return source.partition(":")[0] == NAME


def draw(scene: Scene, size: int, generator: torch.Generator) -> Tensor:
    """Return a picture (3, size, size) uint8 of a scene: objects of several sizes and places on a dark ground."""
    numbers = torch.rand(9, generator=generator).tolist()
    picture = torch.full((3, size, size), 20.0)
    pixels = torch.arange(size) + 0.5
    for number, (thing, side) in enumerate(scene.placed()):
        along, across, large, bright = numbers[4 * number : 4 * number + 4]
        radius = size * (0.20 + 0.08 * large if side == "alone" else 0.15 + 0.05 * large)
        low, high = radius + 1, size - radius - 1
        if side == "alone":
            x, y = low + along * (high - low), low + across * (high - low)
        else:
            # half the picture for each of the two, and nearer to one line than to each other: one relation holds
            first = side in ("left", "top")
            near_edge, middle = (low, size / 2 - radius - 0.5) if first else (size / 2 + radius + 0.5, high)
            place = near_edge + along * (middle - near_edge)
            line = size * (0.25 + 0.5 * numbers[8] + 0.15 * (across - 0.5))
            line = min(max(line, low), high)
            x, y = (place, line) if side in ("left", "right") else (line, place)
        cover = _cover(thing.shape, pixels[None, :] - x, pixels[:, None] - y, radius)
        colour = torch.tensor(COLOURS[thing.colour], dtype=torch.float32).view(3, 1, 1) * (0.85 + 0.15 * bright)
        picture += cover * (colour - picture)
    return picture.round().clamp(0, 255).to(torch.uint8)


def _cover(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Return how much of each pixel a shape covers, from its distance to the edge."""
    if shape == "circle":
        inside = radius - (x**2 + y**2).sqrt()
    elif shape == "square":
        inside = 0.88 * radius - torch.maximum(x.abs(), y.abs())
    else:
        # upright, two sides of slope 2
        inside = torch.minimum(radius - y, (y + radius - 2 * x.abs()) / 5**0.5)
    return (inside + 0.5).clamp(0, 1)
