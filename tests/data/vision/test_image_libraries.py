"""Data sets of torchvision and of Hugging Face, from local folders."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.data.vision.sources_hub import read_hub
from lightning_bigmodels.data.vision.sources_tables import Columns
from lightning_bigmodels.data.vision.sources_torchvision import dataset_names, read_torchvision
from lightning_bigmodels.errors import InputError
from tests.toy_pictures import pixels, write, write_folders


def write_idx(path, array, compress):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


GRAY = np.arange(4 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(4, 28, 28)


@pytest.mark.parametrize("published", [False, True])
def test_fashion_mnist_as_torchvision_keeps_it_or_as_it_was_published(tmp_path, published):
    folder = tmp_path if published else tmp_path / "FashionMNIST" / "raw"
    for part, rows in {"train": slice(None), "t10k": slice(1, 3)}.items():
        labels = np.array([9, 0, 3, 9], dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", GRAY[rows], published)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels[rows], published)
    parts = read_torchvision("FashionMNIST", tmp_path, download=False)
    assert list(parts) == ["train", "test"]
    train = parts["train"]
    assert [train.names_of(index) for index in range(4)] == [["Ankle boot"], ["T-shirt/top"], ["Dress"], ["Ankle boot"]]
    for channels in (1, 3):
        picture = parts["test"].pictures.read(1, channels)
        assert torch.equal(picture, torch.from_numpy(GRAY[2]).expand(channels, 28, 28))
    assert train.pictures.digest(2) == parts["test"].pictures.digest(1) != train.pictures.digest(3)


def test_cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        with (folder / name).open("wb") as file:
            pickle.dump({"data": data, "labels": [8, 0]}, file)
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": ["airplane", *"1234567", "ship", "truck"]}, file)
    with pytest.raises(
        InputError, match=r"CIFAR10 is not in .* \(Dataset not found or corrupted\); set data\.root to the folder"
    ):
        read_torchvision("CIFAR10", tmp_path, download=False)  # not the published bytes
    from torchvision.datasets import CIFAR10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        parts = read_torchvision("CIFAR10", tmp_path, download=False)
    assert (len(parts["train"]), len(parts["test"])) == (10, 2)
    assert parts["train"].class_names == ["airplane", "ship"]
    assert parts["train"].labels.tolist() == [1, 0] * 5
    assert parts["test"].pictures.name(1) == "torchvision:CIFAR10@test[1]"
    expected = torch.from_numpy(data[1].reshape(3, 32, 32))
    assert torch.equal(parts["train"].pictures.read(1, 3), expected)


def test_files_in_parts_that_torchvision_calls_otherwise(tmp_path):
    for split in ("train", "valid", "test"):
        write_folders(tmp_path / "country211" / split, {"AD": 1, "ZW": 2}, suffix=".jpg")
    parts = read_torchvision("Country211", tmp_path, download=False)
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "val": 3, "test": 3}
    assert parts["val"].class_names == ["AD", "ZW"]
    assert parts["val"].pictures.read(2, 3).shape == (3, 12, 16)
    (tmp_path / "country211" / "train" / "AD" / "000.jpg").write_bytes(b"text")
    with pytest.raises(InputError, match=r"torchvision:Country211@train\[0\] cannot be read \(cannot identify"):
        parts["train"].pictures.read(0, 3)


def test_wrong_names_are_refused(tmp_path):
    assert {"CIFAR100", "SVHN", "STL10", "Food101", "KMNIST", "OxfordIIITPet"} < set(dataset_names())
    with pytest.raises(
        InputError, match=r"no data set 'FashonMNIST' that a root alone describes; did you mean 'Fashion"
    ):
        read_torchvision("FashonMNIST", tmp_path, download=False)
    with pytest.raises(
        InputError, match=r"FashionMNIST is not in .*; set data\.root to the folder it is in, or data\.do"
    ):
        read_torchvision("FashionMNIST", tmp_path, download=False)
    for name in ("Kitti/raw/training/image_2", "Kitti/raw/training/label_2"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / "Kitti/raw/training/image_2/0.png")
    (tmp_path / "Kitti/raw/training/label_2/0.txt").write_text("")
    with pytest.raises(
        InputError, match=r"Kitti@train does not have one class for each picture; name another data set"
    ):
        read_torchvision("Kitti", tmp_path, download=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that reads a folder as a data set of Hugging Face."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def read(name, **columns):
        return read_hub(f"hub:{tmp_path}/set{name}", Columns(**columns))

    return read


def test_an_image_folder(tmp_path, hub):
    write_folders(tmp_path / "set" / "train", {"cat": 2, "dog": 1})
    write_folders(tmp_path / "set" / "test", {"cat": 1, "dog": 1})
    parts = hub("")
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "test": 2}
    train = parts["train"]
    assert sorted(train.names_of(index)[0] for index in range(3)) == ["cat", "cat", "dog"]
    dog = next(index for index in range(3) if train.names_of(index) == ["dog"])
    assert torch.equal(train.pictures.read(dog, 3), torch.from_numpy(pixels(1, 0)).permute(2, 0, 1))
    assert train.pictures.name(dog) == str(tmp_path / "set" / "train" / "dog" / "000.png")
    assert len(set(map(train.pictures.digest, range(3)))) == 3
    assert list(hub("@test")) == ["train"]
    assert len(hub("@train[:2]")["train"]) == 2
    with pytest.raises(
        InputError, match=r"set@train: no column 'lable'; did you mean 'label'\?; set data\.label_column"
    ):
        hub("", label="lable")
    with pytest.raises(InputError, match=r"set@nope cannot be loaded \(.*\); check hub:<name>\[:<configuration>\]"):
        hub("@nope")


def test_pictures_in_parquet_with_groups(tmp_path, hub):
    import datasets

    rows = {"pic": [Image.fromarray(pixels(0, n)) for n in range(3)], "label": [1, 0, 1], "sex": ["f", "m", "m"]}
    kinds = {"pic": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a"]), "sex": datasets.Value("string")}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "set" / "train.parquet")
    part = hub("", group="sex")["train"]
    assert part.class_names == ["z", "a"]  # in the order that the data set declares
    assert (part.labels.tolist(), part.groups.tolist(), part.group_names) == ([1, 0, 1], [0, 1, 1], ["f", "m"])
    assert torch.equal(part.pictures.read(2, 3), torch.from_numpy(pixels(0, 2)).permute(2, 0, 1))
    assert part.pictures.name(2).endswith("set@train, row 2")
    assert part.pictures.digest(2) != part.pictures.digest(1)


def test_several_labels_a_picture(tmp_path, hub):
    import datasets

    names = datasets.ClassLabel(names=["z", "a", "m"])
    kinds = {"image": datasets.Image(), "label": datasets.Sequence(names)}
    rows = {"image": [Image.fromarray(pixels(0, n)) for n in range(2)], "label": [[2, 0], []]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "set" / "train.parquet")
    part = hub("", label_separator=",")["train"]
    assert part.class_names == ["z", "m"]
    assert part.labels.tolist() == [[True, True], [False, False]]


def test_a_data_set_without_pictures_or_training_part_is_refused(tmp_path, hub):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"label": "a"}\n')
    with pytest.raises(InputError, match=r"set has no split train but test; name one of them behind an @"):
        hub("")
    with pytest.raises(InputError, match=r"set@test has 0 columns of pictures; name a data set with one"):
        hub("@test")
