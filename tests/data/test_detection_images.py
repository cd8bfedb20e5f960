"""DetectionImages: three formats of boxes read alike, boxes that move with pixels, and what is refused."""

import json

import pytest
import torch
from torchvision.transforms import v2

from lightning_bigmodels import DetectionImages
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.data.loading import sample_randomness
from lightning_bigmodels.data.vision.annotated import DetectionExample, augment
from lightning_bigmodels.errors import InputError
from tests import boxes


def part(name="train", **arguments):
    """Return a part of the data, none held out unless asked for."""
    data = DetectionImages(**{"val_fraction": 0.0, **arguments})
    data.setup("fit")
    return data.parts[name]


# ---- formats


def test_coco_csv_and_voc_say_the_same(tmp_path):
    examples = boxes.digits(4)
    coco = boxes.write_coco(tmp_path, examples)
    rows, names = [], [str(digit) for digit in range(10)]
    for number, (image, target) in enumerate(examples):
        found = [
            (names[n - 1], box) for box, n in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ]
        rows += [[f"{number:03d}.png", *box, name] for name, box in found] or [[f"{number:03d}.png", *[""] * 5]]
        boxes.write_voc(tmp_path / "voc", f"{number:03d}", [(n, (x + 1, y + 1, r, b)) for n, (x, y, r, b) in found])
        boxes.save(tmp_path / "voc" / "JPEGImages" / f"{number:03d}.png", image)
    pictures = str(tmp_path / "pictures")
    csv = boxes.write_csv(tmp_path, rows)
    sources = [(coco, pictures), (csv, pictures), (tmp_path / "voc" / "Annotations", None)]
    for source, images in sources:
        found = part(source=str(source), images=images, class_names=names)
        assert len(found) == 4
        for number, (image, target) in enumerate(examples):
            read = found.read(number)
            assert torch.equal(read.image, image)
            assert torch.equal(read.target["boxes"], target["boxes"])
            assert torch.equal(read.target["labels"], target["labels"])
            assert found.classes(number) == [names[label - 1] for label in target["labels"].tolist()]


def test_a_list_of_vocs_names_and_columns_of_other_names(tmp_path):
    for name in ("a", "b", "c"):
        boxes.write_voc(tmp_path, name, [("cat", (1, 1, 9, 9))])
    listed = tmp_path / "ImageSets" / "Main" / "train.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("c 1\na -1\n")
    found = part(source=str(listed))
    assert [found.image_id(0), found.image_id(1)] == ["c", "a"]
    csv = tmp_path / "JPEGImages" / "other.csv"
    csv.write_text("file,x0,y0,x1,y1,what,more\na.png,1,2,3,4,dog,5\nb.png,,,,,,\n")
    found = part(source=str(csv), csv_columns=["file", "x0", "y0", "x1", "y1", "what"])
    assert found.read(0).target["boxes"].tolist() == [[1, 2, 3, 4]]
    assert found.read(1).target["boxes"].shape == (0, 4)


def test_coco_masks_of_polygons_and_of_run_lengths(tmp_path):
    examples = boxes.digits(5)
    source = boxes.write_coco(tmp_path, examples, masks=True)
    found = part(source=str(source), images=str(tmp_path / "pictures"), masks=True)
    shares = []
    for number in range(5):
        target = found.read(number).target
        assert target["masks"].shape == (len(target["labels"]), 48, 48)
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            inside = mask[top:bottom, left:right]
            assert mask.sum() == inside.sum()
            shares.append(inside.float().mean().item())
    # a polygon of half the box, and run lengths of all of it, in turn
    assert shares[1::2] == [1.0] * len(shares[1::2])
    assert shares[0::2] == pytest.approx([0.5] * len(shares[0::2]), abs=0.15)


def test_coco_numbers_travel_and_crowds_only_count_in_evaluation(tmp_path):
    source = boxes.write_coco(tmp_path, boxes.digits(6))
    content = json.loads(source.read_text())
    content["annotations"][0]["iscrowd"] = 1
    source.write_text(json.dumps(content))
    data = DetectionImages(source=str(source), images=str(tmp_path / "pictures"), val_fraction=0.0)
    data.setup("fit")
    assert data.category_ids == list(range(3, 13))
    train = data.parts["train"]
    whole = train[0]["targets"][0]
    assert whole["iscrowd"].tolist()[0] == 1
    trained = train[(0, 0)]["targets"][0]
    assert len(trained["labels"]) == len(whole["labels"]) - 1
    assert set(trained) == {"boxes", "labels"}


# ---- parts and batches


def test_parts_are_seeded_and_share_no_picture(tmp_path):
    source = boxes.write_coco(tmp_path, boxes.digits(20, 32))

    def names(seed):
        data = DetectionImages(
            source=str(source), images=str(tmp_path / "pictures"), val_fraction=0.2, test_fraction=0.1, split_seed=seed
        )
        data.setup("fit")
        return {name: [p.name(i) for i in range(len(p))] for name, p in data.parts.items()}

    found = names(0)
    assert {name: len(part) for name, part in found.items()} == {"train": 14, "val": 4, "test": 2}
    assert len({name for part in found.values() for name in part}) == 20
    assert names(0) == found != names(1)


def test_digits_need_no_disk_and_depend_on_seed_part_and_index_alone():
    first, again = (part(source="digits", num_pictures=30, seed=1) for _ in range(2))
    other = part(source="digits", num_pictures=30, seed=2)
    assert torch.equal(first.read(7).image, again.read(7).image)
    assert not torch.equal(first.read(7).image, other.read(7).image)
    assert len(first.read(19).target["labels"]) == 0
    for index in range(10):
        image, target = first.read(index)
        for left, top, right, bottom in target["boxes"].int().tolist():
            assert image[:, top:bottom, left:right].float().max() > image[:, :4, :4].float().mean() + 20


def test_batches_are_lists_and_fillers_count_for_nothing(tmp_path):
    for name, size in {"small": 20, "large": 40}.items():
        boxes.save(tmp_path / f"{name}.png", torch.full((3, size, 2 * size), 9, dtype=torch.uint8))
    csv = boxes.write_csv(tmp_path, [["small.png", 1, 1, 9, 9, "a"], ["large.png", 1, 1, 9, 9, "b"]])
    data = DetectionImages(source=str(csv), val_source=str(csv), eval_batch_size=2, batch_size=1)
    data.setup("fit")
    batch = data.parts["val"].__getitems__([0, 1, 2])
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 20, 40), (3, 40, 80), (3, 32, 32)]
    assert batch["indices"].tolist() == [0, 1, FILLER]
    assert len(batch["targets"][2]["labels"]) == 0
    assert data.class_names == ["a", "b"]
    example = data.example_batch(3)
    assert set(example) == {"images", "targets", "indices"}
    assert len(example["images"]) == len(example["targets"]) == 3


def test_a_broken_picture_is_left_out_by_choice(tmp_path):
    boxes.save(tmp_path / "good.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    csv = boxes.write_csv(tmp_path, [["good.png", 1, 1, 9, 9, "a"], ["bad.png", 1, 1, 9, 9, "a"]])
    batch = part(source=str(csv), on_error="skip").__getitems__([0, 1])
    assert batch["indices"].tolist() == [0, FILLER]
    assert "bad.png" in batch["errors"][0]
    with pytest.raises(InputError, match=r"bad\.png is no picture"):
        part(source=str(csv)).__getitems__([0, 1])


def test_predict_takes_a_bare_folder_or_the_pictures_of_annotations(tmp_path):
    source = boxes.write_coco(tmp_path, boxes.digits(3))
    bare = DetectionImages(predict_source=str(tmp_path / "pictures"))
    bare.setup("predict")
    batch = bare.parts["predict"].__getitems__([0, 3])
    assert batch["image_ids"] == [0, -1]
    assert batch["files"][0].endswith("000.png")
    assert bare.class_names == []
    known = DetectionImages(
        source=str(source), predict_source=str(source), images=str(tmp_path / "pictures"), val_fraction=0
    )
    known.setup("predict")
    assert known.parts["predict"].__getitems__([1])["image_ids"] == [11]


# ---- boxes move with pixels

MOVES = {
    "flip": v2.RandomHorizontalFlip(p=1.0),
    "upside down": v2.RandomVerticalFlip(p=1.0),
    "shortest side": v2.RandomShortestSize(min_size=[90], max_size=120),
    "scale jitter": v2.ScaleJitter(target_size=(80, 80), scale_range=(0.5, 1.5)),
    "crop": v2.RandomCrop(40, pad_if_needed=True),
    "IoU crop": v2.RandomIoUCrop(),
    "zoom out": v2.RandomZoomOut(p=1.0),
    "colour": v2.RandomPhotometricDistort(p=1.0),
    "several": v2.Compose([v2.RandomZoomOut(p=1.0), v2.RandomHorizontalFlip(), v2.RandomCrop(48, pad_if_needed=True)]),
}


@pytest.mark.parametrize("name", MOVES)
def test_boxes_and_masks_move_with_their_pixels(name):
    left, top, right, bottom = 12, 20, 34, 44
    image = torch.zeros(3, 56, 60, dtype=torch.uint8)
    image[:, top:bottom, left:right] = 255
    masks = (image[:1] > 0).to(torch.uint8)
    target = {"boxes": torch.tensor([[left, top, right, bottom]]).float(), "labels": torch.tensor([4]), "masks": masks}
    kept = 0
    for index in range(20):
        with sample_randomness(0, 0, index):
            moved, found = augment(DetectionExample(image, target), [MOVES[name]], min_box_size=3.0)
        assert moved.dtype == torch.uint8
        assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"])
        if not len(found["boxes"]):
            continue
        kept += 1
        assert found["labels"].tolist() == [4]
        for painted in ((moved > 100).any(dim=0), found["masks"][0] > 0):
            rows, columns = (painted.any(dim=axis).nonzero().flatten() for axis in (1, 0))
            edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            torch.testing.assert_close(found["boxes"][0], edges, atol=1.6, rtol=0)
    assert kept >= 5


def test_what_a_crop_leaves_of_a_box_is_clipped_or_left_out():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    target = {
        "boxes": torch.tensor([[0.0, 0, 12, 12], [0, 0, 22, 22], [0, 0, 40, 40]]),
        "labels": torch.tensor([1, 2, 3]),
    }
    _, found = augment(DetectionExample(image, target), [v2.CenterCrop(20)], min_box_size=4.0)
    assert found["labels"].tolist() == [2, 3]
    assert found["boxes"].tolist() == [[0, 0, 12, 12], [0, 0, 20, 20]]


def test_what_is_drawn_belongs_to_seed_epoch_and_index():
    options = {"source": "digits", "num_pictures": 10, "augmentations": [v2.RandomCrop(50)]}
    first, again = (part(**options)[(3, 5)]["images"][0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, part(**options)[(4, 5)]["images"][0])


# ---- what is refused (tests/recipe_detection.py reads the messages of broken boxes)


def test_bad_boxes_are_dropped_by_choice(tmp_path):
    boxes.save(tmp_path / "a.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    rows = [["a.png", 1, 1, 9, 9, "x"], ["a.png", 5, 5, 5, 9, "x"], ["a.png", 1, 1, 9, "nine", "x"]]
    csv = boxes.write_csv(tmp_path, rows)
    with pytest.warns(UserWarning, match="2 boxes of .* were left out, the first: .*line 3: box .* is empty"):
        found = part(source=str(csv), bad_boxes="drop")
    assert found.read(0).target["boxes"].tolist() == [[1, 1, 9, 9]]


def test_one_pixel_beyond_the_edge_is_rounding_and_clipped(tmp_path):
    boxes.save(tmp_path / "a.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    csv = boxes.write_csv(tmp_path, [["a.png", -1, 0, 21, 20, "x"]])
    assert part(source=str(csv)).read(0).target["boxes"].tolist() == [[0, 0, 20, 20]]


def _csv(folder, *rows, **more):
    return {"source": str(boxes.write_csv(folder, rows)), **more}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda f: _csv(f, ["a.png", 1, 1, 9, 9, "y"], class_names=["x"]), r"line 2: box .* unknown class 'y'"),
        (
            lambda f: _csv(f, ["a.png", 1, 1, 9, "", "x"]),
            r"line 2: box \[1, 1, 9, \] of a.png is not four numbers",
        ),
        (lambda f: _csv(f, ["a.png", 1, 1, 9, "nan", "x"]), r"line 2: .* not four finite numbers"),
        (lambda f: _csv(f, ["a.png", 1, 1, 9, 99, "x"]), r"line 2: .* outside of the picture's 20 x 20 pixels"),
        (lambda f: _csv(f, ["b.png", 1, 1, 9, 9, "x"]), r"line 2: there is no picture .*b\.png; set data.images"),
        (lambda f: _csv(f, ["a.png", 1]), r"line 2: too few columns"),
        (lambda f: _csv(f, ["a.png", *[""] * 5]), r"has no box; name annotations that have some"),
        (lambda f: _csv(f), r"has no line below its header"),
        (lambda f: _csv(f, csv_columns=["a"]), r"csv_columns has 1 names; give six"),
        (lambda f: _csv(f, csv_columns=["path", *boxes.COLUMNS[1:]]), r"line 1: no column 'path'.*csv_columns"),
        (lambda f: _csv(f, ["a.png", 1, 1, 9, 9, "x"], masks=True), r"masks is true, and .* has none"),
        (lambda f: _csv(f, ["a.png", 1, 1, 9, 9, "x"], val_fraction=0.2), r"val_fraction 0.2 of 1 pictures is none"),
        (lambda f: _csv(f, ["a.png", 1, 1, 9, 9, "x"], images=str(f / "gone")), r"gone: no such folder"),
        (lambda f: {"source": str(f / "a.png")}, r"a\.png: is none of them; name a COCO"),
        (lambda f: {}, r"source is not set; name a COCO"),
        (lambda f: {"source": "digits", "masks": True}, r"masks is true, and digits has none"),
        (lambda f: {"source": "digits", "val_fraction": 1.0}, r"val_fraction is 1.0"),
        (lambda f: {"source": "digits", "val_fraction": 0.6, "test_fraction": 0.5}, r"leave nothing to train on"),
        (
            lambda f: {"source": "digits", "val_source": "x.csv"},
            r"val_source is x.csv, and digits has parts of",
        ),
        (lambda f: {"source": "digits", "bad_boxes": "x"}, r"bad_boxes is 'x'; set it to error or drop"),
        (lambda f: {"source": str(f / "gone.csv")}, r"gone\.csv: no such file or folder; name a COCO"),
        (lambda f: {"class_names": ["a", "a"]}, r"give each class one name, once"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, arguments, message):
    boxes.save(tmp_path / "a.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    with pytest.raises(InputError, match=message):
        part(**arguments(tmp_path))


def test_broken_xml_and_missing_pictures_are_named_with_their_line(tmp_path):
    folder = boxes.write_voc(tmp_path, "a", [("cat", (1, 1, 9, 9))])
    whole = (folder / "a.xml").read_text()
    (folder / "a.xml").write_text(whole.replace("</bndbox>", ""))
    with pytest.raises(InputError, match=r"a\.xml, line 6: no XML \(mismatched tag\)"):
        part(source=str(folder))
    (folder / "a.xml").write_text(whole.replace("a.png", "b.png"))
    with pytest.raises(InputError, match=r"a\.xml, line 2: there is no picture .*b\.png"):
        part(source=str(folder))
    (folder / "a.xml").write_text("<annotation></annotation>")
    with pytest.raises(InputError, match=r"a\.xml, line 1: no <filename>"):
        part(source=str(folder))


def test_broken_coco_files_are_named_with_what_they_lack(tmp_path):
    source = boxes.write_coco(tmp_path, boxes.digits(3))
    whole = json.loads(source.read_text())
    images = str(tmp_path / "pictures")

    def refused(message, masks=False, **changes):
        source.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(InputError, match=message):
            part(source=str(source), images=images, masks=masks)

    refused(r"has no list 'images'", images=None)
    refused(r"annotations\[0\] has no 'bbox'", annotations=[{"id": 1, "image_id": 10, "category_id": 3}])
    refused(r"image 10: the id occurs twice", images=[whole["images"][0]] * 2)
    refused(r"there is no image 99", annotations=[{**whole["annotations"][0], "image_id": 99}])
    refused(r"two categories have the same name", categories=[{"id": n, "name": "x"} for n in (3, 4)])
    refused(r"annotation 100: the segmentation is neither", masks=True)
    wrong = [{**image, "width": 96} for image in whole["images"]]
    source.write_text(json.dumps({**whole, "images": wrong}))
    with pytest.raises(InputError, match="has 48 x 48 pixels, and its annotations say 96 x 48"):
        part(source=str(source), images=images).read(0)
