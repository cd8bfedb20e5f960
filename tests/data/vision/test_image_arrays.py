"""Arrays as sources: scikit-learn's digits, NumPy's files, and MNIST's."""

import gzip
import struct

import numpy as np
import pytest
import torch

from lightning_bigmodels.data.vision.pictures import ArrayPictures
from lightning_bigmodels.data.vision.sources_arrays import has_idx, read_digits, read_idx, read_numpy
from lightning_bigmodels.errors import InputError

GRAY = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)
COLOURS = np.stack([GRAY, GRAY + 50, GRAY + 100], axis=-1)
LABELS = np.array([1, 0, 0, 1])


def names(part):
    return [part.names_of(index) for index in range(len(part))]


def test_digits():
    digits = read_digits()
    assert len(digits) == 1797
    assert digits.class_names == [str(number) for number in range(10)]
    assert digits.counts().min() >= 174
    picture = digits.pictures.read(0, 1)
    assert (picture.shape, picture.dtype, int(picture.max())) == ((1, 8, 8), torch.uint8, 239)
    assert digits.pictures.name(7) == "sklearn-digits[7]"


@pytest.mark.parametrize(("array", "channels"), [(GRAY, 1), (COLOURS, 3)])
def test_pictures_in_an_array(array, channels):
    pictures = ArrayPictures("a.npy", array)
    expected = torch.from_numpy(array[2] if channels == 3 else array[2][..., None]).permute(2, 0, 1)
    assert torch.equal(pictures.read(2, channels), expected)
    other = pictures.read(2, 4 - channels)
    assert other.shape == (4 - channels, 2, 3)
    # luma of (v, v + 50, v + 100): 0.587 * 50 + 0.114 * 100 = 40.75
    assert torch.equal(other[0].int(), expected[0].int() + (41 if channels == 3 else 0))
    assert pictures.digest(2) == ArrayPictures("b", array[2:]).digest(0) != pictures.digest(1)
    pictures.read(2, channels).fill_(0)
    assert torch.equal(pictures.read(2, channels), expected)
    with pytest.raises(
        InputError, match=rf"a\.npy\[2\]: the picture has {channels} channels and 5 are wanted; set cha"
    ):
        pictures.read(2, 5)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": GRAY, "labels": LABELS}, {"train": ["1", "0", "0", "1"]}),
        ({"images": COLOURS, "labels": LABELS[:, None], "class_names": ["cat", "dog"]}, {"train": "dog cat cat dog"}),
        ({"images": GRAY, "labels": np.array(["b", "a", "b", "b"])}, {"train": ["b", "a", "b", "b"]}),
        (
            {"train_images": GRAY, "train_labels": LABELS, "val_images": GRAY[:1], "val_labels": LABELS[:1]},
            {"train": ["1", "0", "0", "1"], "val": ["1"]},
        ),
        (
            {"x_train": GRAY, "y_train": LABELS, "x_test": GRAY[1:2], "y_test": LABELS[1:2]},
            {"train": ["1", "0", "0", "1"], "test": ["0"]},
        ),
    ],
)
def test_npz(tmp_path, arrays, expected):
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    parts = read_numpy(tmp_path / "a.npz")
    wanted = {part: value.split() if isinstance(value, str) else value for part, value in expected.items()}
    assert {part: [name for (name,) in names(one)] for part, one in parts.items()} == wanted


def test_npz_with_several_labels(tmp_path):
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    np.savez(tmp_path / "a.npz", images=GRAY, labels=labels, class_names=["x", "y", "z"])
    assert names(read_numpy(tmp_path / "a.npz")["train"]) == [["x", "z"], [], ["y"], ["x", "y", "z"]]


def test_npy_is_mapped_from_the_file(tmp_path):
    np.save(tmp_path / "my_images.npy", COLOURS)
    np.save(tmp_path / "my_labels.npy", LABELS)
    part = read_numpy(tmp_path / "my_images.npy")["train"]
    assert isinstance(part.pictures.array, np.memmap)
    assert torch.equal(part.pictures.read(3, 3), torch.from_numpy(COLOURS[3]).permute(2, 0, 1))
    assert names(part) == [["1"], ["0"], ["0"], ["1"]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": GRAY}, r"a\.npz holds pictures; save the arrays images and labels, or train_images"),
        ({"images": GRAY / 255, "labels": LABELS}, r"a\.npz:images holds pictures of float64; save them as uint8"),
        (
            {"images": GRAY[0], "labels": LABELS},
            r"an array of shape \(2, 3\); save pictures as \(N, H, W\[, channels\]\)",
        ),
        ({"images": GRAY, "labels": LABELS[:3]}, r"holds 4 pictures and 3 labels; give each picture one"),
        ({"images": GRAY[:0], "labels": LABELS[:0]}, r"holds no picture; save some"),
        ({"images": GRAY, "labels": LABELS / 2}, r"has labels of float64; save them as whole numbers or as names"),
        ({"images": GRAY, "labels": LABELS, "class_names": ["a"]}, r"has the label 1, which none of the 1 class_names"),
        ({"images": GRAY, "labels": LABELS - 1, "class_names": ["a", "b"]}, r"has the label -1, .*; number the labels"),
        (
            {"images": GRAY, "labels": np.tile(LABELS * 2, (2, 1)).T},
            r"several labels a picture that are not all 0 or 1",
        ),
        (
            {"images": GRAY, "labels": np.tile(LABELS, (2, 1)).T, "class_names": ["a"]},
            r"has 2 columns of labels and 1 class_names; match them",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_numpy(tmp_path / "a.npz")


def test_files_that_are_not_numpys_are_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"text")
    with pytest.raises(InputError, match=r"a\.npz is no NumPy file of plain arrays \(.*\); write it again"):
        read_numpy(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.array([{}], dtype=object), labels=LABELS)
    with pytest.raises(InputError, match=r"b\.npz is no NumPy file of plain arrays"):
        read_numpy(tmp_path / "b.npz")
    np.save(tmp_path / "x.npy", GRAY)
    with pytest.raises(
        InputError, match=r"x\.npy: call it images\.npy, and the file of its labels beside it labels\.n"
    ):
        read_numpy(tmp_path / "x.npy")
    np.save(tmp_path / "images.npy", GRAY)
    with pytest.raises(InputError, match=r"images\.npy has no labels: there is no file .*labels\.npy; write one"):
        read_numpy(tmp_path / "images.npy")


def write_idx(path, array, compress):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path = path.with_name(path.name + ".gz") if compress else path
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_mnists_own_files(tmp_path, compress):
    assert not has_idx(tmp_path)
    labels = LABELS.astype(np.uint8)
    for part, rows in {"train": slice(None), "t10k": slice(1, 3)}.items():
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", GRAY[rows], compress)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels[rows], compress)
    assert has_idx(tmp_path)
    parts = read_idx(tmp_path, ["shirt", "shoe"])
    assert {part: [name for (name,) in names(one)] for part, one in parts.items()} == {
        "train": ["shoe", "shirt", "shirt", "shoe"],
        "test": ["shirt", "shirt"],
    }
    assert torch.equal(parts["test"].pictures.read(1, 1), torch.from_numpy(GRAY[2])[None])


def test_broken_files_of_mnist_are_named(tmp_path):
    path = write_idx(tmp_path / "train-images-idx3-ubyte", GRAY, compress=False)
    with pytest.raises(InputError, match=r"no file .*train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz beside it"):
        read_idx(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte is no whole file of MNIST's format; fetch it again"):
        read_idx(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"is no whole file of MNIST's format"):
        read_idx(tmp_path)
    path.unlink()
    path = write_idx(path, GRAY, compress=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz cannot be read \(.*\); fetch it again"):
        read_idx(tmp_path)
