"""Images: parts, batches, what is drawn at random, predictions on a bare folder, and broken input."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_bigmodels.data import Images
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from tests.toy_pictures import pixels, write, write_folders, write_truncated

PLAIN = {"image_size": [12, 16], "crop_scale": None, "horizontal_flip": 0.0, "batch_size": 4, "val_fraction": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("classes"), {"cat": 8, "dog": 12})


def images(source, stage="fit", **changes):
    data = Images(str(source), **{**PLAIN, **changes})
    data.setup(stage)
    return data


def test_batches_hold_the_pictures_and_their_classes(folder):
    data = images(folder)
    assert (data.class_names, data.multi_label, data.group_names) == (["cat", "dog"], False, None)
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 15, "val": 5}
    assert (data.num_train_samples, data.num_train_batches) == (15, 3)
    for loader, part in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        for batch in loader:
            assert set(batch) == {"images", "labels", "indices"}
            assert (batch["images"].dtype, batch["images"].shape[1:]) == (torch.uint8, (3, 12, 16))
            assert batch["images"].is_contiguous()
            for image, label, index in zip(batch["images"], batch["labels"], batch["indices"], strict=True):
                label, index = int(label), int(index)
                assert data.parts[part].classes(index) == [data.class_names[label]]
                number = int(data.parts[part].name(index)[-7:-4])
                assert torch.equal(image, torch.from_numpy(pixels(label, number)).permute(2, 0, 1))


def test_validation_comes_in_order_and_an_uneven_end_is_filled(folder):
    data = images(folder, eval_batch_size=3)
    assert [batch["indices"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2], [3, 4]]
    batch = data.parts["val"].__getitems__([4, 5])
    assert batch["indices"].tolist() == [4, FILLER]
    assert batch["labels"].tolist() == [1, IGNORED]


def test_parts_of_their_own(tmp_path, folder):
    write_folders(tmp_path, {"cat": 1, "dog": 2})
    data = images(folder, val_source=str(tmp_path), test_fraction=0.25)
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 15, "test": 5, "val": 3}
    both = images(folder, val_source=str(tmp_path), test_source=str(tmp_path), val_fraction=0.9, test_fraction=0.9)
    assert {name: len(part) for name, part in both.parts.items()} == {"train": 20, "val": 3, "test": 3}
    assert images(folder, val_fraction=0.0).val_dataloader() == []


def test_a_source_with_parts_keeps_them(tmp_path):
    write_folders(tmp_path / "train", {"a": 4, "b": 4})
    write_folders(tmp_path / "val", {"b": 1})
    data = images(tmp_path, test_fraction=0.25)
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 6, "val": 1, "test": 2}
    assert data.parts["val"].classes(0) == ["b"]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1]


def test_what_is_held_out_does_not_hang_on_the_seed_of_training(folder):
    files = [[one.name(index) for index in range(5)] for one in (images(folder, seed=s).parts["val"] for s in (0, 1))]
    assert files[0] == files[1]
    other = images(folder, split_seed=1).parts["val"]
    assert files[0] != [other.name(index) for index in range(5)]


AUGMENTED = {"image_size": 8, "crop_scale": (0.3, 1.0), "horizontal_flip": 0.5, "augmentations": [v2.RandAugment()]}


def epoch(data, number):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return {int(index): image for b in loader for index, image in zip(b["indices"], b["images"], strict=True)}


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    first = epoch(images(folder, **AUGMENTED), 1)
    torch.manual_seed(7)
    with_workers = epoch(images(folder, **AUGMENTED, num_workers=2, batch_size=5), 1)
    common = first.keys() & with_workers.keys()
    assert len(common) >= 10
    assert all(torch.equal(first[index], with_workers[index]) for index in common)
    for other in (epoch(images(folder, **AUGMENTED), 2), epoch(images(folder, **AUGMENTED, seed=1), 1)):
        common = first.keys() & other.keys()
        assert sum(torch.equal(first[index], other[index]) for index in common) <= 1
    data = images(folder, **AUGMENTED)
    before, after = (next(iter(data.val_dataloader()))["images"] for _ in range(2))
    assert torch.equal(before, after)


def test_sizes_grow_with_epochs(folder):
    data = images(folder, image_size=12, progressive_sizes={0: 8, 2: [10, 12]})
    shapes = [next(iter(epoch(data, number).values())).shape for number in (0, 1, 2)]
    assert shapes == [(3, 8, 8), (3, 8, 8), (3, 10, 12)]
    assert next(iter(data.val_dataloader()))["images"].shape == (4, 3, 12, 12)
    # also what stands for a file that was left out
    assert data.parts["train"].filler(0).image.shape == (3, 8, 8)
    # a plan has room for the largest
    assert data.example_batch(2)["images"].shape == (2, 3, 10, 12)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_batch_is_like_a_real_one(folder, channels):
    data = images(folder, channels=channels)
    real, example = next(iter(data.train_dataloader())), Images(**PLAIN, channels=channels).example_batch(4)
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}


@pytest.fixture
def table(tmp_path):
    """Return a function that writes rows of path, label and group, with a picture for each."""

    def make(rows, header="path,label,sex"):
        lines = [f"{write(tmp_path / f'{n}.png', n % 2, n).name},{row}" for n, row in enumerate(rows)]
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *lines]) + "\n")
        return path

    return make


def test_several_labels_and_groups(table):
    rows = [f"{row},{sex}" for row in ("cat|dog", "cat", "", "dog") for sex in ("f", "m")] * 2
    data = images(table(rows), label_separator="|", group_column="sex", val_fraction=0.0)
    assert (data.multi_label, data.class_names, data.group_names) == (True, ["cat", "dog"], ["f", "m"])
    batch = data.parts["train"].__getitems__([0, 3, 5, 16])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[1, 1], [1, 0], [0, 0], [IGNORED, IGNORED]]
    assert batch["groups"].tolist() == [0, 1, 1, IGNORED]
    example = data.example_batch(3)
    assert (example["labels"].shape, example["labels"].dtype) == ((3, 2), torch.float32)


def test_columns_of_labels_are_known_without_a_disk(table):
    data = Images(label_column=["cat", "dog", "cow"])
    assert (data.multi_label, data.example_batch(2)["labels"].shape) == (True, (2, 3))
    data = images(table(["1,0", "1,1", "0,1", "0,0"] * 4, "path,cat,dog"), label_column=["cat", "dog"])
    assert len(data.parts["val"]) == 4


def test_a_bare_folder_is_predicted_without_training_data(tmp_path):
    for number in range(3):
        write(tmp_path / "new" / f"{number}.png", number)
    data = Images("gone", predict_source=str(tmp_path / "new"), **PLAIN)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["files"] == [str(tmp_path / "new" / f"{number}.png") for number in range(3)]
    assert batch["labels"].tolist() == [IGNORED] * 3
    assert data.class_names == []
    assert data.parts["predict"].classes(0) == []
    one = Images(predict_source=str(tmp_path / "new" / "1.png"), **PLAIN)
    one.setup("predict")
    assert torch.equal(next(iter(one.predict_dataloader()))["images"], batch["images"][1:2])


def test_without_a_folder_the_held_out_part_is_predicted(folder):
    data = images(folder, "predict", test_fraction=0.2)
    assert [data.parts["predict"].name(i) for i in range(4)] == [data.parts["test"].name(i) for i in range(4)]
    assert "files" in next(iter(data.predict_dataloader()))
    assert len(images(folder, "predict").parts["predict"]) == 5
    with pytest.raises(InputError, match=r"nothing to predict; set data\.predict_source to a folder of pictures"):
        images(folder, "predict", val_fraction=0.0)


@pytest.fixture
def damaged(tmp_path):
    write_folders(tmp_path, {"cat": 4, "dog": 4}, suffix=".jpg")
    return write_truncated(tmp_path / "cat" / "broken.jpg").parents[1]


def test_a_broken_file_is_an_error(damaged):
    data = images(damaged, val_fraction=0.0, batch_size=9)
    with pytest.raises(
        InputError, match=r"broken\.jpg is damaged or cut off \(.*truncated.*\); replace or remove the f"
    ):
        next(iter(data.train_dataloader()))


def test_a_broken_file_may_be_left_out(damaged):
    data = images(damaged, val_fraction=0.0, batch_size=9, on_error="skip", crop_scale=(0.5, 1.0))
    batch = next(iter(data.train_dataloader()))
    (error,) = batch["errors"]
    assert "broken.jpg is damaged" in error
    (place,) = (batch["indices"] == FILLER).nonzero().flatten().tolist()
    assert batch["labels"][place] == IGNORED
    assert batch["images"][place].count_nonzero() == 0
    assert sorted(batch["labels"].tolist()) == [IGNORED, *[0] * 4, *[1] * 4]


def test_a_missing_file_of_a_table_may_be_left_out(tmp_path, table):
    path = table(["cat,f", "dog,m"] * 2)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"table\.csv, line 3: there is no file .*1\.png"):
        images(path)
    data = images(path, on_error="skip", val_fraction=0.0)
    assert len(next(iter(data.train_dataloader()))["errors"]) == 1


def test_pictures_of_every_kind_in_one_batch(tmp_path):
    write(tmp_path / "cat.png", mode="RGBA")
    write(tmp_path / "dog.png", mode="L")
    write(tmp_path / "cow.png", mode="P")
    Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16)).save(tmp_path / "owl.png")
    batch = next(iter(images(tmp_path, val_fraction=0.0).train_dataloader()))
    assert (batch["images"].shape, batch["images"].dtype) == ((4, 3, 12, 16), torch.uint8)


def test_copies_have_one_digest(tmp_path):
    write_folders(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "dog" / "copy.png").write_bytes((tmp_path / "cat" / "001.png").read_bytes())
    part = images(tmp_path, val_fraction=0.0).parts["train"]
    digests = [part.digest(index) for index in range(len(part))]
    assert len(set(digests)) == len(digests) - 1
    assert part.digest(1) == part.digest(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, r"data\.source is not set; name a folder that holds a folder of pictures for each class"),
        (
            {"source": "gone"},
            r"there is no source gone; name a folder of pictures, a file \(\.csv, \.tsv, .* or \.npz\)",
        ),
        ({"source": "sklearn-digit"}, r"there is no source sklearn-digit; did you mean 'sklearn-digits'\?; name a"),
        ({"val_source": "gone"}, r"there is no source gone"),
        ({"image_size": 0}, r"image_size holds 0; give one number of 1 or more, or two: height and width"),
        ({"image_size": [8, 8, 8]}, r"image_size holds \[8, 8, 8\]; give one number"),
        ({"progressive_sizes": {0: -1}}, r"progressive_sizes holds -1"),
        ({"channels": 0}, r"channels is 0; set it to 1 or more"),
        ({"crop_padding": -1}, r"crop_padding is -1; set it to 0 or more"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0; set it from 0 to below 1"),
        ({"on_error": "warn"}, r"on_error is 'warn'; set it to error or skip"),
        ({"augmentations": [v2.CenterCrop(2)]}, r"data\.augmentations: CenterCrop makes"),
    ],
)
def test_wrong_arguments_are_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        Images(**{"source": str(folder), **PLAIN, **changes}).setup("fit")


def test_wrong_files_are_refused(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt is no source of labelled pictures; name a folder, \.csv, \.tsv"):
        images(tmp_path / "notes.txt")
    write_folders(tmp_path / "val", {"cat": 1, "fox": 1})
    with pytest.raises(
        InputError, match=r"fox/000\.png of the val part has the class 'fox', which no training example"
    ):
        images(folder, val_source=str(tmp_path / "val"))
    with pytest.raises(
        InputError, match=r"Images has no test part; set data\.test_source, or data\.test_fraction above"
    ):
        images(folder).test_dataloader()
