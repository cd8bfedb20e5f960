"""What the family contract needs to know of autoencoders on `Images`: tiny digits, baselines, what can be broken."""

import importlib
import json

import pyarrow.parquet
import torch
from PIL import Image

from lightning_bigmodels import Images
from lightning_bigmodels.export import load_exported
from tests import contract
from tests.generative_parts import callbacks_of, digits
from tests.toy_pictures import write, write_folders, write_truncated

SIZE = 8


class Contract(contract.Contract):
    uneven_batch_size = 7
    steps = 60
    short_steps = 6  # Adam makes a sum's rounding larger with every step

    def __init__(self):
        self.variational = False

    @property
    def metric(self):
        return "val_bits_per_dim" if self.variational else "val_mse"

    def tiny(self, recipe, folder):
        self.variational = recipe["model"]["class_path"] == "VariationalAutoencoder"
        small = {
            # without a map, which matplotlib takes long for: tests/callbacks/test_latents.py has it
            "Latents": {"num_points": 0, "num_walks": 2, "num_steps": 3},
            "SampleQuality": {"num_pictures": 20},
            "Samples": {"num_pictures": 4},
        }
        # so many that 1, 2 and 3 processes fill their last batches with different numbers of fillers
        data = {"val_fraction": 0.0512, "root": None, "crop_padding": 0, "horizontal_flip": 0.0, "batch_size": 32}
        return {
            "trainer": {**self.lengths(), "callbacks": callbacks_of(recipe, small)},
            "model": {
                "init_args": {
                    "image_size": SIZE,
                    "latent_dim": 6,
                    "config": {"widths": [8, 16], "num_blocks": 1},
                    # Adam would make steps of gradients that are rounding alone, which differ between strategies
                    "optimizer": {"init_args": {"lr": 0.01, "eps": 1e-4}},
                }
            },
            "data": digits(SIZE, **data),
        }

    def baseline(self, data_args):
        """Return what is reached without a look at the picture: by each place's mean, or by its distribution."""
        data = Images(**data_args)
        data.setup("fit")
        train, val = (torch.cat([batch["images"] for batch in loader]) for loader in self.loaders(data))
        if not self.variational:
            return float((val / 255 - train.float().mean(0) / 255).square().mean())
        # sixteen bins at each place, in which all values are alike: digits have few values, which no network knows
        bins = torch.nn.functional.one_hot((train // 16).long(), 16).sum(0) + 1.0
        probabilities = bins / bins.sum(-1, keepdim=True) / 16
        places = (val // 16).long().movedim(0, -1)
        return float(-probabilities.gather(-1, places).log2().mean())

    @staticmethod
    def loaders(data):
        return data.train_dataloader(), data.val_dataloader()

    def better(self, found, baseline):
        return min(found) < 0.85 * baseline

    def predictions(self, folder, scratch):
        for number in range(5):
            write(scratch / "new" / f"{number}.png", number % 4, number)
        new = ["--data.predict_source", str(scratch / "new"), "--data.source", str(scratch / "gone")]

        def codes(rows, folder):
            table = pyarrow.parquet.read_table(folder / "predictions.parquet")
            assert table["index"].to_pylist() == [row["index"] for row in rows]
            assert len(rows) > 80
            assert {len(code) for code in table["latents"].to_pylist()} == {6}

        def pictures(rows, folder):
            assert [row["file"] for row in rows] == [str(scratch / "new" / f"{number}.png") for number in range(5)]
            assert not (folder / "predictions.parquet").exists()
            for row in rows:
                with Image.open(folder / row["picture"]) as image:
                    assert image.size == (SIZE, SIZE)

        def made(rows, folder):
            assert len({(folder / row["picture"]).read_bytes() for row in rows}) == 4

        runs = [([], codes), ([*new, "--model.predicts=reconstructions"], pictures)]
        return [*runs, (["--data.num_generated=4"], made)] if self.variational else runs

    def answers(self, model):
        images = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
        with torch.no_grad():
            made = model.eval().decode_latents(model.encode_pictures(images))
        return made.shape == images.shape and made.dtype == torch.uint8

    def check_export(self, folder, checkpoint):
        content = torch.load(checkpoint, weights_only=True)
        module, _, name = content["hyper_parameters"]["_class_path"].rpartition(".")
        model = getattr(importlib.import_module(module), name).load_from_checkpoint(checkpoint, weights_only=True)
        model.eval()
        images = torch.randint(256, (3, *model.image_shape), dtype=torch.uint8)
        with torch.no_grad():
            latents = model.encode_pictures(images)
            made = model.decode_latents(latents)
        for kind in ("torch", "onnx"):
            found = load_exported(folder / "encoder", kind)(images)["latents"]
            assert torch.allclose(found, latents, atol=1e-4)
            again = load_exported(folder / "decoder", kind)(latents)["images"]
            assert (again.int() - made.int()).abs().max() <= 1
        description = json.loads((folder / "decoder" / "description.json").read_text(encoding="utf-8"))
        assert description["latent_shape"] == [6]

    def broken(self, folder):
        few = {"cat": 20, "dog": 20}
        cut = write_truncated(write_folders(folder / "cut", few) / "cat" / "broken.jpg")
        text = write_folders(folder / "text", few) / "dog" / "text.png"
        text.write_text("no picture")
        # the digits are gray
        gray = [(["--model.likelihood=bernoulli"], ["pixel value", "likelihood to logistic"])]
        idle = [(["--model.beta=0", "--model.free_bits=1", "--model.kl_warmup=0"], ["free_bits is 1", "beta is 0"])]
        return [
            (["--data.source", str(folder / "nowhere")], ["nowhere", "name a folder"]),
            (
                ["--data.source", str(folder / "cut"), "--data.val_fraction=0"],
                [cut.name, "cut off", "replace or remove"],
            ),
            (["--data.source", str(folder / "text"), "--data.val_fraction=0"], [text.name, "no picture"]),
            (["--data.channels=3"], ["3 channels", "model.channels is 1"]),
            (["--data.image_size=12"], ["12 x 12", "model.image_size is 8 x 8"]),
            (["--model.latent_dim=0"], ["latent_dim is 0", "1 or more"]),
            (["--model.config={widths: [4, 4, 4, 4]}"], ["halves pictures 4 times", "9 is the next image_size"]),
            *(gray + idle if self.variational else [(["--model.masking_noise=1"], ["masking_noise is 1", "below 1"])]),
        ]
