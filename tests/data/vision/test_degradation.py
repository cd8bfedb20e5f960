"""Small pictures made from photos: by bicubic as others do it, realistically as a camera would."""

import numpy as np
import torch
from PIL import Image

from lightning_bigmodels.data.loading import sample_randomness
from lightning_bigmodels.data.vision.degradation import degrade_realistically, reduce_bicubic
from lightning_bigmodels.data.vision.photos import crop_pair


def photo(height, width):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (smooth * 255).clamp(0, 255).to(torch.uint8)


def test_bicubic_is_pillows():
    for scale in (2, 3, 4):
        picture = photo(24 * scale, 30 * scale)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((30, 24), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        difference = (reduce_bicubic(picture, scale).int() - expected.int()).abs()
        # Pillow rounds between rows and columns too
        assert difference.max() <= 2
        assert difference.float().mean() < 0.5


def test_bicubic_of_an_edge_by_hand():
    """The Keys kernel (a = -1/2) widened by two, as MATLAB's imresize has it: small pixel i lies at 2 i + 1/2."""

    def keys(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0

    row = torch.tensor([50] * 8 + [200] * 8, dtype=torch.uint8)
    found = reduce_bicubic(row.expand(3, 16, 16).contiguous(), 2)
    for place in range(2, 6):
        weights = torch.tensor([keys((large - (2 * place + 0.5)) / 2) for large in range(16)])
        expected = (weights * row).sum() / weights.sum()
        assert abs(found[0, 4, place] - expected) <= 0.5 + 1e-3, place
    assert found[0, 4].min() < 50  # it overshoots at edges


def test_a_crop_is_a_part_of_the_whole_photos_small_picture():
    for scale in (2, 3, 4):
        picture = photo(20 * scale, 25 * scale)
        whole = reduce_bicubic(picture, scale)
        for top, left in ((0, 0), (5, 9), (12, 17)):
            large, small = crop_pair(picture, top * scale, left * scale, 8, scale, "bicubic")
            assert torch.equal(large, picture[:, top * scale : (top + 8) * scale, left * scale : (left + 8) * scale])
            difference = small.int() - whole[:, top : top + 8, left : left + 8].int()
            assert difference.abs().max() <= 1
            assert (difference != 0).float().mean() < 0.01


def realistic(picture, index, scale=2):
    with sample_randomness(0, 0, index):
        return degrade_realistically(picture, scale)


def test_a_realistic_picture_has_its_size_is_seeded_and_differs_from_sample_to_sample():
    picture = photo(64, 96)
    for scale in (2, 3, 4):
        cut = picture[:, : 64 // scale * scale]
        found = realistic(cut, 1, scale)
        assert found.shape == (3, 64 // scale, 96 // scale)
        assert found.dtype == torch.uint8
        assert torch.equal(found, realistic(cut, 1, scale))
        assert not torch.equal(found, realistic(cut, 2, scale))


def test_realistic_pictures_keep_the_photo_and_lose_more_than_bicubic_ones():
    picture = photo(96, 96)
    clean = reduce_bicubic(picture, 2).float()
    errors = [(realistic(picture, index).float() - clean).abs().mean() for index in range(20)]
    assert 2 < torch.stack(errors).mean() < 40
    # and each shows what the photo shows
    pairs = [torch.stack([realistic(picture, index).float().flatten(), clean.flatten()]) for index in range(20)]
    assert torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).median() > 0.6


def test_the_stream_of_training_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    realistic(photo(32, 32), 0)
    assert torch.equal(torch.get_rng_state(), before)
