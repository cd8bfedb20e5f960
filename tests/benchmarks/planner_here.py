"""Compares plans with real steps on this machine: `python tests/benchmarks/planner_here.py`.

Every recipe, or those that are named, is planned on one device, the GPU if there is one, else the CPU with the threads
of OMP_NUM_THREADS, and then trains some steps on made-up batches. A recipe that does not fit, or would take too long,
is made smaller by its own flags, in the first of SMALLER's ways that fits by its plan. Each has a process of its own.
Real GiB are those that torch's allocator handed out at the peak of a step; PlanCheck measures both. Errors are those of
the plan: above 0 where it says too much. Run nothing else beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from lightning.pytorch import Callback

from lightning_bigmodels.__main__ import main as bigmodels
from lightning_bigmodels.callbacks import PlanCheck, WeightAverage
from lightning_bigmodels.peak_memory import GIB
from lightning_bigmodels.planner.calibration import FILE_NAME, Machine
from lightning_bigmodels.planner.simulation import _Batches
from lightning_bigmodels.recipe_files import list_recipes
from lightning_bigmodels.trainer import Trainer

STEPS = 14
"""That PlanCheck needs: one that is left out, ten that are timed, and on a CPU three for memory."""
ONE_DEVICE = {
    "accelerator": "auto",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "sync_batchnorm": False,
    "max_epochs": -1,
    "max_steps": 10**6,
    "limit_val_batches": 0,
    "log_every_n_steps": 10**6,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
NARROW_LLAMA = "hidden_size=512 intermediate_size=1792 num_attention_heads=8 num_key_value_heads=2 vocab_size=16384"
SMALLER = {
    "detection/fasterrcnn_coco": [
        "--data.picture_size=320 --model.network_args.min_size=320 --model.network_args.max_size=320",
    ],
    "image/finetune_efficientnet": ["--data.batch_size=8"],
    "image/resnet50_imagenet": ["--data.batch_size=32", "--data.batch_size=8"],
    "segmentation/cityscapes": ["--data.image_size=513", "--data.image_size=257"],
    "text/llama_8b": [
        "--model.config.num_hidden_layers=8 --data.block_size=4096",
        "--model.config.num_hidden_layers=4 --data.block_size=512 --trainer.accumulate_grad_batches=2 "
        "--model.compile=false " + " ".join(f"--model.config.{size}" for size in NARROW_LLAMA.split()),
    ],
    "text_to_image/latent_diffusion": [
        "--data.batch_size=8",
        "--data.batch_size=2 --data.image_size=256 --model.image_size=256 "
        "--model.config.block_out_channels=[160,320,640,640]",
    ],
}
"""Flags that make a recipe smaller, largest first."""
FETCHED = {
    "detection/fasterrcnn_coco": ("backbone_weights", "resnet50"),
    "image/finetune_efficientnet": ("weights", "efficientnet_b0"),
    "segmentation/cityscapes": ("backbone_weights", "resnet101"),
}
"""Weights that a recipe begins with: their flag, and the network of torchvision's that they are of."""


class Stop(Callback):
    """Ends a run that has been compared with its plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = (self.folder / FILE_NAME).exists()


def draw_weights(recipe: str, folder: Path) -> list[str]:
    """Write drawn weights in place of those that a recipe would fetch; return the flags that name them."""
    if recipe in FETCHED:
        import torchvision

        flag, network = FETCHED[recipe]
        torch.save(torchvision.models.get_model(network, weights=None).state_dict(), folder / "drawn.pth")
        return [f"--model.{flag}={folder / 'drawn.pth'}"]
    if recipe != "text_to_image/latent_diffusion":
        return []
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    path = next(known.path for known in list_recipes() if known.name == recipe)
    arguments = yaml.safe_load(path.read_text())["model"]["init_args"]
    config = {name: value for name, value in arguments["text_encoder_config"].items() if name != "model_type"}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
    AutoencoderKL(**arguments["autoencoder_config"]).save_pretrained(folder / "autoencoder")
    return [f"--model.{name}={folder / name}" for name in ("text_encoder", "autoencoder")]


def compare(folder: Path, recipe: str, flags: list[str], most_seconds: float, most_gib: float) -> int:
    """Plan and train a recipe in this process, or write into the folder why it is too large."""

    def train(trainer: Trainer, model: Any, datamodule: Any = None, **_: Any) -> None:
        model.uses_no_data = True
        if hasattr(model, "unfreeze_after"):
            model.unfreeze_after = 0.0  # as the plan has it
        check = PlanCheck(when="always", seconds=3600)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
        trainer.callbacks = [*averages, check, Stop(folder)]
        check.plan(trainer, model, datamodule)
        plan = check._plan
        if plan is None:
            raise SystemExit("there is no plan")  # PlanCheck has said why
        gib, seconds = plan.room.used / GIB, plan.time.seconds
        assumed = [name for name in plan.assumptions if name != "aten::_local_scalar_dense"]
        more = {"assumptions": assumed, "bound": plan.time.bound}
        (folder / "plan.json").write_text(json.dumps(more))
        if not plan.room.fits or gib > most_gib or STEPS * seconds > most_seconds:
            (folder / "too_large").write_text(f"{gib:.1f} GiB and {seconds:.2g} s a step")
            return
        trainer.fit(model, datamodule=_Batches(datamodule, datamodule.batch_size, 10**6))

    options = [f"--trainer.{name}={str(value).lower()}" for name, value in ONE_DEVICE.items()]
    options += [f"--trainer.default_root_dir={folder}", *draw_weights(recipe, folder), *flags]
    # a verb that has the Trainer, the model and its data, and reads none
    with mock.patch.object(Trainer, "batch_size", train):
        return bigmodels(["batch-size", "--config", recipe, *options])


def compare_apart(recipe: str, flags: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was planned and real of a recipe, of which a process of its own was told; or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limits = [str(options.seconds), str(options.gib)]
        command = [sys.executable, __file__, "--child", name, *limits, recipe, *flags.split()]
        environment = {**os.environ, "WANDB_MODE": "disabled"}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        row: dict[str, Any] = {"recipe": recipe, "smaller": flags}
        if (folder / "plan.json").exists():
            row |= json.loads((folder / "plan.json").read_text())
        if (folder / "too_large").exists():
            return {**row, "too_large": (folder / "too_large").read_text()}
        if done.returncode or not (folder / FILE_NAME).exists():
            return {**row, "failure": (done.stderr.strip().splitlines() or ["no word of it"])[-1]}
        return row | json.loads((folder / FILE_NAME).read_text())


def error(row: dict[str, Any], name: str) -> float | None:
    """Return the error of a plan, or None where nothing was measured."""
    return row["planned"][name] / row["real"][name] - 1 if name in row.get("real", ()) else None


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['recipe']:<32}", end="")
    if "planned" not in row:
        what = f"too large: {row['too_large']}" if "too_large" in row else row["failure"]
        print(f"{what}{'; with ' if row['smaller'] else ''}{row['smaller']}", flush=True)
        return
    for name, digits in (("gib", 3), ("step_seconds", 3)):
        found = error(row, name)
        real = "-" if found is None else f"{row['real'][name]:.{digits}f}"
        print(f"{row['planned'].get(name, 0.0):>9.{digits}f}{real:>9}{percent(found):>9}", end="")
    notes = [*row["smaller"].split(), *(["an upper bound"] if row["assumptions"] else [])]
    print(f"  {row['bound']:<9}{' '.join(notes)}".rstrip(), flush=True)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def print_summary(rows: list[dict[str, Any]]) -> None:
    measured = next((row for row in rows if "of" in row), None)
    if measured is None:
        return
    machine = Machine(**measured["of"]["machine"])
    print(f"\n{machine}, torch {machine.torch}")
    for name, what in (("gib", "memory"), ("step_seconds", "time")):
        for bounds, kind in ((False, ""), (True, ", upper bounds")):
            of_kind = [row for row in rows if bool(row.get("assumptions")) == bounds]
            sizes = sorted(abs(found) for row in of_kind if (found := error(row, name)) is not None)
            if sizes:
                decile = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
                print(
                    f"  {what:<8}{len(sizes):>3} recipes{kind}: median error {statistics.median(sizes):.1%}, ninth "
                    f"decile {decile:.1%}, largest {sizes[-1]:.1%}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="these alone")
    parser.add_argument("--json", metavar="FILE", help="where all numbers go too")
    parser.add_argument("--seconds", type=float, default=60, help="that the steps of a recipe may take by its plan")
    parser.add_argument("--gib", type=float, default=1000, help="that a recipe may use, if less than the device has")
    options = parser.parse_args()
    known = [recipe.name for recipe in list_recipes()]
    unknown = [name for name in options.recipes if name not in known]
    if unknown:
        parser.error(f"there is no recipe {', '.join(unknown)}; there are {', '.join(known)}")
    print(f"{'recipe':<32}{'GiB plan':>9}{'real':>9}{'error':>9}{'s plan':>9}{'real':>9}{'error':>9}  bound by")
    rows = []
    for recipe in options.recipes or known:
        for flags in ("", *SMALLER.get(recipe, ())):
            row = compare_apart(recipe, flags, options)
            if "too_large" not in row:
                break
        rows.append(row)
        print_row(row)
    print_summary(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    if any("failure" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        where, seconds, gib, name, *more = sys.argv[2:]
        raise SystemExit(compare(Path(where), name, more, float(seconds), float(gib)))
    main()
