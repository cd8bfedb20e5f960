"""What callbacks write of a classifier: confusion matrix, confident mistakes, table of classes."""

import csv

import pytest
import torch
from PIL import Image

from lightning_bigmodels.callbacks import ClassTable, ConfidentMistakes, ConfusionMatrix
from lightning_bigmodels.callbacks.confusion_matrix import draw_matrix
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from lightning_bigmodels.pictures import as_rgb, captioned
from tests.conftest import QUIET
from tests.modules.cnn.classifier_toys import NUM_CLASSES, Bars, BarsData
from tests.toys import ToyModel
from tests.workers import run_on


def tiny(**changes):
    return ImageClassifier(
        **{"network": "small_cnn", "num_classes": NUM_CLASSES, "channels": 1, "image_size": 8, **changes}
    )


def validate(folder, processes=1):
    """Validate one network on so many processes; return its predictions on one."""
    from lightning.pytorch import Trainer

    def work():
        torch.manual_seed(0)
        trainer = Trainer(
            **QUIET | {"logger": False},
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            default_root_dir=folder,
            callbacks=[ConfusionMatrix(), ConfidentMistakes(num_pictures=6), ClassTable()],
        )
        model = tiny()
        trainer.validate(model, BarsData(), verbose=False)
        return model.class_table()

    return run_on(processes, work)[0]


def predicted():
    torch.manual_seed(0)
    model = tiny()
    model.configure_model()
    batch = Bars(50).__getitems__(range(50))
    probabilities = model.eval().probabilities(model.logits(batch)).detach()
    return batch["labels"], probabilities


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("processes", [1, 3])
def test_the_matrix_counts_every_example_once_on_any_number_of_processes(processes, tmp_path):
    validate(tmp_path, processes)
    labels, probabilities = predicted()
    expected = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
    for label, found in zip(labels.tolist(), probabilities.argmax(1).tolist(), strict=True):
        expected[label, found] += 1
    head, *lines = rows(tmp_path / "confusion_matrix" / "step_00000000.csv")
    assert head == ["true \\ found", *"abcdef"]
    assert [line[0] for line in lines] == list("abcdef")
    assert [[int(x) for x in line[1:]] for line in lines] == expected.tolist()
    with Image.open(tmp_path / "confusion_matrix" / "step_00000000.png") as picture:
        assert picture.size == tuple(reversed(draw_matrix(expected, list("abcdef")).shape[1:]))


def test_the_most_confident_mistakes_are_shown_in_order(tmp_path):
    validate(tmp_path, 1)
    validate(tmp_path / "two", 2)
    labels, probabilities = predicted()
    sure, found = probabilities.max(1)
    wrong = sorted((i for i in range(50) if found[i] != labels[i]), key=lambda i: -sure[i].item())[:6]
    images = Bars(50).__getitems__(wrong)["images"]
    name = "confident_mistakes/step_00000000.png"
    with Image.open(tmp_path / name) as one, Image.open(tmp_path / "two" / name) as two:
        pixels = torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).view(one.height, one.width, 3)
        assert one.tobytes() == two.tobytes()
    for place, image in enumerate(images):
        cell = captioned(image, ["", "", ""])
        top, left = (2 + (place // 4) * (cell.shape[1] + 2), 2 + (place % 4) * (cell.shape[2] + 2))
        shown = pixels[top : top + 112, left : left + 112].permute(2, 0, 1)
        assert torch.equal(shown, cell[:, :112])


def test_the_table_of_classes_is_written(tmp_path):
    columns, lines = validate(tmp_path, 2)
    assert [line[0] for line in lines] == list("abcdef")
    assert sum(int(line[-1]) for line in lines) == 50
    assert rows(tmp_path / "val_classes" / "step_00000000.csv") == [list(columns), *map(list, lines)]


def test_a_classifier_without_mistakes_has_no_picture_of_them(trainer, tmp_path):
    class Perfect(ConfidentMistakes):
        def add(self, probabilities, batch):
            labels = batch["labels"].clamp(min=0)
            super().add(torch.nn.functional.one_hot(labels, NUM_CLASSES).float(), batch)

    trainer(callbacks=[Perfect()]).validate(tiny(), BarsData(), verbose=False)
    assert not (tmp_path / "confident_mistakes").exists()


def test_other_models_and_wrong_numbers_are_refused(trainer):
    with pytest.raises(InputError, match="num_pictures is 0; it must be 1 or more"):
        ConfidentMistakes(num_pictures=0)
    with pytest.raises(
        InputError, match="ConfusionMatrix needs a classifier with one class for each example; remove it"
    ):
        trainer(callbacks=[ConfusionMatrix()]).validate(ToyModel(), BarsData())
    with pytest.raises(InputError, match="ConfidentMistakes needs a classifier with one class"):
        trainer(callbacks=[ConfidentMistakes()]).validate(tiny(multi_label=True), BarsData())


def test_a_large_matrix_is_drawn_without_names():
    counts = torch.eye(100, dtype=torch.int64)
    assert draw_matrix(counts, [str(i) for i in range(100)]).shape[0] == 3


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_of_any_channels_become_colours(channels):
    pixels = torch.randint(256, (channels, 4, 6), dtype=torch.uint8)
    found = as_rgb(pixels)
    assert torch.equal(found, pixels[:3] if channels >= 3 else pixels[:1].expand(3, -1, -1))
    assert torch.equal(as_rgb(pixels / 255), found)


def test_a_long_line_is_cut_where_the_picture_ends():
    page = captioned(torch.zeros(3, 150, 150, dtype=torch.uint8), ["a" * 200])
    assert page.shape == (3, 164, 150)
    assert (page[:, 150:, -2:] == 255).all()
    assert (page[:, 150:] < 128).any()
