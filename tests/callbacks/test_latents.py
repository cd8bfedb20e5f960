"""Maps of codes and walks between them."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.decomposition import PCA

from lightning_bigmodels import ImageClassifier
from lightning_bigmodels.callbacks import Latents
from lightning_bigmodels.callbacks.latents import draw_map, in_rows, principal_components, straight_walks
from lightning_bigmodels.errors import InputError
from tests.modules.autoencoder.toys import digits, plain


def test_components_are_scikit_learn_s():
    codes = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 1, 1, 2])
    points, shares = principal_components(codes)
    reference = PCA(2).fit(codes.numpy())
    expected = torch.from_numpy(reference.transform(codes.numpy()))
    signs = (points * expected).sum(0).sign()
    assert torch.allclose(points, expected * signs, atol=1e-4)
    assert shares == pytest.approx(reference.explained_variance_ratio_.tolist(), rel=1e-4)


def test_codes_of_two_values_or_one_are_shown_as_they_are():
    codes = torch.randn(9, 2)
    points, shares = principal_components(codes)
    assert torch.equal(points, codes)
    assert sum(shares) == pytest.approx(1)
    points, _ = principal_components(codes[:, :1])
    assert torch.equal(points, torch.cat([codes[:, :1], torch.zeros(9, 1)], dim=1))
    assert principal_components(torch.randn(1, 5))[0].tolist() == [[0, 0]]


def test_a_walk_goes_straight_from_end_to_end():
    starts, ends = torch.randn(2, 3, 4, 5)
    walks = straight_walks(starts, ends, 5)
    assert torch.equal(walks[:, 0], starts)
    assert torch.allclose(walks[:, -1], ends)
    assert torch.allclose(walks[:, 2], (starts + ends) / 2, atol=1e-6)


def test_classes_have_colours():
    picture = draw_map(torch.randn(30, 2), torch.arange(30) % 3, ["bag", "coat", "shoe"], [0.5, 0.2])
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # the first of matplotlib's tab10
        assert (picture == torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).all(0).any()
    assert draw_map(torch.randn(4, 2), torch.full((4,), -1), [], [1.0, 0.0]).shape == picture.shape


def test_maps_and_walks_are_drawn_after_each_validation(trainer, tmp_path):
    shown = Latents(num_points=12, num_walks=2, num_steps=3, every_n_validations=2)
    run = trainer(
        max_steps=4, val_check_interval=1, callbacks=[shown], logger=CSVLogger(tmp_path), limit_val_batches=1.0
    )
    run.fit(plain(), digits())
    for name in ("latent_map", "latent_walk"):
        files = sorted((run.log_dir and tmp_path / run.log_dir / name).iterdir())
        assert [file.name for file in files] == ["step_00000001.png", "step_00000003.png"]
    with Image.open(files[0]) as image:
        # two walks of three pictures, each enlarged from 8 to 48 pixels, with two pixels around
        assert image.size == (3 * 50 + 2, 2 * 50 + 2)


def test_pictures_stand_in_rows():
    pictures = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1) * torch.ones(1, 1, 50, 50, dtype=torch.uint8)
    shown = in_rows(pictures, 3)
    assert shown[0, 10, 10::52].tolist() == [0, 1, 2]
    assert shown[0, 60, 10::52].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_points": -1}, "num_points is -1; set it to 0 or more"),
        ({"num_walks": -1}, "num_walks is -1"),
        ({"num_steps": 1}, "num_steps is 1; set it to 2 or more"),
        ({"every_n_validations": 0}, "every_n_validations is 0; set it to 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Latents(**arguments)


def test_a_model_without_codes_is_refused(trainer):
    model = ImageClassifier("small_cnn", num_classes=10, channels=1, image_size=8)
    with pytest.raises(InputError, match="ImageClassifier makes no codes that Latents could show; remove it"):
        trainer(callbacks=[Latents()]).fit(model, digits())
