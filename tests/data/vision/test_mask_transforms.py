"""Masks move with their pixels."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.data.vision.mask_transforms import MaskTransforms
from lightning_bigmodels.errors import InputError
from tests.data.masked_pictures import (
    agreement,
    as_picture,
    draw,
    write_folder,
)


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


WAYS = [
    {},
    {"own_scale": True},
    {"scale_range": (0.5, 2.0)},
    {"own_scale": True, "scale_range": (0.5, 2.0), "horizontal_flip": 1.0},
    {"augmentations": [v2.RandomRotation(30), v2.RandomVerticalFlip(1.0)]},
    {"augmentations": [v2.RandomPerspective(p=1.0), v2.RandomAffine(10, (0.2, 0.2))], "horizontal_flip": 0.5},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ",".join(way) or "plain")
@pytest.mark.parametrize("epoch", [None, 0])
def test_masks_move_with_their_pixels(way, epoch):
    torch.manual_seed(0)
    transforms = MaskTransforms((32, 48), (40, 40), **way)
    for number, (height, width) in enumerate([(40, 60), (90, 50), (20, 24), (31, 200)]):
        mask = draw(number, height, width)
        image = torch.from_numpy(np.array(as_picture(mask))).permute(2, 0, 1)
        new, moved = transforms(image, torch.from_numpy(mask).to(torch.int16), epoch)
        assert new.dtype == torch.uint8
        assert moved.dtype == torch.int64
        assert new.shape[1:] == moved.shape == transforms.size(epoch)
        assert agreement(new, moved) > 0.93
        # what no picture fills is black and counts for nothing
        filled = new.sum(0) == 0
        assert (moved[filled] == IGNORED).float().mean() > 0.98 if filled.any() else True
        if filled.any():
            assert filled[moved == IGNORED].float().mean() > 0.8


def test_random_scales_are_those_of_the_range_and_every_place_is_cut():
    torch.manual_seed(0)
    transforms = MaskTransforms((16, 16), (16, 16), own_scale=True, scale_range=(1.0, 1.0))
    columns = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    found = {int(transforms(columns, torch.zeros(64, 64, dtype=torch.int16), 0)[0][0, 0, 0]) for _ in range(300)}
    assert min(found) < 3
    assert max(found) > 45
    assert max(found) <= 48
    shrinking = MaskTransforms((16, 16), (16, 16), own_scale=True, scale_range=(0.125, 0.25))
    shown = [
        int((shrinking(columns, torch.zeros(64, 64, dtype=torch.int16), 0)[1] != IGNORED).sum()) for _ in range(50)
    ]
    assert min(shown) < 12 * 12
    assert all(8 * 8 <= count <= 16 * 16 for count in shown)


def test_in_evaluation_a_picture_lies_whole_in_the_upper_left():
    mask = draw(0, 20, 30)
    image = torch.from_numpy(np.array(as_picture(mask))).permute(2, 0, 1)
    own = MaskTransforms((8, 8), (32, 64), own_scale=True)
    assert own.region((20, 30)) == (20, 30)
    assert own.region((64, 64)) == (32, 32)
    new, moved = own(image, torch.from_numpy(mask).to(torch.int16), None)
    assert torch.equal(new[:, :20, :30], image)
    assert torch.equal(moved[:20, :30], torch.from_numpy(mask).long())
    assert (moved[20:] == IGNORED).all()
    assert (moved[:, 30:] == IGNORED).all()
    assert MaskTransforms((8, 8), (32, 64)).region((20, 30)) == (32, 48)


def test_an_augmentation_that_changes_the_size_is_refused():
    transforms = MaskTransforms((8, 8), (8, 8), augmentations=[v2.Resize((4, 4))])
    with pytest.raises(InputError, match=r"augmentations made \(3, 4, 4\) .* leave them uint8 and of 8 x 8"):
        transforms(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.int16), 0)
