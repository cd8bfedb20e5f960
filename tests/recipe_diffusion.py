"""What the family contract needs to know of diffusion on `Images`: tiny digits, a guess of zero, what can be broken."""

import json

import torch

from lightning_bigmodels import Diffusion, Images
from lightning_bigmodels.modules.diffusion.pipelines import PIPELINE_FILE, load_pipeline
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests import contract
from tests.generative_parts import callbacks_of, digits, made_of_noise
from tests.modules.diffusion.toys import DIT, UNET
from tests.toy_pictures import write_folders, write_truncated

SIZE = 8
STEPS = 4


class Contract(contract.Contract):
    metric = "val_loss"
    steps = 60
    short_steps = 4  # Adam makes a sum's rounding larger with every step
    uneven_batch_size = 7

    def __init__(self):
        self.model = {}

    def tiny(self, recipe, folder):
        own = recipe["model"]["init_args"]
        small = {
            "SampleQuality": {"num_pictures": 8, "collapse_threshold": 0.0},
            "Samples": {"num_pictures": 4},
            "WeightAverage": {"decay": 0.8},
        }
        changes = {
            "image_size": SIZE,
            "config": DIT if own["architecture"].startswith("DiT") else UNET,
            "num_sampling_steps": STEPS,
            # Adam would make steps of gradients that are rounding alone, which differ between strategies
            "optimizer": {"init_args": {"lr": 0.005, "eps": 1e-4}},
        }
        self.model = {key: value for key, value in (own | changes).items() if key not in ("optimizer", "schedule")}
        return {
            "trainer": {**self.lengths(), "callbacks": callbacks_of(recipe, small)},
            "model": {"init_args": changes},
            "data": digits(SIZE, val_fraction=0.04, channels=1),
        }

    def baseline(self, data_args):
        """Return the loss of a network that says zero whatever it sees."""
        data = Images(**data_args)
        data.setup("fit")
        model = Diffusion(**self.model)
        model.log = lambda *args, **kwargs: None
        model.predict_noise = lambda noisy, times, labels: 0 * noisy
        for batch in data.val_dataloader():
            model.step("val", batch)
        return float(model.metrics["val_loss"].compute())

    def better(self, found, baseline):
        return min(found) < 0.75 * baseline

    def predictions(self, folder, scratch):
        return made_of_noise(scratch, SIZE, self.model.get("num_classes", 0))

    def answers(self, model):
        indices = torch.arange(3)
        with torch.no_grad():
            pictures = model.eval().generate_pictures(SampleNoise(indices, 1), model.labels_in_turn(indices))
        return pictures.shape == (3, 1, SIZE, SIZE) and pictures.dtype == torch.uint8 and bool(pictures.any())

    def check_export(self, folder, checkpoint):
        model = Diffusion.load_from_checkpoint(checkpoint, weights_only=True).eval()
        classes = model.num_classes
        with torch.no_grad():
            expected = model.make_pictures([4, 5], torch.tensor([6, 7]) if classes else None)
        assert (folder / PIPELINE_FILE).exists() == bool(classes)
        given = {"class_labels": [6, 7]} if classes else {"batch_size": 2}
        generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
        pipeline = load_pipeline(folder)
        found = pipeline(generator=generators, num_inference_steps=STEPS, output_type="np", **given).images
        pixels = (torch.from_numpy(found).permute(0, 3, 1, 2) * 255).round()
        assert (pixels - expected).abs().max() <= 1
        description = json.loads((folder / "description.json").read_text(encoding="utf-8"))
        assert description["class_names"] == (list("0123456789") if classes else [])

    def broken(self, folder):
        few = {"cat": 20, "dog": 20}
        cut = write_truncated(write_folders(folder / "cut", few) / "cat" / "broken.jpg")
        bare = ["--data.val_fraction=0", "--model.num_classes=0", "--model.guidance_scale=1"]
        classes = [
            (["--data.labelled=false"], ["no class each", "data.labelled"]),
            (["--model.num_classes=7"], ["10 classes", "model.num_classes to 10"]),
            (["--model.label_dropout=0"], ["guidance_scale", "set label_dropout above 0"]),
        ]
        nothing = [(["--model.guidance_scale=3"], ["guidance_scale is 3", "no classes", "set num_classes"])]
        return [
            (["--data.source", str(folder / "nowhere")], ["nowhere", "name a folder"]),
            (["--data.source", str(folder / "cut"), *bare], [cut.name, "cut off", "replace or remove"]),
            (["--data.image_size=12"], ["12 x 12", "8 x 8"]),
            (["--model.image_size=9"], ["image_size is 9", "the next that it can make is 10"]),
            (["--model.sampler=dpm"], ["no sampler 'dpm'"]),
            *(classes if self.model.get("num_classes") else nothing),
        ]
