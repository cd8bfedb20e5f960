"""What masks mean: values, colours, polygons, ids; which are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.palette import class_palette
from tests.data.masked_pictures import (
    COLORS,
    NAMES,
    as_picture,
    draw,
    open_data,
    read_all,
    write,
    write_folder,
)


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


# ---- what masks mean


def test_palettes_gray_bits_and_colours_say_the_same(folder):
    mask = draw(3)
    write(folder / "p" / "3.png", as_picture(mask))
    binary = (mask > 0).astype(np.uint8)
    kinds = {
        "paletted": (Image.fromarray(mask), {}),
        "gray": (Image.fromarray(mask), {}),
        "sixteen": (Image.fromarray(mask.astype(np.uint16) + 300), {"class_values": [300, 301, 302]}),
        "coloured": (as_picture(mask), {"class_colors": COLORS}),
        "values": (Image.fromarray(mask * 100), {"class_values": [0, 100, 200]}),
        "bits": (Image.fromarray(binary * 255).convert("1"), {"class_names": NAMES[:2]}),
    }
    kinds["paletted"][0].putpalette(class_palette())
    for name, (image, arguments) in kinds.items():
        write(folder / name / "3.png", image)
        data = open_data(
            folder,
            source=str(folder / "p"),
            masks=str(folder / name),
            val_fraction=0.0,
            own_scale=True,
            eval_size=[40, 60],
            **arguments,
        )
        found = data.parts["train"].__getitems__([0])["masks"][0]
        assert torch.equal(found, torch.from_numpy(binary if name == "bits" else mask).long()), name


def test_the_ignored_value_and_colour_count_for_nothing(folder):
    mask = draw(3)
    mask[:5] = 255
    rgb = np.array(COLORS + [[0, 0, 0]] * 253, dtype=np.uint8)[mask]
    write(folder / "p" / "3.png", as_picture(draw(3)))
    write(folder / "value" / "3.png", Image.fromarray(mask))
    write(folder / "colour" / "3.png", Image.fromarray(rgb))
    for name, arguments in {
        "value": {},
        "colour": {"class_colors": COLORS, "ignored_color": [0, 0, 0]},
    }.items():
        data = open_data(
            folder,
            source=str(folder / "p"),
            masks=str(folder / name),
            val_fraction=0.0,
            own_scale=True,
            eval_size=[40, 60],
            **arguments,
        )
        found = data.parts["train"].__getitems__([0])["masks"][0]
        assert (found[:5] == IGNORED).all()
        assert torch.equal(found[5:], torch.from_numpy(mask[5:]).long())


def bad_value(folder):
    mask = draw(0, 30, 60)
    mask[4, 7] = 9
    Image.fromarray(mask).save(folder / "masks" / "0.png")


def bad_size(folder):
    Image.fromarray(draw(0, 31, 60)).save(folder / "masks" / "0.png")


def three_channels(folder):
    as_picture(draw(0, 30, 60)).save(folder / "masks" / "0.png")


def cut_off(folder):
    path = folder / "masks" / "0.png"
    path.write_bytes(path.read_bytes()[:60])


def no_picture(folder):
    (folder / "masks" / "0.png").write_text("text")


def jpeg(folder):
    (folder / "masks" / "0.png").unlink()
    Image.fromarray(draw(0, 30, 60)).save(folder / "masks" / "0.jpg")


def broken_picture(folder):
    (folder / "pictures" / "0.png").write_bytes(b"")


BROKEN = [
    (bad_value, ["masks/0.png", "the value 9 at row 4, column 7", "data.ignored_value"]),
    (bad_size, ["masks/0.png", "31 x 60", "30 x 60"]),
    (three_channels, ["masks/0.png", "3 channels (RGB)", "data.class_colors"]),
    (cut_off, ["masks/0.png", "damaged or cut off"]),
    (no_picture, ["masks/0.png", "no picture", "PNG"]),
    (jpeg, ["masks/0.jpg", "JPEG", "write masks as PNG"]),
    (broken_picture, ["pictures/0.png", "empty"]),
]


@pytest.mark.parametrize(("break_it", "words"), BROKEN, ids=[break_it.__name__ for break_it, _ in BROKEN])
def test_a_broken_file_is_named_with_its_remedy_or_left_out(folder, break_it, words):
    break_it(folder)
    with pytest.raises(InputError) as caught:
        read_all(open_data(folder, val_fraction=0.0), "train")
    for word in words:
        assert word in str(caught.value)
    batch = read_all(open_data(folder, val_fraction=0.0, on_error="skip"), "train")
    assert batch["indices"].tolist() == [FILLER, *range(1, 10)]
    assert batch["errors"] == [str(caught.value)]


def test_missing_pairs_are_named(folder):
    (folder / "masks" / "3.png").unlink()
    (folder / "masks" / "5.png").unlink()
    with pytest.raises(
        InputError, match=r"2 pictures \(.*pictures/3.png, .*pictures/5.png\) have no mask of their name"
    ):
        open_data(folder)
    batch = read_all(open_data(folder, val_fraction=0.0, on_error="skip"), "train")
    assert batch["indices"].tolist().count(FILLER) == 2
    assert "masks/3.png is missing, the mask of a picture" in batch["errors"][0]
    (folder / "pictures" / "3.png").unlink()
    (folder / "pictures" / "5.png").unlink()
    (folder / "pictures" / "7.png").unlink()
    with pytest.raises(InputError, match=r"1 masks \(.*masks/7.png\) have no picture of their name"):
        open_data(folder)
    batch = read_all(open_data(folder, val_fraction=0.0, on_error="skip"), "train")
    assert "pictures/7.png cannot be read" in batch["errors"][0]


def test_a_colour_without_a_class_is_refused(folder):
    three_channels(folder)
    data = open_data(folder, class_colors=[[1, 1, 1], [2, 2, 2], [3, 3, 3]], val_fraction=0.0)
    with pytest.raises(InputError, match=r"masks/0.png has the colour \[.*\] at row .*, which no class has"):
        data.parts["train"].__getitems__([0])


def test_names_with_endings_of_their_own(folder):
    for number in range(10):
        (folder / "masks" / f"{number}.png").rename(folder / "masks" / f"{number}_mask.png")
        (folder / "pictures" / f"{number}.png").rename(folder / "pictures" / f"{number}_photo.png")
    data = open_data(folder, image_suffix="_photo", mask_suffix="_mask")
    assert len(data.parts["train"]) == 9
    with pytest.raises(InputError, match="holds no file whose name ends in '_gt'"):
        open_data(folder, image_suffix="_photo", mask_suffix="_gt")


def test_masks_of_0_and_255_are_asked_about(folder):
    for number in range(10):
        path = folder / "masks" / f"{number}.png"
        Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    with pytest.warns(UserWarning, match=r"hold 0 and 255 alone, .* set data.class_values to \[0, 255\]"):
        open_data(folder, class_names=NAMES[:2])
    data = open_data(folder, class_names=NAMES[:2], class_values=[0, 255], ignored_value=None)
    assert set(read_all(data)["masks"].unique().tolist()) == {0, 1, IGNORED}


# ---- COCO


def square(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def coco(folder, *annotations, categories=((7, "cat"), (3, "dog"))):
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(folder / "pictures" / "one.png")
    content = {
        "images": [{"id": 11, "file_name": "one.png", "height": 20, "width": 30}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [
            {"id": number, "image_id": 11, "iscrowd": 0, **annotation} for number, annotation in enumerate(annotations)
        ],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return str(folder / "coco.json")


def coco_mask(folder, path, **changes):
    data = open_data(
        folder, masks=path, own_scale=True, eval_size=[20, 30], val_fraction=0.0, **{"class_names": None, **changes}
    )
    return data, data.parts["train"].__getitems__([0])["masks"][0]


def test_polygons_become_masks_with_small_objects_on_top(folder):
    small = {"category_id": 7, "segmentation": square(8, 8, 2)}
    large = {"category_id": 3, "segmentation": square(5, 5, 10)}
    runs = {"counts": [2, 3, 595], "size": [20, 30]}  # column by column: rows 2 to 4 of the first one
    crowd = {"category_id": 3, "iscrowd": 1, "segmentation": runs}
    data, mask = coco_mask(folder, coco(folder, small, large, crowd))
    assert data.class_names == ["background", "dog", "cat"]
    expected = torch.zeros(20, 30, dtype=torch.int64)
    expected[5:15, 5:15] = 1
    expected[8:10, 8:10] = 2
    expected[2:5, 0] = IGNORED
    assert torch.equal(mask, expected)
    assert data.parts["train"].classes(0) == ["dog", "cat"]
    data, mask = coco_mask(folder, str(folder / "coco.json"), class_names=["background", "cat"])
    assert mask.max() == 1
    assert (mask == 1).sum() == 4


@pytest.mark.parametrize(
    ("annotation", "changes", "message"),
    [
        ({"category_id": 4, "segmentation": square(1, 1, 3)}, {}, "annotation 0: there is no category 4"),
        ({"category_id": 3, "image_id": 5, "segmentation": square(1, 1, 3)}, {}, "annotation 0: there is no image 5"),
        ({"category_id": 3, "segmentation": [[1, 2, 3, 4]]}, {}, "annotation 0: the segmentation is neither"),
        ({"category_id": 3}, {}, "annotation 0: the segmentation is neither"),
        (
            {"category_id": 3, "segmentation": {"counts": [2, 2], "size": [2, 2]}},
            {},
            r"annotation 0: its run lengths are of \(2, 2\)",
        ),
        (
            {"category_id": 3, "segmentation": square(1, 1, 3)},
            {"class_names": ["background", "cow"]},
            "no category 'cow'",
        ),
        ({"category_id": 3, "segmentation": square(1, 1, 3)}, {"class_names": ["cat"]}, "put 'background' before it"),
    ],
)
def test_bad_annotations_are_refused_with_file_and_id(folder, annotation, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        coco_mask(folder, coco(folder, annotation), **changes)
    assert "coco.json" in str(caught.value) or "class_names" in str(caught.value)


def test_a_coco_file_of_other_sizes_or_no_file_is_refused(folder):
    path = coco(folder, {"category_id": 3, "segmentation": square(1, 1, 3)})
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(folder / "pictures" / "one.png")
    with pytest.raises(InputError, match="says that one.png is 20 x 30 pixels, and the file is 9 x 9"):
        coco_mask(folder, path)
    with pytest.raises(InputError, match="gone.json: no such file"):
        coco_mask(folder, str(folder / "gone.json"))
