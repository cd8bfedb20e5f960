"""Reading pictures: every kind of file gives the same pixels, and what is broken is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.data.vision.files import SUFFIXES, picture_files, read_picture
from lightning_bigmodels.errors import InputError
from tests.toy_pictures import pixels, write, write_truncated

EXPECTED = torch.from_numpy(pixels(1, 0)).permute(2, 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_files_without_loss_give_their_pixels(tmp_path, suffix):
    found = read_picture(write(tmp_path / f"a{suffix}", 1))
    assert found.dtype == torch.uint8
    assert torch.equal(found, EXPECTED)
    found.fill_(0)  # the tensor's memory is its own


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
def test_files_with_loss_give_nearly_their_pixels(tmp_path, suffix):
    smooth = Image.fromarray(pixels(1, 0)).resize((128, 96), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / f"a{suffix}")
    found = read_picture(tmp_path / f"a{suffix}")
    assert found.shape == (3, 96, 128)
    assert (found.int() - torch.from_numpy(np.array(smooth)).permute(2, 0, 1)).abs().float().mean() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_wanted_channels(tmp_path, mode, channels):
    path = write(tmp_path / f"a{'.jpg' if mode == 'CMYK' else '.png'}", 1, mode=mode)
    found = read_picture(path, channels)
    assert found.shape == (channels, 12, 16)
    gray = np.array(Image.fromarray(pixels(1, 0)).convert("L"))
    assert found.float().mean() == pytest.approx(gray.mean(), rel=0.1)


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), 100, dtype=np.uint8)).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.array([[0, 0, 255, 255]], dtype=np.uint8), 4, axis=0)))
    image.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 100, 100]
    assert read_picture(tmp_path / "a.png", 4)[:, 0, 3].tolist() == [100, 100, 100, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert read_picture(tmp_path / f"a{suffix}", 1).flatten().tolist() == [0, 1, 128, 255]
    assert read_picture(tmp_path / f"a{suffix}").shape == (3, 1, 4)


def test_it_is_turned_as_the_camera_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for suffix in (".jpg", ".png"):
        write(tmp_path / f"a{suffix}", 1, exif=exif)
        assert read_picture(tmp_path / f"a{suffix}").shape == (3, 16, 12)
    assert torch.equal(read_picture(tmp_path / "a.png"), EXPECTED.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("cut.jpg", write_truncated, r"cut\.jpg is damaged or cut off \(.*truncated.*\); replace or remove the file"),
        ("cut.png", write_truncated, r"cut\.png is damaged or cut off \(.*truncated.*\); replace or remove"),
        ("head.jpg", lambda path: write_truncated(path, 0.05), r"head\.jpg is damaged or cut off"),
        ("text.jpg", lambda path: path.write_text("no picture"), r"text\.jpg is no picture that Pillow knows; replace"),
        ("empty.jpg", lambda path: path.touch(), r"empty\.jpg is empty; replace or remove the file"),
        ("gone.jpg", lambda path: None, r"gone\.jpg cannot be read \(No such file or directory\); correct the path"),
        ("dir.jpg", lambda path: path.mkdir(), r"dir\.jpg cannot be read \(Is a directory\)"),
    ],
)
def test_what_is_broken_is_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_picture(tmp_path / name)


def test_a_picture_too_large_for_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(InputError, match=r"a\.png is damaged or cut off \(Image size \(192 pixels\) exceeds limit"):
        read_picture(write(tmp_path / "a.png"))


def test_channels_that_the_file_has_not_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.jpg has 3 channels and 4 are wanted; convert the file or set channels"):
        read_picture(write(tmp_path / "a.jpg"), 4)


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.JPG", "a.png", "inner/c.webp", ".hidden/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in picture_files(tmp_path)] == ["a.png", "b.JPG", "c.webp"]
    assert ".jpg" in SUFFIXES
    (tmp_path / "hidden").mkdir()
    with pytest.raises(InputError, match=r"hidden holds no picture \(\.jpg, .*\); name a folder that does"):
        picture_files(tmp_path / "hidden")
    with pytest.raises(InputError, match=r"gone: no such folder; name a folder of pictures"):
        picture_files(tmp_path / "gone")
