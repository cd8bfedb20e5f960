"""PNG files written row by row are read by others as they were."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.png import PictureInBands, write_png


def read(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (130, 67), (64, 3)])
@pytest.mark.parametrize("kind", ["noise", "ramp", "flat"])
def test_it_is_read_as_it_was(tmp_path, height, width, kind):
    if kind == "noise":
        picture = torch.randint(256, (3, height, width), dtype=torch.uint8)
    elif kind == "ramp":
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        picture = torch.stack([rows + columns, 3 * rows - columns, rows * columns]).to(torch.uint8)
    else:
        picture = torch.full((3, height, width), 200, dtype=torch.uint8)
    path = tmp_path / "picture.png"
    write_png(path, PictureInBands(height, width, iter(picture.split(7, dim=1))))
    assert torch.equal(read(path), picture)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_it_is_about_as_small_as_pillows(tmp_path):
    rows, columns = torch.arange(200)[:, None], torch.arange(300)
    picture = torch.stack([rows + columns, rows * 2 - columns, rows * columns // 50]).to(torch.uint8)
    write_png(tmp_path / "ours.png", PictureInBands(200, 300, [picture]))
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "theirs.png")
    assert (tmp_path / "ours.png").stat().st_size < 1.1 * (tmp_path / "theirs.png").stat().st_size


def test_bands_that_do_not_fit_leave_no_file(tmp_path):
    band = torch.zeros(3, 4, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the bands have 4 rows, and the picture 9"):
        write_png(tmp_path / "a.png", PictureInBands(9, 5, [band]))
    with pytest.raises(ValueError, match="a band is 5 pixels wide, and the picture 6"):
        write_png(tmp_path / "a.png", PictureInBands(4, 6, [band]))
    assert list(tmp_path.iterdir()) == []
