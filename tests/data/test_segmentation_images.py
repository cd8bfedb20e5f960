"""Pictures with masks: pairs by name, parts, batches, generated and public layouts."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.data import SegmentationImages
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.palette import class_color
from tests.data.masked_pictures import agreement, as_picture, draw, open_data, read_all, write, write_folder


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


# ---- batches


def test_batches_are_those_that_are_declared(folder):
    data = open_data(folder, test_fraction=0.2)
    batch, example = next(iter(data.train_dataloader())), data.example_batch(4)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        key: (value.shape, value.dtype) for key, value in example.items()
    }
    for image, mask in zip(batch["images"], batch["masks"], strict=True):
        assert agreement(image, mask) > 0.9


def test_what_is_drawn_belongs_to_seed_epoch_and_place(folder):
    part = open_data(folder).parts["train"]
    twice = [part.__getitems__([(1, 3), (0, 2)]), part.__getitems__([(0, 2), (1, 3)])]
    assert torch.equal(twice[0]["images"], twice[1]["images"].flip(0))
    assert torch.equal(twice[0]["masks"], twice[1]["masks"].flip(0))
    assert not torch.equal(part.__getitems__([(0, 2)])["images"], part.__getitems__([(1, 2)])["images"])
    assert not torch.equal(
        part.__getitems__([(0, 2)])["images"], open_data(folder, seed=1).parts["train"].__getitems__([(0, 2)])["images"]
    )


def test_an_index_past_the_end_counts_for_nothing(folder):
    part = open_data(folder).parts["val"]
    batch = part.__getitems__([0, len(part)])
    assert batch["indices"].tolist() == [0, FILLER]
    assert (batch["masks"][1] == IGNORED).all()


def test_parts_by_fraction_are_exact_seeded_and_apart(folder):
    data = open_data(folder, val_fraction=0.3, test_fraction=0.2)
    names = {part: [examples.name(i) for i in range(len(examples))] for part, examples in data.parts.items()}
    assert {part: len(found) for part, found in names.items()} == {"train": 5, "val": 3, "test": 2}
    assert len(set().union(*names.values())) == 10
    again = open_data(folder, val_fraction=0.3, test_fraction=0.2)
    assert [again.parts["val"].name(i) for i in range(3)] == names["val"]
    other = open_data(folder, val_fraction=0.3, test_fraction=0.2, split_seed=1)
    assert [other.parts["val"].name(i) for i in range(3)] != names["val"]
    with pytest.raises(InputError, match="val_fraction 0.01 of 10 pictures is none"):
        open_data(folder, val_fraction=0.01)
    with pytest.raises(InputError, match="leave none for training"):
        open_data(folder, val_fraction=0.5, test_fraction=0.5)


def test_parts_by_lists_of_names_as_pascal_voc_has(folder):
    (folder / "train.txt").write_text("0\n1\n\n2\n")
    (folder / "val.txt").write_text("7\n5\n")
    (folder / "masks" / "9.png").unlink()  # in no list
    data = open_data(folder, train_names=str(folder / "train.txt"), val_names=str(folder / "val.txt"))
    assert [data.parts["val"].name(i) for i in range(2)] == [str(folder / "pictures" / f"{n}.png") for n in (7, 5)]
    assert len(data.parts["train"]) == 3
    (folder / "val.txt").write_text("17\n")
    with pytest.raises(InputError, match="has no picture named '17'; correct the list"):
        open_data(folder, val_names=str(folder / "val.txt"), train_names=str(folder / "train.txt"))
    (folder / "val.txt").write_text("\n")
    with pytest.raises(InputError, match=r"val.txt holds no name"):
        open_data(folder, val_names=str(folder / "val.txt"), train_names=str(folder / "train.txt"))


def test_parts_of_their_own_folders(folder):
    data = open_data(folder, val_source=str(folder / "pictures"), val_masks=str(folder / "masks"))
    assert len(data.parts["train"]) == len(data.parts["val"]) == 10


def test_predict_takes_a_bare_folder_and_knows_the_files_sizes(folder):
    write(folder / "new" / "below" / "b.jpg", as_picture(draw(0, 20, 80)))
    write(folder / "new" / "a.png", as_picture(draw(1, 90, 30)))
    data = SegmentationImages(predict_source=str(folder / "new"), image_size=[32, 48], eval_batch_size=3)
    data.setup("predict")
    assert data.class_names == []
    (batch,) = data.predict_dataloader()
    assert batch["files"] == ["a.png", "below/b.jpg"]
    assert batch["sizes"].tolist() == [[90, 30], [20, 80]]
    assert batch["regions"].tolist() == [[32, 11], [12, 48]]
    assert (batch["images"][1, :, 12:] == 0).all()
    one = SegmentationImages(predict_source=str(folder / "new" / "a.png"))
    one.setup("predict")
    assert len(one.parts["predict"]) == 1
    write(folder / "new" / "a.jpg", as_picture(draw(1)))
    with pytest.raises(InputError, match="have the same name but for the ending"):
        data.setup("predict")


def test_predict_without_a_folder_takes_the_test_part(folder):
    data = open_data(folder, "predict", test_fraction=0.2)
    assert len(data.parts["predict"]) == 2
    assert "sizes" in next(iter(data.predict_dataloader()))
    with pytest.raises(InputError, match="there is nothing to predict; set predict_source"):
        open_data(folder, "predict", val_fraction=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "source is not set"),
        ({"masks": None}, "has no masks; set data.masks"),
        ({"class_names": None}, "class_names is not set"),
        ({"class_values": [0, 1]}, "class_values has 2 entries for 3 classes"),
        ({"class_values": [0, 1, 1]}, "class_values has 1 twice"),
        ({"class_values": [0, 1, 255]}, "255 is both the value of a class and ignored"),
        ({"class_values": [0, 1, 70000]}, "the mask value 70000"),
        ({"class_colors": [[0, 0, 0], [1, 1, 1], [1, 1]]}, r"\[1, 1\] is no colour"),
        ({"image_size": 0}, "image_size is 0"),
        ({"scale_range": (2.0, 1.0)}, r"scale_range is \[2.0, 1.0\]"),
        ({"horizontal_flip": 1.5}, "horizontal_flip is 1.5"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"on_error": "stop"}, "on_error is 'stop'"),
        ({"source": "digits:no", "class_names": None}, "'no' is no number of canvases"),
        ({"source": "digits"}, "leave it out"),
        ({"source": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        open_data(folder, **changes)


# ---- Cityscapes and the digits


def cityscapes(folder):
    """Write the layout of Cityscapes, with four pictures for training and two for validation."""
    for part, numbers in {"train": range(4), "val": range(4, 6)}.items():
        for number in numbers:
            ids = np.array([0, 7, 26, 33], dtype=np.uint8)[draw(number, 20, 30) + (number == 0)]
            ids[0, 0] = 255  # a license plate
            name = f"town/town_{number:06d}_000019"
            write(folder / "leftImg8bit" / part / f"{name}_leftImg8bit.png", Image.new("RGB", (30, 20)))
            write(folder / "gtFine" / part / f"{name}_gtFine_labelIds.png", Image.fromarray(ids))
            write(folder / "gtFine" / part / f"{name}_gtFine_color.png", Image.new("RGB", (30, 20)))
    return folder


def test_cityscapes_ids_become_its_19_classes(tmp_path):
    data = SegmentationImages(source=str(cityscapes(tmp_path)), own_scale=True, image_size=[20, 30])
    data.setup("fit")
    assert len(data.class_names) == 19
    assert data.class_names[0] == "road"
    assert data.class_names[13] == "car"
    assert data.class_names[18] == "bicycle"
    assert [len(data.parts[name]) for name in ("train", "val")] == [4, 2]
    shifted = draw(0, 20, 30) + 1
    expected = torch.tensor([IGNORED, 0, 13, 18])[torch.from_numpy(shifted.astype(np.int64))]
    expected[0, 0] = IGNORED
    assert torch.equal(data.parts["train"].__getitems__([0])["masks"][0], expected)
    with pytest.raises(InputError, match="has no test part"):
        data.test_dataloader()


def test_a_cityscapes_id_that_is_none_is_refused(tmp_path):
    path = cityscapes(tmp_path) / "gtFine/train/town/town_000001_000019_gtFine_labelIds.png"
    Image.fromarray(np.full((20, 30), 40, dtype=np.uint8)).save(path)
    data = SegmentationImages(source=str(tmp_path))
    data.setup("fit")
    with pytest.raises(InputError, match="000001_000019_gtFine_labelIds.png has the value 40 at row 0, column 0"):
        data.parts["train"].__getitems__([1])


def test_the_digits_are_drawn_from_their_place_and_differ_between_parts():
    data = SegmentationImages(source="digits:20", own_scale=True, image_size=64, channels=1)
    data.setup("fit")
    assert [len(data.parts[name]) for name in ("train", "val", "test")] == [20, 2, 2]
    one, again = (data.parts["train"].__getitems__([3, 4]) for _ in range(2))
    assert torch.equal(one["images"], again["images"])
    assert one["images"].shape == (2, 1, 64, 64)
    assert (
        len({data.parts["train"].digest(i) for i in range(20)} | {data.parts["val"].digest(i) for i in range(2)}) == 22
    )
    masks = read_all(data, "train")["masks"]
    assert set(masks.unique().tolist()) <= set(range(11))
    assert 0.75 < (masks == 0).float().mean() < 0.95


def test_the_palette_is_pascal_vocs():
    assert [class_color(index) for index in (0, 1, 2, 15, 255)] == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (192, 128, 128),
        (224, 224, 192),
    ]
    assert len({class_color(index) for index in range(256)}) == 256
