"""Data that nobody has described are told by their names, endings and first values."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_bigmodels.advice.columns import describe, roles_of, target_of
from lightning_bigmodels.advice.look import look
from lightning_bigmodels.errors import InputError


def draw(path, size=(24, 16), mode="RGB", value=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- pictures


def test_folders_of_classes_with_their_balance_sizes_and_parts(tmp_path):
    for number in range(6):
        draw(tmp_path / "train" / ("rose" if number < 4 else "tulip") / f"{number}.png", (24, 16 + number))
        draw(tmp_path / "val" / ("rose" if number % 2 else "tulip") / f"{number}.png")
    (tmp_path / "README.md").write_text("flowers", encoding="utf-8")
    facts = look(str(tmp_path))
    assert facts.kind == "classes"
    assert dict(facts.data) == {"source": str(tmp_path)}
    assert (facts.parts, facts.classes) == ({"train": 6, "val": 6}, {"rose": 4, "tulip": 2})
    assert (facts.side, facts.extremes, facts.channels, facts.imbalance) == (19, (16, 24), 3, 2)


def test_names_with_a_class_before_the_dot_are_classes_and_others_are_none(tmp_path):
    for number in range(4):
        draw(tmp_path / "named" / f"{'cat' if number % 2 else 'dog'}.{number}.png", mode="L", value=7)
        draw(tmp_path / "flat" / f"img_{number}.png")
        draw(tmp_path / "one" / "images" / f"{number}.png")
    named = look(str(tmp_path / "named"))
    assert (named.kind, named.classes, named.channels) == ("classes", {"cat": 2, "dog": 2}, 1)
    for name in ("flat", "one"):
        facts = look(str(tmp_path / name))
        assert (facts.kind, facts.classes, facts.data["labelled"]) == ("pictures", {}, False)


def test_pictures_that_cannot_be_read_and_empty_classes_are_told_and_not_raised(tmp_path):
    for number in range(4):
        draw(tmp_path / ("a" if number % 2 else "b") / f"{number}.png")
    (tmp_path / "b" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    notes = " ".join(look(str(tmp_path)).notes)
    assert "1 of 5 pictures looked at cannot be read" in notes
    assert "broken.png" in notes
    assert "empty holds no picture" in notes


def test_captions_beside_pictures_and_in_tables(tmp_path):
    rows = []
    for number in range(4):
        draw(tmp_path / "beside" / f"{number}.png")
        (tmp_path / "beside" / f"{number}.txt").write_text("a red circle on a table", encoding="utf-8")
        draw(tmp_path / "table" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a photo of thing {number}"})
    write_lines(tmp_path / "table" / "metadata.jsonl", rows)
    beside, table = look(str(tmp_path / "beside")), look(str(tmp_path / "table"))
    assert (beside.kind, beside.num_train, beside.lengths) == ("captions", 4, (6, 6))
    assert (table.kind, table.lengths, table.data["source"]) == ("captions", (5, 5), str(tmp_path / "table"))
    own = tmp_path / "table" / "own.csv"
    own.write_text("img,words,split\n" + "".join(f"{n}.png,a long text of things {n},train\n" for n in range(4)))
    facts = look(str(own))
    assert (facts.kind, facts.num_train) == ("captions", 4)
    assert {"path_column": "img", "caption_column": "words", "split_column": "split"}.items() <= facts.data.items()


def test_tables_of_labelled_pictures(tmp_path):
    for number in range(6):
        draw(tmp_path / f"{number}.png")
    lines = ["image,kind", *(f"{n}.png,{'a' if n % 2 else 'b'}" for n in range(6))]
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    for path in (table, tmp_path):  # the folder with one table is the table
        facts = look(str(path))
        assert (facts.kind, facts.classes) == ("classes", {"a": 3, "b": 3})
        assert dict(facts.data) == {"source": str(table), "path_column": "image", "label_column": "kind"}
    table.write_text("image,red,round\n" + "".join(f"{n}.png,{n % 2},1\n" for n in range(6)), encoding="utf-8")
    facts = look(str(table))
    assert (facts.multi_label, facts.classes) == (True, {"red": 3, "round": 6})
    assert facts.data["label_column"] == ["red", "round"]


def coco(path, names, **more):
    boxes = [
        {"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0, **more}
        for n in range(len(names))
    ]
    images = [{"id": n, "file_name": name, "height": 16, "width": 24} for n, name in enumerate(names)]
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "dog"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}), encoding="utf-8")


def test_boxes_of_coco_with_parts_of_csv_and_of_voc(tmp_path):
    for number in range(4):
        for folder in ("coco/train", "coco/val", "csv", "voc"):
            draw(tmp_path / folder / f"{number}.png")
    names = [f"{number}.png" for number in range(4)]
    coco(tmp_path / "coco/annotations/instances_train.json", names, segmentation=[[2, 2, 8, 2, 8, 8]])
    coco(tmp_path / "coco/annotations/instances_val.json", names)
    facts = look(str(tmp_path / "coco"))
    assert (facts.kind, facts.classes, facts.parts) == ("boxes", {"car": 2, "dog": 2}, {"train": 4, "val": 4})
    assert facts.data["images"] == str(tmp_path / "coco/train")
    assert facts.data["val_images"] == str(tmp_path / "coco/val")
    assert "maskrcnn" in " ".join(facts.notes)
    lines = ["image_path,xmin,ymin,xmax,ymax,label", *(f"{name},1,1,9,9,tree" for name in names), "0.png,5,5,2,2,tree"]
    (tmp_path / "csv" / "boxes.csv").write_text("\n".join(lines), encoding="utf-8")
    facts = look(str(tmp_path / "csv"))
    assert (facts.kind, facts.classes, facts.data["bad_boxes"]) == ("boxes", {"tree": 4}, "drop")
    for name in names:
        thing = "<object><name>owl</name><bndbox>" + "".join(
            f"<{side}>{value}</{side}>" for side, value in (("xmin", 1), ("ymin", 1), ("xmax", 9), ("ymax", 9))
        )
        text = f"<annotation><filename>{name}</filename>{thing}</bndbox></object></annotation>"
        (tmp_path / "voc" / name).with_suffix(".xml").write_text(text, encoding="utf-8")
    facts = look(str(tmp_path / "voc"))
    assert (facts.kind, facts.classes, facts.data["source"]) == ("boxes", {"owl": 4}, str(tmp_path / "voc"))


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ((0, 1, 2), {"class_names": ["0", "1", "2"]}),
        ((0, 255), {"class_names": ["background", "object"], "class_values": [0, 255], "ignored_value": None}),
        ((1, 4), {"class_names": ["1", "4"], "class_values": [1, 4]}),
    ],
)
def test_masks_are_found_by_their_names_and_values(tmp_path, values, arguments):
    for number in range(6):
        draw(tmp_path / "photos" / f"{number}.jpg")
        draw(tmp_path / "masks" / f"{number}.png", mode="L", value=values[number % len(values)])
    facts = look(str(tmp_path))
    assert facts.kind == "masks"
    expected = {"source": str(tmp_path / "photos"), "masks": str(tmp_path / "masks"), **arguments}
    assert dict(facts.data) == expected


def test_arrays_and_the_files_of_mnist(tmp_path):
    pictures = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", images=pictures, labels=np.arange(6) % 3)
    facts = look(str(tmp_path / "data.npz"))
    assert (facts.kind, facts.classes, facts.channels) == ("classes", {"0": 2, "1": 2, "2": 2}, 1)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (6, 8, 8))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pictures.tobytes())
        labels = bytes([0, 0, 8, 1]) + (6).to_bytes(4, "big") + bytes([0, 1, 2, 0, 1, 2])
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    facts = look(str(folder))
    assert (facts.kind, facts.parts, facts.sides) == ("classes", {"train": 6, "test": 6}, (8, 8))


# ---- text and rows


def test_text_files_folders_parts_and_encodings(tmp_path):
    for name in ("train", "val"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "a.txt").write_text("one two three", encoding="utf-8")
    facts = look(str(tmp_path / "parts"))
    assert (facts.kind, facts.num_bytes, facts.parts) == ("text", 13, {"train": 1, "val": 1})
    assert facts.data["val_sources"] == str(tmp_path / "parts" / "val")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    assert look(str(latin)).data["encoding"] == "latin-1"
    assert "read as latin-1" in look(str(latin)).notes[0]
    assert look("python-docs").num_bytes > 100_000


def test_rows_of_text_in_any_column_also_compressed(tmp_path):
    rows = [{"id": n, "story": "once upon a time there was a long story"} for n in range(5)]
    plain = write_lines(tmp_path / "a.jsonl", rows)
    facts = look(str(plain))
    assert (facts.kind, facts.num_train, facts.data["column"]) == ("text", 5, "story")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert look(str(packed)).num_bytes == facts.num_bytes


def test_large_text_is_estimated_from_its_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_bigmodels.advice.look_text._WHOLE", 100)
    rows = [{"text": "a sentence of some length " * (1 + n % 3)} for n in range(200)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    facts = look(str(path))
    assert facts.num_bytes == pytest.approx(sum(len(row["text"]) for row in rows), rel=0.1)
    assert facts.num_train == pytest.approx(200, rel=0.1)
    assert "estimates" in facts.notes[0]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "conversations"),
        ({"question": "why?", "answer": "so"}, "pairs of texts"),
        ({"text": "a fine film that I liked", "label": 1}, "labelled text"),
        ({"user_id": 1, "movie_id": 2, "rating": 3}, "interactions"),
        ({"age": 3, "fare": 1.5}, "table"),
        ({"path": "a.wav", "text": "hello"}, "audio"),
    ],
)
def test_kinds_of_rows_that_no_recipe_reads(tmp_path, row, kind):
    facts = look(str(write_lines(tmp_path / "a.jsonl", [row] * 3)))
    assert (facts.kind, facts.num_train, facts.data) == (kind, 3, {})


def test_a_table_has_types_missing_values_and_a_likely_target(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"{n if n % 4 else ''},{'m' if n % 2 else 'f'},{n % 3 == 0:d}" for n in range(40)]
    path.write_text("age,sex,survived\n" + "\n".join(lines), encoding="utf-8")
    facts = look(str(path))
    assert (facts.kind, facts.num_train, facts.missing) == ("table", 40, {"age": 10})
    assert facts.columns == {"age": "numbers from 1 to 39", "sex": "2 categories", "survived": "numbers from 0 to 1"}
    assert facts.classes == {"1": 14, "0": 26}
    assert "'survived' looks like what is to be told" in facts.notes[-1]


def test_audio_in_folders(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.wav").write_bytes(b"RIFF")
    facts = look(str(tmp_path))
    assert (facts.kind, facts.num_train, facts.classes) == ("audio", 2, {"cat": 1, "dog": 1})


def test_a_text_beside_many_numbers_is_a_table_and_columns_are_described():
    numbers = {name: [1, 2, 3] for name in "abcd"}
    assert roles_of({"text": ["some long text of a row"] * 3, **numbers}).kind == "table"
    assert describe([None, "", "nan"]) == "nothing"
    assert describe(["x"] * 9) == "one value"
    assert describe([f"name {n}" for n in range(99)]) == "names"
    assert target_of({"a": list(range(99))}) is None


# ---- what is refused


def several(path):
    for number in range(10):
        draw(path / f"{number}.png")
        (path / f"{number}.wav").write_bytes(b"RIFF")
    return path


def yolo(path):
    draw(path / "1.png")
    (path / "1.txt").write_text("0 0.5 0.5 0.2 0.2\n", encoding="utf-8")
    return path


def unknown(path):
    path.mkdir()
    (path / "a.xyz").write_bytes(b"?")
    return path


def empty(path):
    path.mkdir()
    return path


def other_json(path):
    path.mkdir()
    file = path / "a.json"
    file.write_text('{"rows": []}', encoding="utf-8")
    return file


def missing(path):
    Path(path.parent, "photos").mkdir()
    return path.parent / "photo"


def no_bytes(path):
    path.write_bytes(b"")
    return path


def ending(path):
    file = path.with_suffix(".docx")
    file.write_bytes(b"?")
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, r"no such file or folder; did you mean 'photos'\?; name the folder or file that holds your data"),
        (empty, "holds no file; name a folder that holds data"),
        (no_bytes, "is empty; name a file that holds data"),
        (several, r"holds 10 pictures and 10 audio files, .* name a folder or file of one kind"),
        (unknown, r"holds files of no kind that is known \(1 .xyz\); known: a folder with a folder of pictures"),
        (ending, r".docx files are no data that is known; known: a folder with a folder of pictures"),
        (yolo, r"boxes in YOLO's format .* write them as a COCO .json file or a .csv file"),
        (other_json, r"holds rows, and of .json files COCO's instances are known .* write rows as .jsonl"),
        (lambda path: draw(path.with_suffix(".png")), "is one picture; name the folder of all pictures"),
    ],
)
def test_what_is_no_data_is_refused_with_what_was_found_and_what_is_known(tmp_path, make, message):
    path = make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        look(str(path))
