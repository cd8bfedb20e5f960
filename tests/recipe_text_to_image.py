"""What the family contract needs to know of recipes on `CaptionedImages`."""

import json

import numpy as np
import torch
from PIL import Image

from lightning_bigmodels import CaptionedImages
from lightning_bigmodels.data.vision.shapes import shape_parts
from tests import contract

SIZE = 16
NETWORK = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
ENCODER = {
    "model_type": "clip_text_model",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
AUTOENCODER = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}


class Contract(contract.Contract):
    metric = "val_loss"
    steps = 60
    short_steps = 6  # Adam makes a sum's rounding larger with every step

    def tiny(self, recipe, folder):
        latents = recipe["model"]["init_args"].get("autoencoder") is not None
        source = "shapes:80"
        size = SIZE
        model = {
            "config": NETWORK,
            "text_encoder_config": ENCODER,
            "image_size": size,
            "num_sampling_steps": 4,  # ddim takes but divisors of the steps of the noise
            "optimizer": {"init_args": {"lr": 0.01}},
        }
        if latents:
            write_autoencoder(folder / "vae")
            write_encoder(folder / "text")
            write_pictures(folder / "pictures", 90)
            source = str(folder / "pictures")
            model |= {
                "autoencoder": str(folder / "vae"),
                "autoencoder_config": AUTOENCODER,
                "text_encoder": str(folder / "text"),
                "latent_cache": str(folder / "latents"),
            }
        data = {"source": source, "image_size": size, "batch_size": 8, "num_workers": 0, "bucket_step": 4}
        data |= {"aspect_buckets": latents, "val_fraction": 0.2, "test_fraction": 0.1, "eval_batch_size": 8}
        return {"trainer": self.lengths(), "model": {"init_args": model}, "data": {"init_args": data}}

    def baseline(self, data_args):
        """Return the loss of a network that says nothing."""
        # of latents it is asked for the noise
        return 1.0 if data_args["aspect_buckets"] else self._of_velocity(data_args)

    def _of_velocity(self, data_args):
        """Return the mean square of the way from pixels to noise."""
        data = CaptionedImages(**data_args)
        data.setup("fit")
        pixels = torch.cat([batch["images"] for batch in data.val_dataloader()]).float() / 127.5 - 1
        return 1 + float(pixels.square().mean())

    def better(self, found, baseline):
        return found[-1] < 0.9 * baseline and found[-1] < found[0]

    def predictions(self, folder, scratch):
        prompts = scratch / "prompts.txt"
        prompts.write_text("a red circle\na blue square left of a red circle\na green triangle\n", encoding="utf-8")

        def of_file(rows, folder):
            assert [row["prompt"] for row in rows] == prompts.read_text(encoding="utf-8").splitlines()
            assert len({row["seed"] for row in rows}) == len(rows)
            for row in rows:
                with Image.open(folder / row["picture"]) as image:
                    assert image.info == {"prompt": row["prompt"], "seed": str(row["seed"])}
                    assert image.size == (SIZE, SIZE)

        def of_list(rows, folder):
            assert [row["prompt"] for row in rows] == ["a red circle"] * 2
            pictures = [np.asarray(Image.open(folder / row["picture"])) for row in rows]
            assert (pictures[0] != pictures[1]).any()

        flags = ["--data.predict_prompts", "[a red circle]", "--data.pictures_per_prompt", "2"]
        return [(["--data.predict_prompts", str(prompts)], of_file), (flags, of_list)]

    def answers(self, model):
        model.eval()
        with torch.no_grad():
            made = model.make_pictures(["a red circle", "a blue square"], [0, 0])
        return made.dtype == torch.uint8 and made.shape == (2, 3, SIZE, SIZE) and bool((made[0] != made[1]).any())

    def check_export(self, folder, checkpoint):
        from lightning_bigmodels import TextToImage
        from lightning_bigmodels.modules.diffusion.pipelines import load_pipeline
        from lightning_bigmodels.modules.diffusion.text_pipelines import call_of

        model = TextToImage.load_from_checkpoint(checkpoint, weights_only=True).eval()
        prompts, seeds = ("a red circle", "a blue square"), [3, 4]
        found = load_pipeline(folder)(output_type="np", **call_of(model, prompts, seeds, 4)).images
        with torch.no_grad():
            expected = model.make_pictures(prompts, seeds, 4).permute(0, 2, 3, 1).float()
        assert (torch.from_numpy(found) * 255 - expected).abs().max() < 1
        assert json.loads((folder / "description.json").read_text())["model"] == "TextToImage"

    def broken(self, folder):
        return broken_captions(folder)


def write_pictures(folder, number, size=SIZE):
    """Write pictures of several shapes, with their captions beside them."""
    folder.mkdir()
    part = shape_parts(f"shapes:{number}", size)["train"]
    for index in range(number):
        pixels = part.picture(index).permute(1, 2, 0).numpy()
        shape = (size, size) if index % 3 else (2 * size, size)
        Image.fromarray(pixels).resize(shape).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(part.scene(index).caption + "\n", encoding="utf-8")


def write_autoencoder(folder):
    """Write an AutoencoderKL of random weights."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**AUTOENCODER).save_pretrained(folder)


def write_encoder(folder):
    """Write a text encoder of random weights, with a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from lightning_bigmodels.data.tokenizer import train_tokenizer

    part = shape_parts("shapes:200", SIZE)["train"]
    tokenizer = train_tokenizer([part.scene(index).caption for index in range(200)], ENCODER["vocab_size"])
    tokenizer.model_max_length = ENCODER["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    values = {key: value for key, value in ENCODER.items() if key != "model_type"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(CLIPTextConfig(**values)).save_pretrained(folder)


def broken_captions(folder):
    """Return what can be wrong with pictures and captions: flags, and what the one line must say."""

    def source(name, **files):
        place = folder / name
        write_pictures(place, 12)
        for file, content in files.items():
            stem, _, suffix = file.rpartition("_")
            path = place / f"{stem}.{suffix}"
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        return ["--data.source", str(place)]

    table = folder / "metadata"
    write_pictures(table, 4)
    lines = ["file_name,text", "000.png,a red circle", "001.png,", "002.png,a square"]
    (table / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "empty").mkdir()
    return [
        (["--data.source", str(folder / "gone")], ["gone is no folder", "correct data.source"]),
        (["--data.source", str(folder / "empty")], ["empty holds no picture"]),
        (source("alone", **{"003_png": None}), ["003.txt: a caption without a picture", "add the picture"]),
        (source("mute", **{"004_txt": None}), ["004.png: a picture without a caption", "write 004.txt beside it"]),
        (source("blank", **{"005_txt": b" \n"}), ["005.txt, line 1: the caption is empty"]),
        (["--data.source", str(table)], ["metadata.csv, line 3: column 'text' is empty"]),
        (["--data.source", str(table), "--data.caption_column", "texts"], ["no column 'texts'; did you mean 'text'?"]),
        (source("cut", **{"006_png": b"\x89PNG\r\n\x1a\n"}), ["006.png is"]),
        (["--data.image_size=20", "--model.image_size=21"], ["21"]),
        (["--model.caption_dropout=0"], ["guidance_scale needs a network that also learned to do without captions"]),
    ]
