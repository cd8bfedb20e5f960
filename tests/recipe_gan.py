"""What the family contract needs to know of GANs on `Images`: tiny digits, untrained pictures, what can be broken."""

import json

import torch

from lightning_bigmodels import GAN, Images
from lightning_bigmodels.callbacks.picture_features import PixelFeatures
from lightning_bigmodels.export import load_exported
from lightning_bigmodels.tasks.sample_comparison import frechet_distance
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests import contract
from tests.generative_parts import callbacks_of, digits, made_of_noise
from tests.toy_pictures import write, write_folders, write_truncated

SIZE = 16
NUM_COMPARED = 60


class Contract(contract.Contract):
    metric = "val_fid_pixels"
    steps = 60
    short_steps = 6  # Adam makes a sum's rounding larger with every step
    uneven_batch_size = 7

    def __init__(self):
        self.num_classes = 0

    def tiny(self, recipe, folder):
        own = recipe["model"]["init_args"]
        self.num_classes = own.get("num_classes", 0)
        # Adam would make steps of gradients that are rounding alone, which differ between strategies
        optimizer = {"init_args": {"lr": 0.005, "eps": 1e-4}}
        small = {
            "SampleQuality": {"num_pictures": NUM_COMPARED, "collapse_threshold": 0.0},
            "Samples": {"num_pictures": 4},
        }
        return {
            "trainer": {**self.lengths(), "callbacks": callbacks_of(recipe, small)},
            "model": {
                "init_args": {
                    "image_size": SIZE,
                    "latent_dim": 8,
                    "generator_features": 8,
                    "discriminator_features": 8,
                    "optimizer": optimizer,
                    "discriminator_optimizer": optimizer,
                    "schedule": {"init_args": {"final": 0.5}},
                    "discriminator_schedule": {"init_args": {"final": 0.5}},
                }
            },
            "data": digits(SIZE, channels=1),
        }

    def baseline(self, data_args):
        """Return the distance of what a generator makes that has learned nothing."""
        data = Images(**data_args)
        data.setup("fit")
        real = torch.cat([batch["images"] for batch in data.val_dataloader()])[:NUM_COMPARED]
        model = GAN(SIZE, 1, latent_dim=8, generator_features=8)
        model.configure_model()
        with torch.no_grad():
            made = model.eval().generate_pictures(SampleNoise(torch.arange(len(real)), 0))
        features = PixelFeatures()
        return float(frechet_distance(features(real).double(), features(made).double()))

    def better(self, found, baseline):
        return min(found) < 0.5 * baseline

    def predictions(self, folder, scratch):
        return made_of_noise(scratch, SIZE, self.num_classes, seed=0)

    def answers(self, model):
        indices = torch.arange(3)
        with torch.no_grad():
            pictures = model.eval().generate_pictures(SampleNoise(indices, 1), model.labels_in_turn(indices))
        return pictures.shape == (3, 1, SIZE, SIZE) and pictures.dtype == torch.uint8 and bool(pictures.any())

    def check_export(self, folder, checkpoint):
        model = GAN.load_from_checkpoint(checkpoint, weights_only=True).eval()
        noise = SampleNoise(torch.arange(5), 3)
        inputs = [noise.normal(8), *([torch.arange(5)] if self.num_classes else [])]
        with torch.no_grad():
            expected = model.generate_pictures(SampleNoise(torch.arange(5), 3), *inputs[1:])
        for kind in ("torch", "onnx"):
            found = load_exported(folder, kind)(*inputs)["pictures"]
            assert (found.int() - expected.int()).abs().max() <= 1
        description = json.loads((folder / "description.json").read_text(encoding="utf-8"))
        assert description.get("class_names") == (list("0123456789") if self.num_classes else None)

    def broken(self, folder):
        few = {"cat": 20, "dog": 20}
        if self.num_classes:
            for number in range(40):
                write(folder / "bare" / f"{number}.png", 0, number)
            return [
                (["--data.labelled=false", "--data.source", str(folder / "bare")], ["no class each", "data.labelled"]),
                (["--model.num_classes=7"], ["10 classes", "model.num_classes to 10"]),
                (["--model.discriminator_norm=batch"], ["batch norm", "discriminator_norm to layer"]),
                (["--model.gradient_penalty=-1"], ["gradient_penalty is -1", "0 or more"]),
            ]
        cut = write_truncated(write_folders(folder / "cut", few) / "cat" / "broken.jpg")
        text = write_folders(folder / "text", few) / "dog" / "text.png"
        text.write_text("no picture")
        everything = ["--data.val_fraction=0", "--data.test_fraction=0"]
        return [
            (["--data.source", str(folder / "nowhere")], ["nowhere", "name a folder"]),
            (["--data.source", str(folder / "cut"), *everything], [cut.name, "cut off", "replace or remove"]),
            (["--data.source", str(folder / "text"), *everything], [text.name, "no picture"]),
            (["--data.channels=3"], ["3 channels", "1"]),
            (["--data.image_size=8"], ["8 x 8", "16 x 16"]),
            (["--model.image_size=28"], ["image_size is 28", "data.image_size to 32"]),
            (["--data.batch_size=9999"], ["9999", "batch_size"]),
        ]

    def without_randomness(self, recipe):
        # at a lower rate: where a rectifier turns, a penalty on slopes makes a jump of a sum's rounding
        return [f"--model.{name}.init_args.lr=0.0003" for name in ("optimizer", "discriminator_optimizer")]
