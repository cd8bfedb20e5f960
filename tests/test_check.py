"""`bigmodels check`: what it prints, the file it writes, and its exit code."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg, write_png

from lightning_bigmodels.__main__ import main


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Ten pictures of two classes for training and two for validation, without a fault."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 5), ("val", 1)):
        for name in ("ant", "bee"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for place in range(number):
                picture = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator)
                write_jpeg(picture, str(folder / f"{place}.jpg"))
    return tmp_path / "photos"


def check(capsys, *more):
    code = main(["check", "--data", "Images", "--data.source", "photos", "--num_workers", "0", *more])
    output = capsys.readouterr()
    return code, output.out, [line for line in output.err.splitlines() if line.startswith("bigmodels:")]


def test_clean_data_end_with_code_zero(photos, capsys):
    code, out, errors = check(capsys)
    assert (code, errors) == (0, [])
    assert out.splitlines() == [
        "           train        val",
        "files         10          2",
        "ant            5          1",
        "bee            5          1",
        "",
        "nothing is wrong",
    ]


def test_all_faults_are_told_at_once_and_the_code_is_one(photos, capsys):
    broken = photos / "train" / "bee" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:-40])
    (photos / "train" / "ant" / "note.png").write_text("no picture")
    (photos / "val" / "bee" / "leak.jpg").write_bytes((photos / "train" / "bee" / "1.jpg").read_bytes())
    (photos / "train" / "wasp").mkdir()
    (photos / "val" / "be").mkdir()
    (photos / "val" / "be" / "1.jpg").write_bytes((photos / "val" / "bee" / "0.jpg").read_bytes())
    code, out, errors = check(capsys)
    assert code == 1
    assert errors == ["bigmodels: error: the data have 5 errors and 0 warnings; mend the errors before a run"]
    for words in (
        "error: cannot be read (2)",
        "photos/train/bee/2.jpg is damaged or cut off",
        "photos/train/ant/note.png is no picture",
        "error: what the run would refuse (2)",
        "photos/train/wasp holds no picture",
        "has the class 'be', which no training example has; did you mean 'bee'?",
        "error: copies in two parts",
        "photos/val/bee/leak.jpg is a copy of photos/train/bee/1.jpg of the train part; remove one of them",
    ):
        assert words in out, out


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_long_list_is_cut_on_the_screen_and_whole_in_the_file(photos, capsys, suffix):
    for number in range(14):
        (photos / "train" / "ant" / f"copy_{number:02d}.jpg").write_bytes((photos / "train/ant/0.jpg").read_bytes())
    code, out, errors = check(capsys, "--output", f"reports/check{suffix}")
    assert (code, errors) == (0, [])
    assert "warning: copies within a part (14)" in out
    assert "  and 4 more" in out
    assert out.splitlines()[-1] == f"0 errors and 14 warnings, listed in reports/check{suffix}"
    with Path(f"reports/check{suffix}").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
    assert len(rows) == 14
    assert rows[3]["file"] == "photos/train/ant/copy_03.jpg"
    assert {(row["level"], row["kind"], row["part"]) for row in rows} == {("warning", "duplicate", "train")}


def test_nothing_is_overwritten(photos, capsys):
    (photos / "labels.csv").write_text("precious")
    assert check(capsys, "--output", "photos/labels.csv") == (
        2,
        "",
        ["bigmodels: error: --output photos/labels.csv exists already; name another file or remove it"],
    )
    assert check(capsys, "--output", "report.txt")[2] == [
        "bigmodels: error: --output report.txt: name a file that ends in .csv or .jsonl"
    ]


def test_what_cannot_be_checked(photos, capsys):
    assert main(["check"]) == 2
    assert "no data is named; name a recipe with --config" in capsys.readouterr().err
    assert main(["check", "--data", "tests.toys.ToyData"]) == 2
    assert "check cannot read ToyData" in capsys.readouterr().err
    assert check(capsys, "--data.source", "gone")[:2] == (2, "")


def test_recipes_are_checked_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--config", "text/quickstart", "--num_workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "documents"
    assert list(tmp_path.iterdir()) == []


def test_many_classes_fit_on_a_screen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        folder = tmp_path / "photos" / f"class_{number:02d}"
        folder.mkdir(parents=True)
        for place in range(2 + (number == 7)):
            write_jpeg(torch.full((1, 8, 8), number * 8 + place, dtype=torch.uint8), str(folder / f"{place}.jpg"))
    code, out, _ = check(capsys, "--data.val_fraction", "0")
    assert code == 0
    assert "30 classes, in training from 2 (class_29) to 3 (class_07) examples" in out
    assert len(out.splitlines()) < 12


def test_every_bad_box_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_jpeg(torch.full((3, 16, 16), 50 * number, dtype=torch.uint8), f"{number}.jpg")
    Path("1.jpg").write_bytes(Path("1.jpg").read_bytes()[:200])
    lines = ["0.jpg,1,1,9,9,cat", "0.jpg,9,1,1,9,cat", "0.jpg,2,2,99,9,cat", "1.jpg,0,0,4,4,dog", "2.jpg,0,0,4,4,cat"]
    Path("boxes.csv").write_text("\n".join(["image_path,xmin,ymin,xmax,ymax,label", *lines]) + "\n")
    columns = "[image_path,xmin,ymin,xmax,ymax,label]"
    flags = ["--data.source", "boxes.csv", "--data.val_fraction", "0", "--data.csv_columns", columns]
    code = main(["check", "--data", "DetectionImages", *flags])
    out = capsys.readouterr().out
    assert code == 1
    assert "boxes.csv, line 3: box [9, 1, 1, 9] of 0.jpg is inverted" in out
    assert "boxes.csv, line 4: box [2, 2, 99, 9] of 0.jpg lies outside of the picture's 16 x 16 pixels" in out
    assert "1.jpg is damaged or cut off" in out
    assert "error: what the run would refuse (2)" in out


def test_photos_of_which_crops_are_made_are_read_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(3):
        picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        write_jpeg(picture, f"photos/{number}.jpg")
    flags = ["--data.source", "photos", "--data.crop_size", "8", "--data.val_photos", "[2.jpg]", "--num_workers", "0"]
    assert main(["check", "--data", "SuperResolutionImages", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["files          2          1", "", "nothing is wrong"]


def test_classes_are_counted_in_masks_and_a_lost_mask_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        for folder, picture in (("photos", torch.full((3, 8, 8), 9 * number)), ("masks", torch.zeros(1, 8, 8))):
            Path(folder).mkdir(exist_ok=True)
            picture[..., :4] += number % 2
            write_png(picture.to(torch.uint8), f"{folder}/{number}.png")
    Path("masks/0.png").unlink()
    flags = ["--data.source", "photos", "--data.masks", "masks", "--data.class_names", "[sky,sea,road]"]
    code = main(["check", "--data", "SegmentationImages", *flags, "--data.val_fraction", "0", "--num_workers", "0"])
    out = capsys.readouterr().out
    assert code == 1
    assert [line.split() for line in out.splitlines()[1:5]] == [
        ["files", "4"],
        ["sky", "3"],
        ["sea", "2"],
        ["road", "0"],
    ]
    assert "no training example of class 'road'" in out
    assert "masks/0.png" in out
