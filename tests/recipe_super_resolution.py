"""What the family contract needs to know of recipes on `SuperResolutionImages`."""

import numpy as np
import torch
from PIL import Image

from lightning_bigmodels import SuperResolutionImages
from lightning_bigmodels.data.vision.files import read_picture
from lightning_bigmodels.export import load_exported
from lightning_bigmodels.modules.cnn.picture_quality import bicubic, luma, psnr, shave
from tests import contract

NUM_PHOTOS = 12


class Contract(contract.Contract):
    steps = 60
    uneven_batch_size = 3
    short_steps = 6  # Adam makes a sum's rounding larger with every step

    def __init__(self):
        self.scale = 2

    @property
    def metric(self):
        return f"val_psnr_y_shave{self.scale}"

    def tiny(self, recipe, folder):
        model = recipe["model"]["init_args"]
        self.scale = model["scale"]
        photos = folder / "photos"
        photos.mkdir(exist_ok=True)
        for number in range(NUM_PHOTOS):
            draw_photo(number).save(photos / f"{number:02}.png")
        return {
            "trainer": self.lengths(),
            "model": {
                "init_args": {
                    "config": {"num_blocks": 2, "num_features": 8},
                    "tile_size": 32,
                    "optimizer": {"init_args": {"lr": 0.005}},
                }
            },
            "data": {
                "init_args": {
                    "source": str(photos),
                    "val_photos": None,
                    "val_fraction": 0.4,
                    "test_fraction": 0.2,
                    "scale": self.scale,
                    "crop_size": 12,
                    "crops_per_photo": 16,
                    "batch_size": 8,
                    "eval_batch_size": 1,
                    "num_workers": 0,
                }
            },
        }

    def baseline(self, data_args):
        """Return what bicubic enlargement reaches."""
        data = SuperResolutionImages(**data_args)
        data.setup("fit")
        values = []
        for batch in data.val_dataloader():
            for small, large in zip(batch["images"], batch["targets"], strict=True):
                pictures = (bicubic(small, data.scale), large)
                values.append(psnr(*(luma(shave(picture, data.scale)) for picture in pictures)))
        return float(torch.stack(values).mean())

    def better(self, found, baseline):
        return found[-1] > baseline + 3

    def predictions(self, folder, scratch):
        pictures = scratch / "pictures"
        pictures.mkdir()
        sizes = {"a.png": (5, 70), "b.png": (1, 1), "c.png": (33, 12)}
        for name, (height, width) in sizes.items():
            draw_photo(0).resize((width, height)).save(pictures / name)

        def held_out(rows, folder):
            # the test part's small pictures, at their own photos' size
            assert [(row["height"], row["width"]) for row in rows] == [(48, 48)] * 2
            for row in rows:
                large, photo = read_picture(folder / row["picture"]), read_picture(row["file"])
                assert psnr(luma(large), luma(photo)) > 25

        def any_size(rows, folder):
            factor = self.scale**2
            assert [row["file"] for row in rows] == [str(pictures / name) for name in sizes]
            for row, (height, width) in zip(rows, sizes.values(), strict=True):
                with Image.open(folder / row["picture"]) as image:
                    assert image.size == (factor * width, factor * height)

        flags = ["--data.predict_source", str(pictures), "--model.enlarge", str(self.scale**2)]
        return [([], held_out), (flags, any_size)]

    def answers(self, model):
        small = torch.from_numpy(np.array(draw_photo(3))).permute(2, 0, 1)
        # more than bicubic gives, which it adds to, and not much else
        return psnr(model.enlarge(small), bicubic(small, model.scale)).item() > 15

    def check_export(self, folder, checkpoint):
        from lightning_bigmodels import SuperResolver

        model = SuperResolver.load_from_checkpoint(checkpoint, weights_only=True).eval()
        images = torch.randint(256, (2, 3, 17, 23), dtype=torch.uint8)
        with torch.no_grad():
            expected = model.network(images).clamp(0, 1)
        for name in ("torch", "onnx"):
            found = load_exported(folder, name)(images)["enlarged"]
            assert torch.allclose(found, expected, atol=1e-4)

    def broken(self, folder):
        return broken_photos(folder)


def draw_photo(number):
    """Return 48 x 48 pixels of coloured waves, of which bicubic loses the shortest ones."""
    random = np.random.default_rng(number)
    rows, columns = np.mgrid[:48, :48]
    pixels = np.full((48, 48, 3), 127.0)
    for _ in range(8):
        angle, period, start = random.uniform(0, np.pi), random.uniform(5, 16), random.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi / period * (columns * np.cos(angle) + rows * np.sin(angle)) + start)
        pixels += 25 * wave[..., None] * random.uniform(0, 1, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def broken_photos(folder):
    """Return what can be wrong with photos: flags, and what the one line must say."""

    def source(name, content=None, size=None):
        place = folder / name
        place.mkdir()
        for number in range(8):
            draw_photo(number).save(place / f"{number}.png")
        if size is not None:
            draw_photo(0).resize(size).save(place / "odd.png")
        elif content is not None:
            (place / "odd.png").write_bytes(content)
        return ["--data.source", str(place), "--data.val_photos=[odd]", "--data.test_fraction=0"]

    draw_photo(0).save(folder / "whole.png")
    cut = (folder / "whole.png").read_bytes()[:200]
    (folder / "empty").mkdir()
    return [
        (["--data.source", str(folder / "gone")], ["gone: no such folder"]),
        (["--data.source", str(folder / "empty")], ["empty holds no picture"]),
        (source("cut", cut), ["odd.png is damaged or cut off", "replace or remove"]),
        (source("text", b"no picture"), ["odd.png is no picture"]),
        (source("nothing", b""), ["odd.png is empty"]),
        (source("small", size=(40, 9)), ["odd.png is 40 x 9 pixels", "measured"]),
        (["--data.crop_size=99"], ["48 x 48 pixels, smaller than a crop", "lower data.crop_size"]),
        (["--data.scale=8"], ["data.scale is 8 and model.scale is"]),
        (["--data.val_photos=[99.png]"], ["val_photos names '99.png'", "did you mean"]),
    ]
