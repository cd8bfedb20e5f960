"""Crops, flips and augmentations on uint8: torchvision's pixels, each at random by the sample's own stream."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lightning_bigmodels.data.loading import sample_randomness
from lightning_bigmodels.data.vision.transforms import Transforms
from lightning_bigmodels.errors import InputError

PICTURE = torch.randint(256, (3, 37, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(20, 30), (60, 70)])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("nearest", InterpolationMode.NEAREST_EXACT),
        ("bilinear", InterpolationMode.BILINEAR),
        ("bicubic", InterpolationMode.BICUBIC),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_resized_as_torchvision_does(channels, name, mode, size):
    picture = PICTURE[:channels]
    found = Transforms((1, 1), interpolation=name).resize(picture, size)
    assert torch.equal(found, functional.resize(picture, list(size), mode, antialias=True))


@pytest.mark.parametrize("shape", [(37, 50), (50, 37), (24, 24), (8, 90)])
def test_evaluation_sees_the_middle(shape):
    picture = functional.resize(PICTURE, list(shape))
    found = Transforms((24, 24), eval_resize=28)(picture, None)
    assert torch.equal(found, v2.Compose([v2.Resize(28), v2.CenterCrop(24)])(picture))
    tight = Transforms((24, 24))(picture, None)
    assert torch.equal(tight, v2.Compose([v2.Resize(24), v2.CenterCrop(24)])(picture))


def test_without_crops_training_sees_what_evaluation_sees():
    transforms = Transforms((16, 20))
    assert torch.equal(transforms(PICTURE, 3), transforms(PICTURE, None))
    assert torch.equal(Transforms((37, 50))(PICTURE, 0), PICTURE)
    # as tight as it fits: the height is cut, of a picture that is made 20 wide
    assert torch.equal(Transforms((10, 20))(PICTURE, 0), transforms.resize(PICTURE, (14, 20))[:, 2:12])


def test_random_crops_are_torchvisions():
    transforms = Transforms((16, 16), crop_scale=(0.1, 0.5), crop_ratio=(0.5, 2.0))
    for seed in range(10):
        torch.manual_seed(seed)
        found = transforms(PICTURE, 0)
        torch.manual_seed(seed)
        assert torch.equal(found, v2.RandomResizedCrop(16, (0.1, 0.5), (0.5, 2.0))(PICTURE))


def test_padded_crops_reach_every_shift():
    picture = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    transforms = Transforms((5, 5), crop_padding=1)
    padded = torch.nn.functional.pad(picture, (1, 1, 1, 1))
    expected = {tuple(padded[0, t : t + 5, x : x + 5].flatten().tolist()) for t in range(3) for x in range(3)}
    torch.manual_seed(0)
    assert {tuple(transforms(picture, 0).flatten().tolist()) for _ in range(100)} == expected
    assert torch.equal(transforms(picture, None), picture)


def test_flips_are_as_frequent_as_told():
    picture = torch.arange(4, dtype=torch.uint8).view(1, 1, 4)
    torch.manual_seed(0)
    flipped = sum(
        torch.equal(Transforms((1, 4), horizontal_flip=0.3)(picture, 0), picture.flip(-1)) for _ in range(500)
    )
    assert 0.25 < flipped / 500 < 0.35
    assert torch.equal(Transforms((1, 4), horizontal_flip=1.0)(picture, None), picture)


AUGMENTATIONS = [
    v2.RandAugment(),
    v2.TrivialAugmentWide(),
    v2.AutoAugment(),
    v2.AugMix(),
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    v2.RandomErasing(p=1.0),
    v2.RandomAffine(20),
    v2.GaussianBlur(3),
    v2.JPEG((50, 90)),
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: type(augmentation).__name__)
def test_an_augmentation_belongs_to_the_sample_in_its_epoch(augmentation):
    transforms = Transforms((24, 24), crop_scale=(0.5, 1.0), augmentations=[augmentation])
    transforms.check(3)

    def draw(epoch, index):
        with sample_randomness(0, epoch, index):
            return transforms(PICTURE, epoch)

    first = draw(0, 0)
    assert (first.dtype, first.shape) == (torch.uint8, (3, 24, 24))
    torch.manual_seed(99)
    assert torch.equal(draw(0, 0), first)
    assert not torch.equal(draw(1, 0), first)
    assert not torch.equal(draw(0, 1), first)
    assert torch.equal(transforms(PICTURE, None), Transforms((24, 24))(PICTURE, None))


def test_checking_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Transforms((8, 8), augmentations=[v2.RandAugment()]).check(1 + 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_grow_with_epochs():
    transforms = Transforms((24, 20), progressive_sizes={4: (16, 12), 0: (8, 8)}, crop_scale=(0.5, 1.0))
    sizes = {epoch: (transforms.size(epoch), transforms(PICTURE, epoch).shape[1:]) for epoch in (0, 3, 4, 9, None)}
    expected = {0: (8, 8), 3: (8, 8), 4: (16, 12), 9: (16, 12), None: (24, 20)}
    assert sizes == {epoch: (size, size) for epoch, size in expected.items()}
    assert Transforms((24, 20), progressive_sizes={2: (8, 8)}).size(1) == (24, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"crop_scale": (0.0, 1.0)},
            r"crop_scale is \[0\.0, 1\.0\]; set two numbers above 0 and up to 1, the least fir",
        ),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale is \[0\.5, 0\.2\]"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio is \[2\.0, 1\.0\]; set two numbers above 0, the least first"),
        (
            {"crop_scale": (0.5, 1.0), "crop_padding": 4},
            "crop_padding is 4 and crop_scale is set; set crop_scale to null",
        ),
        ({"horizontal_flip": 1.5}, r"horizontal_flip is 1\.5; it is a probability: set it from 0 to 1"),
        ({"eval_resize": 20}, "eval_resize is 20; set it to at least image_size, 24"),
        ({"interpolation": "area"}, "interpolation is 'area'; set it to nearest, bilinear, bicubic"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Transforms((24, 24), **options)


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (
            v2.CenterCrop(8),
            r"CenterCrop makes torch\.uint8 \(3, 8, 8\) of a picture torch\.uint8 \(3, 24, 24\); remove it",
        ),
        (
            v2.ToDtype(torch.float32, scale=True),
            r"ToDtype makes torch\.float32 .*: sizes are set by image_size, and the",
        ),
        (v2.ToPILImage(), r"ToPILImage makes Image of a picture"),
        (
            v2.RandomCrop(99),
            r"data\.augmentations: RandomCrop fails on a picture of 3 x 24 x 24 uint8 \(.*\); remove it",
        ),
    ],
)
def test_augmentations_that_batches_cannot_hold_are_refused(augmentation, message):
    with pytest.raises(InputError, match=message):
        Transforms((24, 24), augmentations=[augmentation]).check(3)
