"""Judges pictures of prompts: `python tests/benchmarks/text_to_image.py`, with `--ckpt_path CHECKPOINT` for another.

The checkpoint is one of the recipe text_to_image/shapes, unless another is named that of its first run here. It draws
the prompts that the grammar of shapes has, those whose objects training showed and those with an object that it never
did. An `ImageClassifier`, trained here on pictures
made by rule, says what it sees in each place that the prompt names: the whole picture of a single object, or the half
in which each of two has to lie. It knows the 15 objects, and `something else`: nothing, two objects, cut ones, colours
between two. A picture is right in colour and shape if each object of the prompt is seen, and right in place too if each
is seen in its own half. How often the judge itself is right, on pictures that it never saw, is in the last line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_bigmodels import ImageClassifier, Images, TextToImage
from lightning_bigmodels.callbacks.report import write_picture
from lightning_bigmodels.callbacks.validation_pictures import grid
from lightning_bigmodels.data.vision.shapes import COLOURS, SHAPES, Object, Scene, draw, scenes
from lightning_bigmodels.optim import WarmupCosine
from lightning_bigmodels.pictures import captioned, wrapped

SIZE = 24
GROUND = 20
NAMES = [str(Object(colour, shape)) for colour in COLOURS for shape in SHAPES]
OTHER = "something else"


def view(picture: Tensor, side: str) -> Tensor:
    """Return what lies in a place of (3, H, W), in the middle of a picture (3, H, W)."""
    half = picture.shape[1] // 2
    rows = {"top": slice(0, half), "bottom": slice(half, None)}.get(side, slice(None))
    columns = {"left": slice(0, half), "right": slice(half, None)}.get(side, slice(None))
    part = picture[:, rows, columns]
    whole = torch.full_like(picture, GROUND)
    top, left = ((whole.shape[axis] - part.shape[axis]) // 2 for axis in (1, 2))
    whole[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return whole


def views_of(picture: Tensor, scene: Scene) -> list[tuple[Tensor, str]]:
    """Return what a picture of a scene shows in each place, with what should be seen."""
    return [(view(picture, side), str(thing)) for thing, side in scene.placed()]


def something_else(known: list[Scene], generator: torch.Generator) -> Tensor:
    """Return a view of no object: nothing, two, a cut one, or one between two colours."""
    pairs = [scene for scene in known if scene.second is not None]
    kind, first, second = (int(torch.randint(n, (), generator=generator)) for n in (4, len(pairs), len(pairs)))
    one, other = (draw(pairs[number], SIZE, generator) for number in (first, second))
    if kind == 0:
        return torch.full((3, SIZE, SIZE), GROUND, dtype=torch.uint8)
    if kind == 1:
        return one
    if kind == 2:
        # the half across: what was in one place is cut in two
        return view(one, {"left": "top", "right": "top"}.get(pairs[first].placed()[0][1], "left"))
    return ((one.float() + other.float()) / 2).to(torch.uint8)


def judged_views(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return views (N, H, W, 3) uint8 of pictures made by rule, and which of the names each has."""
    generator = torch.Generator().manual_seed(seed)
    known = scenes()
    single = known[: len(NAMES)]
    pictures, labels = [], []
    while len(pictures) < number:
        turn = len(pictures) % 4
        if turn == 0:
            found = [(something_else(known, generator), OTHER)]
        else:
            pool = single if turn == 1 else known
            scene = pool[int(torch.randint(len(pool), (), generator=generator))]
            found = views_of(draw(scene, SIZE, generator), scene)
        for picture, name in found:
            # of a network's pictures, which are never so clean
            noise = torch.randn(picture.shape, generator=generator) * 10 * torch.rand((), generator=generator)
            pictures.append((picture + noise).clamp(0, 255).to(torch.uint8))
            labels.append([*NAMES, OTHER].index(name))
    return torch.stack(pictures[:number]).permute(0, 2, 3, 1).numpy(), np.array(labels[:number])


def train_judge(folder: Path, number: int, epochs: int) -> ImageClassifier:
    """Return a classifier of views, trained by this package."""
    arrays = {}
    for part, count, seed in (("train", number, 1), ("test", 2000, 2)):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = judged_views(count, seed)
    np.savez(folder / "views.npz", class_names=np.array([*NAMES, OTHER]), **arrays)
    data = Images(str(folder / "views.npz"), image_size=SIZE, crop_scale=None, horizontal_flip=0.0, batch_size=64)
    judge = ImageClassifier(
        "small_cnn",
        num_classes=len(NAMES) + 1,
        image_size=SIZE,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.002),
        schedule=lambda optimizer, steps: WarmupCosine(optimizer, steps, warmup=0.1),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(judge, datamodule=data)
    return judge.eval()


@torch.no_grad()
def see(judge: ImageClassifier, pictures: list[Tensor]) -> list[str]:
    """Return the name of what is seen in each view."""
    assert judge.network is not None
    numbers = judge.network(torch.stack(pictures)).argmax(1)
    return [[*NAMES, OTHER][number] for number in numbers.tolist()]


def judge_pictures(judge: ImageClassifier, pictures: Tensor, known: list[Scene]) -> tuple[list[bool], list[bool]]:
    """Return for each picture of a scene whether colours and shapes are right, and whether places are right too."""
    shown, placed = [], []
    for picture, scene in zip(pictures, known, strict=True):
        wanted = [str(thing) for thing, _ in scene.placed()]
        axes = [["alone"]] if scene.second is None else [["left", "right"], ["top", "bottom"]]
        found = {side: see(judge, [view(picture, side)])[0] for sides in axes for side in sides}
        placed.append(all(found[side] == str(thing) for thing, side in scene.placed()))
        shown.append(any(sorted(found[side] for side in sides) == sorted(wanted) for sides in axes))
    return shown, placed


@torch.no_grad()
def draw_prompts(model: TextToImage, known: list[Scene], seed: int, batch_size: int = 64) -> Tensor:
    """Return the model's pictures (N, 3, H, W) of scenes."""
    pictures = []
    for start in range(0, len(known), batch_size):
        part = known[start : start + batch_size]
        seeds = [seed * 1_000_003 + start + number for number in range(len(part))]
        with torch.autocast("cpu", torch.bfloat16):
            pictures.append(model.make_pictures([scene.caption for scene in part], seeds))
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path",
        default="runs/shapes/fit/version_0/checkpoints/last.ckpt",
        help="checkpoint of text_to_image/shapes; that of the first fit here, if none is named",
    )
    parser.add_argument("--prompts", type=int, default=0, help="draw that many of each kind, evenly spread; 0: all")
    parser.add_argument("--guidance_scale", type=float, help="another one than the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge_views", type=int, default=12_000, help="views that the judge is trained on")
    parser.add_argument("--judge_epochs", type=int, default=6)
    parser.add_argument(
        "--output", type=Path, help="folder for results.json and a picture of some prompts of each kind"
    )
    arguments = parser.parse_args()
    pl.seed_everything(arguments.seed, verbose=False)

    with tempfile.TemporaryDirectory() as folder:
        judge = train_judge(Path(folder), arguments.judge_views, arguments.judge_epochs)
        images, labels = judged_views(2000, 3)
        seen = see(judge, list(torch.from_numpy(images).permute(0, 3, 1, 2)))
    right = float(np.mean([[*NAMES, OTHER][label] == name for label, name in zip(labels, seen, strict=True)]))

    model = TextToImage.load_from_checkpoint(arguments.ckpt_path, weights_only=True, map_location="cpu").eval()
    if arguments.guidance_scale is not None:
        model.sampling = model.sampling._replace(guidance_scale=arguments.guidance_scale)
    results = {"guidance_scale": model.sampling.guidance_scale, "judge": right}
    for name, unseen in (("seen", False), ("unseen", True)):
        known = [scene for scene in scenes() if scene.unseen == unseen]
        if arguments.prompts:
            known = known[:: max(1, len(known) // arguments.prompts)][: arguments.prompts]
        pictures = draw_prompts(model, known, arguments.seed)
        shown, placed = judge_pictures(judge, pictures, known)
        results[name] = {"prompts": len(known), "colour_and_shape": np.mean(shown), "place_too": np.mean(placed)}
        print(
            f"{name:7} {len(known):4} prompts: {np.mean(shown):.1%} right in colour and shape, {np.mean(placed):.1%} "
            f"in place too",
            flush=True,
        )
        if arguments.output is not None:
            step = max(1, len(known) // 32)
            chosen = list(range(0, len(known), step))[:32]
            cells = [
                captioned(pictures[k], wrapped(known[k].caption, pictures[k]), "black" if placed[k] else "red")
                for k in chosen
            ]
            write_picture(arguments.output / f"{name}.png", grid(cells, 8))
    print(f"judge   {right:.1%} right on 2000 views of pictures made by rule")
    if arguments.output is not None:
        (arguments.output / "results.json").write_text(json.dumps(results, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
