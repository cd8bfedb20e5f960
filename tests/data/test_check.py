"""A check tells of every file what is wrong with it, and of all together; it keeps no file in memory."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from lightning_bigmodels.data import Text
from lightning_bigmodels.data.check import Inspector
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.examples import Examples
from lightning_bigmodels.errors import InputError, RunError, noting_refusals, refuse


class Notes(Examples[str]):
    """Text files in folders that are their classes; what says `bad` is broken; two examples are made of each."""

    def __init__(self, folder):
        super().__init__()
        self.files = sorted(folder.rglob("*.txt"))

    def __len__(self):
        return 2 * len(self.files)

    def distinct(self):
        return range(0, len(self), 2)

    def name(self, index):
        return str(self.files[index // 2])

    def classes(self, index):
        return [self.files[index // 2].parent.name]

    def read(self, index):
        content = self.files[index // 2].read_text()
        if content == "bad":
            raise InputError(f"{self.name(index)} is broken; replace it")
        if content == "kill":
            os._exit(9)
        return content

    def prepare(self, example, epoch):
        raise AssertionError("a check augments nothing")

    filler = prepare

    def collate(self, indices, examples):
        raise AssertionError("a check makes no batches")


class NoteData(VisionData):
    def __init__(self, folder, class_names=(), on_error="error"):
        super().__init__(1, None, 0, 0, on_error)
        self.folder, self.class_names = folder, list(class_names)

    def make_parts(self, stage):
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder; correct it")
        for stray in sorted(self.folder.glob("*.txt")):
            refuse(f"{stray} is in no folder; move it")
        if stage == "test" and not (self.folder / "test").is_dir():
            raise InputError("there is no test part; make one")
        return {path.name: Notes(path) for path in sorted(self.folder.iterdir()) if path.is_dir()}

    def example_batch(self, batch_size):
        return {}


def write(folder, **files):
    """Write files given as part__class__name=content."""
    for key, content in files.items():
        path = Path(folder, *key.split("__")).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def inspect(data, num_workers=0):
    inspector = Inspector(num_workers)
    data.inspect(inspector)
    return inspector, [(f.level, f.kind, f.part, Path(f.file).name if f.file else "") for f in inspector.findings()]


@pytest.fixture
def folder(tmp_path):
    many = {f"train__b__{number}": f"b{number}" for number in range(22)}
    return write(
        tmp_path / "notes",
        **many,
        train__a__one="1",
        train__a__copy="1",
        train__b__other="1",
        train__b__broken="bad",
        val__a__leak="1",
        val__c__strange="c",
        test__b__leak="b3",
        test__b__same="c",
        test__a__fine="fine",
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_file_and_all_together(folder, num_workers):
    inspector, found = inspect(NoteData(folder, ["a", "b", "d"]), num_workers)
    assert inspector.counts == {"train": 26, "val": 2, "test": 3}
    assert inspector.classes["train"] == {"a": 2, "b": 23}
    assert found == [
        ("error", "class", "train", ""),
        ("error", "class", "val", ""),
        ("error", "leak", "val", "leak.txt"),
        ("error", "leak", "test", "leak.txt"),
        ("error", "unreadable", "train", "broken.txt"),
        ("warning", "class", "val", ""),
        ("warning", "contradiction", "train", "other.txt"),
        ("warning", "duplicate", "train", "one.txt"),
        ("warning", "imbalance", "train", ""),
        ("warning", "leak", "test", "same.txt"),
    ]


def test_its_words_name_the_files_and_the_remedy(folder):
    inspector, _ = inspect(NoteData(folder, ["a", "b", "d"]))
    messages = [finding.message.replace(f"{folder}/", "") for finding in inspector.findings()]
    assert messages == [
        "no training example of class 'd'; add some, or remove the class",
        "1 examples of the val part are of class 'c', which no training example has; correct their label or add "
        "training examples",
        "val/a/leak.txt is a copy of train/a/copy.txt of the train part; remove one of them",
        "test/b/leak.txt is a copy of train/b/3.txt of the train part; remove one of them",
        "train/b/broken.txt is broken; replace it",
        "no val example of class 'b': nothing is measured for it; add some",
        "train/b/other.txt is a copy of train/a/copy.txt, and one is labelled 'b', the other 'a'; correct one label "
        "and remove one of them",
        "train/a/one.txt is a copy of train/a/copy.txt; remove one of them unless it is to count twice",
        "23 training examples of class 'b' and 2 of 'a': more than 10 to 1; look at the metrics of each class, and "
        "weigh classes or add examples",
        "test/b/same.txt is a copy of val/c/strange.txt of the val part; remove one of them",
    ]


def test_ten_to_one_is_no_imbalance(tmp_path):
    folder = write(tmp_path, train__a__0="x", **{f"train__b__{number}": f"{number}" for number in range(10)})
    assert inspect(NoteData(folder))[1] == [("error", "setup", "", "")]  # no test part
    write(tmp_path, train__b__more="more")
    assert ("warning", "imbalance", "train", "") in inspect(NoteData(folder))[1]


def test_what_a_run_skips_is_a_warning(folder):
    data = NoteData(folder, on_error="skip")
    assert ("warning", "unreadable", "train", "broken.txt") in inspect(data)[1]
    assert data.on_error == "skip"


def test_what_setup_refuses_is_told_with_all_the_rest(folder):
    (folder / "stray.txt").write_text("x")
    (folder / "lost.txt").write_text("x")
    shutil.rmtree(folder / "test")
    data = NoteData(folder)
    inspector, found = inspect(data)
    assert [f.message.replace(f"{folder}/", "") for f in inspector.findings() if f.kind == "setup"] == [
        "lost.txt is in no folder; move it",
        "stray.txt is in no folder; move it",
        "there is no test part; make one",
    ]
    assert ("error", "unreadable", "train", "broken.txt") in found
    assert data.on_error == "error"
    with pytest.raises(InputError, match=r"lost.txt is in no folder; move it"):
        data.make_parts("fit")


def test_data_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(InputError, match="no such folder; correct it"):
        inspect(NoteData(tmp_path / "gone"))


def test_a_killed_process_is_named(tmp_path):
    folder = write(tmp_path, train__a__0="kill", test__a__1="x")
    with pytest.raises(RunError, match="a process that reads files was killed.*set a smaller --num_workers"):
        inspect(NoteData(folder), num_workers=1)


def test_refusals_are_noted_only_while_they_are_wanted():
    with noting_refusals() as noted:
        refuse("one")
        refuse("two")
    assert noted == ["one", "two"]
    with pytest.raises(InputError, match="three"):
        refuse("three")


# ---- text


def text_of(folder, **changes):
    return Text(str(folder), cache_dir=str(folder / "cache"), **changes)


def test_documents_of_every_kind(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text(" one\n")
    (folder / "c.txt").write_bytes("fine\nline\ncaf\xe9\n".encode("latin-1"))
    (folder / "d.txt").write_text("  \n")
    lines = [json.dumps({"text": "two"}), "{", json.dumps({"text": ""}), json.dumps({"txt": "x"}), '{"text": "one"}']
    (folder / "e.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "f.txt.gz").write_bytes(gzip.compress(b"three " * 100)[:-20])
    inspector, found = inspect(text_of(folder, val_fraction=0.0), num_workers=2)
    assert inspector.unit == "documents"
    assert found == [
        ("error", "unreadable", "train", "c.txt"),
        ("error", "unreadable", "train", "e.jsonl, line 2"),
        ("error", "unreadable", "train", "e.jsonl, line 4"),
        ("error", "unreadable", "train", "f.txt.gz"),
        ("warning", "duplicate", "train", "b.txt"),
        ("warning", "duplicate", "train", "e.jsonl, line 5"),
        ("warning", "empty", "train", "d.txt"),
        ("warning", "empty", "train", "e.jsonl, line 3"),
    ]
    assert "c.txt, line 3: byte 13 (0xe9) of the file is not utf-8" in inspector.findings()[0].message


def test_leaks_across_a_fraction_and_a_source_of_its_own(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{number} " * 50)
    shutil.copy(folder / "2.txt", folder / "9.txt")
    other = tmp_path / "other.txt"
    shutil.copy(folder / "3.txt", other)
    inspector, found = inspect(text_of(folder, val_fraction=0.2, test_sources=str(other)))
    assert inspector.counts == {"train": 8, "val": 2, "test": 1}
    assert found == [("error", "leak", "val", "9.txt"), ("error", "leak", "test", "other.txt")]


def test_text_that_cannot_be_checked(tmp_path):
    with pytest.raises(InputError, match="there is no file or folder"):
        inspect(text_of(tmp_path / "gone"))
    with pytest.raises(InputError, match="check reads data.sources; leave data.shards out"):
        inspect(Text(shards=str(tmp_path)))


def test_the_texts_in_every_python_are_read():
    inspector, _ = inspect(Text("python-docs", val_fraction=0.1))
    assert inspector.counts["train"] > 50
    assert inspector.counts["val"] > 2
