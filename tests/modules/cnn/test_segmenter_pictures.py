"""What a segmenter draws and writes: overlays, masks of the files' sizes, the table of classes."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lightning_bigmodels import ImageSegmenter, SegmentationImages
from lightning_bigmodels.callbacks import ClassTable, PredictionWriter, ValidationPictures
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn.segmentation_pictures import likeliest_class, nearest, overlay
from lightning_bigmodels.palette import class_color, class_palette
from tests.modules.cnn.segmenter_toys import DATA, DIGITS, batch_of, built
from tests.toys import ToyModel


def test_an_overlay_shows_class_colours_and_leaves_the_background():
    image = torch.full((1, 2, 2), 100, dtype=torch.uint8)
    found = overlay(image, torch.tensor([[0, 1], [2, IGNORED]]))
    assert found[:, 0, 0].tolist() == [100, 100, 100]
    assert found[:, 0, 1].tolist() == [round(40 + 0.6 * c) for c in class_color(1)]
    assert found[:, 1, 0].tolist() == [round(40 + 0.6 * c) for c in class_color(2)]
    assert found[:, 1, 1].tolist() == [193, 193, 193]


def test_a_mask_at_the_files_size_is_that_of_the_interpolated_logits():
    logits = torch.randn(4, 7, 9)
    expected = F.interpolate(logits[None], size=(20, 33), mode="bilinear")[0].argmax(0)
    assert torch.equal(likeliest_class(logits, (20, 33)), expected)
    assert torch.equal(likeliest_class(logits, (7, 9)), logits.argmax(0))
    mask = torch.arange(12).view(3, 4)
    assert torch.equal(nearest(nearest(mask, (6, 8)), (3, 4)), mask)


def test_draw_shows_picture_truth_and_prediction():
    model = built()
    masks = torch.randint(3, (3, 8, 10))
    batch = batch_of(masks)
    batch["indices"][1] = FILLER
    pictures = model.draw(batch)
    assert [picture.shape for picture in pictures] == [(3, 8, 34)] * 2
    assert torch.equal(pictures[0][:, :, :10], batch["images"][0])
    assert torch.equal(pictures[0][:, :, 12:22], overlay(batch["images"][0], masks[0]))
    assert torch.equal(pictures[1][:, :, 24:], overlay(batch["images"][2], model.logits(batch).argmax(1)[2]))


def test_predictions_are_paletted_masks_of_the_files_sizes(trainer, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, size in {"a.png": (30, 50), "sub/b.jpg": (64, 20), "c.png": (33, 33)}.items():
        pixels = torch.randint(256, (size[0], size[1], 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "in" / name)
    data = SegmentationImages(predict_source=str(tmp_path / "in"), image_size=32, batch_size=2)
    model = built()
    model.class_names = ["ground", "tree", "car"]
    run = trainer(callbacks=[PredictionWriter()])
    rows = [row for batch in run.predict(model, data) for row in batch]
    assert [(row["index"], row["file"], row["height"], row["width"]) for row in rows] == [
        (0, "a.png", 30, 50),
        (1, "c.png", 33, 33),
        (2, "sub/b.jpg", 64, 20),
    ]
    for row in rows:
        assert set(row["shares"]) <= {"ground", "tree", "car"}
        assert math.isclose(sum(row["shares"].values()), 1.0, rel_tol=1e-6)
        file = tmp_path / "predictions" / row["file"]
        with Image.open(file.with_suffix(".png")) as mask:
            assert mask.mode == "P"
            assert mask.size == (row["width"], row["height"])
            assert mask.getpalette() == class_palette()
            counts = np.bincount(np.array(mask).ravel(), minlength=3) / (row["height"] * row["width"])
        shown = {name: share for name, share in zip(model.class_names, counts, strict=True) if share}
        assert row["shares"] == pytest.approx(shown)
        with Image.open(file.with_name(f"{file.stem}_overlay.png")) as picture:
            assert picture.mode == "RGB"
    # what the network saw of the wide picture: 32 columns and 19 rows
    with Image.open(tmp_path / "predictions" / "a_overlay.png") as picture:
        assert picture.size == (32, 19)


def test_masks_of_more_classes_than_a_palette_has_keep_their_numbers(trainer, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    model = built(num_classes=300)
    with torch.no_grad():
        model.network.body.head.bias[299] = 100.0
    data = SegmentationImages(predict_source=str(tmp_path / "a.png"), image_size=16)
    trainer(callbacks=[PredictionWriter()]).predict(model, data, return_predictions=False)
    with Image.open(tmp_path / "predictions" / "a.png") as mask:
        assert mask.getextrema() == (299, 299)


def test_the_table_and_the_pictures_are_written_after_each_validation(trainer, tmp_path):
    run = trainer(
        callbacks=[ClassTable(), ValidationPictures(num_pictures=2)], val_check_interval=2, limit_val_batches=1.0
    )
    run.fit(ImageSegmenter(**DIGITS, dice=1.0), SegmentationImages(**DATA))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if "pictures" in str(path))
    assert files == [f"validation_pictures/step_0000000{step}.png" for step in (2, 4)]
    with (tmp_path / "val_classes" / "step_00000004.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["background", *"0123456789"]
    assert sum(int(row["pixels"]) for row in rows) == 3 * 32 * 32
    run.test(datamodule=SegmentationImages(**DATA), model=ImageSegmenter(**DIGITS), verbose=False)
    assert (tmp_path / "test_classes").is_dir()


def test_a_model_without_a_table_is_refused(trainer):
    with pytest.raises(InputError, match="ToyModel has no table of classes for ClassTable; remove it"):
        trainer(callbacks=[ClassTable()]).validate(ToyModel(), verbose=False)
