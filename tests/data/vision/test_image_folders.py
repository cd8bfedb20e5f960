"""Folders as sources: a folder for each class, the class in the file's name, and parts in folders of their own."""

import pytest

from lightning_bigmodels.data.vision.sources_folders import read_folder
from lightning_bigmodels.errors import InputError
from tests.toy_pictures import write, write_folders


def listed(part):
    """Return (file's name, class) of each example."""
    names = [part.pictures.name(row).rpartition("/")[2] for row in part.rows]
    return [(name, *part.names_of(index)) for index, name in enumerate(names)]


def test_a_folder_for_each_class(tmp_path):
    write_folders(tmp_path, {"dog": 2, "cat": 1})
    write(tmp_path / "cat" / "inner" / "9.png")
    (tmp_path / ".git").mkdir()
    (tmp_path / "readme.txt").write_text("about")
    parts = read_folder(tmp_path)
    assert list(parts) == ["train"]
    assert parts["train"].class_names == ["cat", "dog"]
    assert listed(parts["train"]) == [("000.png", "cat"), ("9.png", "cat"), ("000.png", "dog"), ("001.png", "dog")]


def test_numbers_are_sorted_as_numbers(tmp_path):
    write_folders(tmp_path, {"10": 1, "9": 1, "1": 1})
    assert read_folder(tmp_path)["train"].class_names == ["1", "9", "10"]


def test_the_class_in_the_name(tmp_path):
    for name in ("3.jpg", "3.0017.png", "cat.12.jpg", "cat.dog.webp"):
        write(tmp_path / name)
    part = read_folder(tmp_path)["train"]
    assert listed(part) == [("3.0017.png", "3"), ("3.jpg", "3"), ("cat.12.jpg", "cat"), ("cat.dog.webp", "cat")]


def test_parts_in_folders(tmp_path):
    write_folders(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folders(tmp_path / "valid", {"dog": 1})
    write(tmp_path / "Test" / "cat.1.png")
    parts = read_folder(tmp_path)
    assert {name: len(part) for name, part in parts.items()} == {"train": 5, "val": 1, "test": 1}
    assert listed(parts["test"]) == [("cat.1.png", "cat")]


def test_a_class_may_be_called_test(tmp_path):
    write_folders(tmp_path, {"test": 1, "rest": 1})
    assert read_folder(tmp_path)["train"].class_names == ["rest", "test"]


def test_what_is_wrong_is_named(tmp_path):
    write_folders(tmp_path / "a", {"cat": 1})
    (tmp_path / "a" / "dog").mkdir()
    with pytest.raises(
        InputError, match=r"a/dog holds no picture \(.*\): its class has no example; add some or remove"
    ):
        read_folder(tmp_path / "a")
    write(tmp_path / "b" / "loose.png")
    write_folders(tmp_path / "b", {"cat": 1})
    with pytest.raises(InputError, match=r"b holds pictures \(loose\.png\) beside folders \(cat\); move every picture"):
        read_folder(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match=r"c holds no picture"):
        read_folder(tmp_path / "c")
