"""Tables as sources: one label or several, groups, parts; a wrong line is named."""

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lightning_bigmodels.data.vision.sources_tables import Columns, read_labelled_table
from lightning_bigmodels.errors import InputError
from tests.toy_pictures import write


@pytest.fixture
def table(tmp_path):
    """Return a function that writes a table beside three pictures and reads it."""
    for name in ("a", "b", "c"):
        write(tmp_path / "pictures" / f"{name}.png")

    def read(content, name="table.csv", root=None, check_files=True, **columns):
        path = tmp_path / name
        if isinstance(content, dict):
            parquet.write_table(pyarrow.table(content), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_labelled_table(path, Columns(**columns), root, check_files)

    return read


PATHS = [f"pictures/{name}.png" for name in "abc"]
ROWS = "path,label\npictures/a.png,cat\n\npictures/b.png, dog \npictures/c.png,cat\n"


def names(part):
    return [part.names_of(index) for index in range(len(part))]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (ROWS, "a.csv"),
        ("\ufeff" + ROWS.replace("\n", "\r\n"), "a.csv"),
        (ROWS.replace(",", "\t"), "a.tsv"),
        ({"path": PATHS, "label": ["cat", "dog", "cat"], "other": [1.5, None, 2.0]}, "a.parquet"),
    ],
)
def test_one_label(tmp_path, table, content, name):
    part = table(content, name)["train"]
    assert part.class_names == ["cat", "dog"]
    assert names(part) == [["cat"], ["dog"], ["cat"]]
    assert [part.pictures.name(row) for row in part.rows] == [str(tmp_path / path) for path in PATHS]
    assert part.group_names is None


def test_paths_start_where_told(tmp_path, table):
    part = table(ROWS.replace("pictures/", ""), root=tmp_path / "pictures")["train"]
    assert part.pictures.name(0) == str(tmp_path / "pictures" / "a.png")
    part = table(ROWS.replace("pictures/", f"{tmp_path}/pictures/"), root=tmp_path / "gone")["train"]
    assert part.pictures.name(0) == str(tmp_path / "pictures" / "a.png")


def test_numbers_as_labels(table):
    part = table({"path": PATHS, "label": [10, 9, 10]}, "a.parquet")["train"]
    assert part.class_names == ["9", "10"]
    assert part.labels.tolist() == [1, 0, 1]


def test_groups_and_parts(table):
    content = "path,y,sex,part\npictures/a.png,1,f,train\npictures/b.png,0,m,Train\npictures/c.png,1,f,valid\n"
    parts = table(content, label="y", group="sex", split="part")
    assert {name: names(part) for name, part in parts.items()} == {"train": [["1"], ["0"]], "val": [["1"]]}
    assert parts["train"].group_names == ["f", "m"]
    assert parts["train"].groups.tolist() == [0, 1]
    assert parts["val"].rows.tolist() == [2]


def test_several_columns_of_labels(table):
    content = "path,cat,dog\npictures/a.png,1,0\npictures/b.png,true,1.0\npictures/c.png,0,False\n"
    part = table(content, label=["dog", "cat"])["train"]
    assert part.multi_label
    assert part.labels.tolist() == [[False, True], [True, True], [False, False]]
    assert names(part) == [["cat"], ["dog", "cat"], []]
    assert part.counts().tolist() == [1, 2]
    flags = {"path": PATHS, "cat": [1, 0, 0], "dog": [False, True, True]}
    assert table(flags, "a.parquet", label=["cat", "dog"])["train"].counts().tolist() == [1, 2]


def test_labels_with_a_separator(table):
    content = "path,label\npictures/a.png,cat|dog\npictures/b.png,\npictures/c.png,dog | dog\n"
    part = table(content, label_separator="|")["train"]
    assert part.class_names == ["cat", "dog"]
    assert names(part) == [["cat", "dog"], [], ["dog"]]
    lists = {"path": PATHS, "label": [["cat", "dog"], [], ["dog"]]}
    assert np.array_equal(table(lists, "a.parquet", label_separator="|")["train"].labels, part.labels)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", {}, r"table\.csv holds no rows; write a line of column names and one line for each picture"),
        ("path,label\n", {}, r"table\.csv holds no rows"),
        ("path,label\n\na.png\n", {}, r"table\.csv, line 3: 1 values where the first line names 2 columns; correct"),
        ("path,label\na.png,cat,dog\n", {}, r"table\.csv, line 2: 3 values .* \(a value with a ',' in it needs quotes"),
        ('path,label\na.png,"cat\n', {}, r"table\.csv, line 2: unexpected end of data; correct the line"),
        (b"path,label\na.png,caf\xe9\n", {}, r"table\.csv, line 2: byte 0xe9 is not UTF-8; convert the file"),
        ("paths,label\na.png,cat\n", {}, r"no column 'path'; did you mean 'paths'\?; set data\.path_column to one it"),
        (ROWS, {"label": "lable"}, r"no column 'lable'; did you mean 'label'\?; set data\.label_column to one it has"),
        (ROWS, {"group": "sex"}, r"no column 'sex'; known: label, path; set data\.group_column to one it has"),
        ("path,label\npictures/a.png,\n", {}, r"table\.csv, line 2: column 'label' is empty; fill it in or remove"),
        (
            "path,label\n\npictures/x.png,cat\n",
            {},
            r"line 3: there is no file .*pictures/x\.png; correct the path, rem",
        ),
        (
            "path,label\npictures/a.png,2\n",
            {"label": ["label"]},
            r"line 2: column 'label' holds '2'; write 1 for a pict",
        ),
        (ROWS, {"split": "label"}, r"line 2: column 'label' holds 'cat'; write train, val or test"),
        ("path,label\npictures/a.png,test\n", {"split": "label"}, r"no row has train in column 'label'; name the tra"),
        ("path,label\npictures/a.png,\n", {"label_separator": ";"}, r"column 'label' is empty in every row; name the"),
    ],
)
def test_a_wrong_line_is_named(table, content, columns, message):
    with pytest.raises(InputError, match=message):
        table(content, **columns)


def test_wrong_parquet_is_named(table):
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file: .*; fetch or write it again"):
        table("text", "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1: column 'label' is empty"):
        table({"path": PATHS, "label": ["cat", None, "cat"]}, "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet holds no rows; write one for each picture"):
        table({"path": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.string())}, "a.parquet")


def test_missing_files_may_be_left_for_later(table):
    part = table("path,label\npictures/x.png,cat\npictures/a.png,dog\n", check_files=False)["train"]
    with pytest.raises(InputError, match=r"x\.png cannot be read"):
        part.pictures.read(0, 3)
