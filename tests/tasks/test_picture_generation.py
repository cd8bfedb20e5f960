"""PictureGeneration: pictures by number and class, whatever batch makes them, and what is refused."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from lightning_bigmodels import Images
from lightning_bigmodels.callbacks import PredictionWriter
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from tests.toy_pictures import write_folders


class Dots(PictureGeneration):
    """One layer from noise to pixels, brighter by class."""

    def __init__(self, num_classes=0, **kwargs):
        super().__init__(image_size=[4, 6], channels=1, num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def build_network(self):
        return nn.Linear(24, 24)

    def step(self, phase, batch):
        self.check_pictures(batch["images"])
        return self.network(self.noise(phase, batch["indices"]).normal(24)).mean()

    def generate_pictures(self, noise, labels=None):
        bright = 0 if labels is None else 100 * labels[:, None, None, None]
        return (self.network(noise.normal(24)).view(-1, 1, 4, 6).abs() * 20 + bright).clamp(0, 255).to(torch.uint8)


def predict(model, folder, **data):
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=[PredictionWriter()],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.predict(model, datamodule=Images(**data))
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_predict_makes_the_pictures_of_their_numbers_whatever_the_batch(tmp_path):
    torch.manual_seed(0)
    model = Dots(num_classes=2)
    model.configure_model()
    found = []
    for size in (2, 5):
        (tmp_path / str(size)).mkdir()
        rows = predict(model, tmp_path / str(size), num_generated=5, batch_size=size)
        assert [(row["index"], row["class"], row["seed"]) for row in rows] == [(i, str(i % 2), 0) for i in range(5)]
        found.append([Image.open(tmp_path / str(size) / row["picture"]).convert("L").tobytes() for row in rows])
        assert len(found[-1][0]) == 24
    assert found[0] == found[1]
    assert len(set(found[0])) == 5
    assert min(found[0][1]) >= 100 > min(found[0][0])


def test_classes_are_asked_for_by_name(tmp_path):
    model = Dots(num_classes=2)
    model.configure_model()
    model.class_names = ["cat", "dog"]
    rows = predict(model, tmp_path, num_generated=3, generated_classes=["dog"])
    assert [row["class"] for row in rows] == ["dog"] * 3
    with pytest.raises(InputError, match=r"generated_classes names 'dgo', .*did you mean 'dog'"):
        predict(model, tmp_path, num_generated=3, generated_classes=["dgo"])
    model = Dots()
    model.configure_model()
    with pytest.raises(InputError, match="no class in particular; remove data.generated_classes"):
        predict(model, tmp_path, num_generated=3, generated_classes=["dog"])


def test_pictures_are_not_predicted_but_made(tmp_path):
    write_folders(tmp_path / "pictures", {"a": 2, "b": 2})
    with pytest.raises(InputError, match="predicts nothing of given ones; set data.num_generated"):
        predict(Dots(), tmp_path, predict_source=str(tmp_path / "pictures"), image_size=[4, 6], channels=1)


def test_pictures_of_another_shape_name_the_setting():
    model = Dots()
    model.check_pictures(torch.zeros(2, 1, 4, 6))
    with pytest.raises(InputError, match="3 channels and the network 1; set data.channels"):
        model.check_pictures(torch.zeros(2, 3, 4, 6))
    with pytest.raises(InputError, match=r"8 x 8 and the network makes 4 x 6; set data.image_size to \[4, 6\]"):
        model.check_pictures(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": [4]}, r"image_size is \[4\]; give one number of 1 or more, or two"),
        ({"image_size": 4, "channels": 0}, "channels is 0; set it to 1 or more"),
        ({"image_size": 4, "num_classes": -1}, "num_classes is -1; set it to 0 or more"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    class Bare(Dots):
        def __init__(self, **kwargs):
            PictureGeneration.__init__(self, **kwargs)

    with pytest.raises(InputError, match=message):
        Bare(**arguments)


def test_training_draws_anew_in_each_epoch_and_evaluation_does_not():
    model = Dots(noise_seed=3)
    indices = torch.arange(2)
    first = model.noise("train", indices).normal(4)
    evaluated = model.noise("val", indices).normal(4)
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    model.trainer.fit_loop.epoch_progress.current.completed = 1
    assert not torch.isclose(model.noise("train", indices).normal(4), first).any()
    assert torch.equal(model.noise("test", indices).normal(4), evaluated)


# ---- what Images does for them


def test_pictures_without_classes(tmp_path):
    write_folders(tmp_path, {"one": 8})
    data = Images(str(tmp_path), labelled=False, image_size=8, val_fraction=0.25, batch_size=3)
    data.setup("fit")
    assert (data.class_names, data.multi_label, len(data.parts["train"]), len(data.parts["val"])) == ([], False, 6, 2)
    assert next(iter(data.train_dataloader()))["labels"].tolist() == [IGNORED] * 3
    assert data.parts["val"].classes(0) == []
    assert data.example_batch(2)["labels"].tolist() == [IGNORED] * 2
    digits = Images("sklearn-digits", labelled=False, image_size=8, channels=1)
    digits.setup("fit")
    assert digits.class_names == []


def test_a_table_without_labels(tmp_path):
    write_folders(tmp_path, {"one": 4})
    (tmp_path / "table.csv").write_text("path\n" + "".join(f"one/{number:03}.png\n" for number in range(4)))
    data = Images(str(tmp_path / "table.csv"), labelled=False, image_size=8, val_fraction=0.25)
    data.setup("fit")
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 3, "val": 1}


def test_classes_of_pictures_to_make_need_their_number():
    with pytest.raises(InputError, match="generated_classes is set and num_generated is not; set both, or neither"):
        Images(generated_classes=["a"])
    with pytest.raises(InputError, match="num_generated is 0; set it to 1 or more"):
        Images(num_generated=0)
