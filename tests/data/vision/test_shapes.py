"""Generated scenes: what captions say is what pictures show, and some objects are in no training caption."""

import pytest
import torch

from lightning_bigmodels.data.vision.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    UNSEEN,
    Object,
    Scene,
    draw,
    read_caption,
    scenes,
    shape_parts,
)
from lightning_bigmodels.errors import InputError

OF_SIDES = {"left": (slice(None), slice(0, 16)), "right": (slice(None), slice(16, 32))}
OF_SIDES |= {"top": (slice(0, 16), slice(None)), "bottom": (slice(16, 32), slice(None))}


def colour_of(pixels):
    """Return the name of the colour of the brightest pixels of (3, h, w)."""
    flat = pixels.flatten(1).float()
    brightest = flat[:, flat.amax(0).argmax()]
    names = torch.tensor(list(COLOURS.values())).float()
    likeness = torch.nn.functional.cosine_similarity(names, brightest[None])
    return list(COLOURS)[int(likeness.argmax())]


def test_the_grammar_says_each_thing_once():
    known = scenes()
    objects = len(COLOURS) * len(SHAPES)
    assert len(known) == objects + objects * (objects - 1) * len(RELATIONS)
    assert len({scene.caption for scene in known}) == len(known)
    assert all(read_caption(scene.caption) == scene for scene in known[::97])
    with pytest.raises(InputError, match="'a red circel' is no caption of shapes; did you mean 'a red circle'?"):
        read_caption("a red circel")


def test_a_picture_shows_its_objects_where_the_caption_says():
    generator = torch.Generator().manual_seed(1)
    for scene in scenes()[::13]:
        picture = draw(scene, 32, generator)
        assert picture.shape == (3, 32, 32)
        assert picture.dtype == torch.uint8
        for thing, side in scene.placed():
            rows, columns = OF_SIDES.get(side, (slice(None), slice(None)))
            assert colour_of(picture[:, rows, columns]) == thing.colour, scene.caption


@pytest.mark.parametrize(
    ("shape", "least", "most"), [("circle", 0.7, 0.85), ("square", 0.9, 1.1), ("triangle", 0, 0.6)]
)
def test_shapes_fill_their_frames_as_they_should(shape, least, most):
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        light = (draw(Scene(Object("green", shape)), 64, generator)[1].float() - 20).clamp(min=0)
        light /= light.max()
        rows, columns = ((light > 0.5).any(axis).nonzero().flatten() for axis in (1, 0))
        frame = light[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert least < frame.mean() < most


def test_training_shows_each_colour_and_each_shape_but_not_all_pairs():
    parts = shape_parts("shapes:400", 16)
    assert {name: part.length for name, part in parts.items()} == {"train": 400, "val": 40, "test": 40}
    seen = {thing for index in range(400) for thing, _ in parts["train"].scene(index).placed()}
    assert seen == {Object(colour, shape) for colour in COLOURS for shape in SHAPES} - set(UNSEEN)
    assert {thing.colour for thing in seen} == set(COLOURS)
    assert {thing.shape for thing in seen} == set(SHAPES)
    assert all(parts["test"].scene(index).unseen for index in range(40))
    assert not any(parts["val"].scene(index).unseen for index in range(40))


def test_place_alone_makes_a_picture():
    one, other = (shape_parts("shapes", 16) for _ in range(2))
    assert torch.equal(one["train"].picture(7), other["train"].picture(7))
    assert not torch.equal(one["train"].picture(3), one["val"].picture(3))
    with pytest.raises(InputError, match="'x' is no number of pictures; write shapes:20000"):
        shape_parts("shapes:x", 16)
