"""Pictures in a run's folder and in its loggers."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from lightning_bigmodels.callbacks import ValidationPictures
from lightning_bigmodels.callbacks.report import report_picture
from lightning_bigmodels.callbacks.validation_pictures import grid
from lightning_bigmodels.errors import InputError
from tests.toys import ToyData, ToyModel


class Draws(ToyModel):
    """A toy whose picture of an example is its number, in red."""

    def draw(self, batch):
        return [torch.full((3, 4, 4 + number), 40 * number, dtype=torch.uint8) for number in range(len(batch[0]))]


def read(path):
    return pil_to_tensor(Image.open(path))


def files(folder):
    return sorted(path.name for path in folder.glob("validation_pictures/*.png"))


def test_the_first_pictures_of_each_validation_are_written(trainer, tmp_path):
    run = trainer(callbacks=[ValidationPictures(num_pictures=3)], val_check_interval=2, limit_val_batches=1.0)
    run.fit(Draws(), ToyData())
    assert files(tmp_path) == ["step_00000002.png", "step_00000004.png"]
    picture = read(tmp_path / "validation_pictures" / "step_00000004.png")
    assert torch.equal(picture, grid([torch.full((3, 4, 4 + n), 40 * n, dtype=torch.uint8) for n in range(3)]))


def test_every_n_validations(trainer, tmp_path):
    run = trainer(callbacks=[ValidationPictures(every_n_validations=2)], val_check_interval=1)
    run.fit(Draws(), ToyData())
    assert files(tmp_path) == ["step_00000001.png", "step_00000003.png"]


def test_wrong_arguments_and_models_are_refused(trainer):
    with pytest.raises(InputError, match="num_pictures is 0; set it to 1 or more"):
        ValidationPictures(num_pictures=0)
    with pytest.raises(InputError, match="every_n_validations is -1"):
        ValidationPictures(every_n_validations=-1)
    with pytest.raises(InputError, match="ToyModel draws nothing for ValidationPictures"):
        trainer(callbacks=[ValidationPictures()]).fit(ToyModel(), ToyData())


def test_a_grid_holds_pictures_of_any_size_on_white():
    pictures = [torch.zeros(3, 2, 3, dtype=torch.uint8), torch.zeros(3, 4, 1, dtype=torch.uint8)]
    found = grid(pictures, columns=2)
    assert found.shape == (3, 4 + 2 * 2, 2 * 3 + 3 * 2)
    assert (found == 0).sum() == 3 * (2 * 3 + 4 * 1)
    assert ((found == 0) | (found == 255)).all()


def test_loggers_that_show_pictures_get_them(trainer, tmp_path):
    tensorboard = TensorBoardLogger(tmp_path, name="board")
    picture = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    run = trainer(logger=[CSVLogger(tmp_path, name="csv", version=0), tensorboard])
    path = report_picture(run, "found", picture)
    assert path == tmp_path / "csv" / "version_0" / "found" / "step_00000000.png"
    assert torch.equal(read(path), picture)
    tensorboard.finalize("success")
    (events,) = (tmp_path / "board").rglob("events*")
    assert b"found" in events.read_bytes()
