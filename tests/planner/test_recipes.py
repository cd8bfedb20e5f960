"""What a plan says a recipe's step holds is what it really allocates."""

import pytest

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.batch_search import Search
from lightning_bigmodels.batch_size import find_batch_size
from lightning_bigmodels.planner.flags import setting_of
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.trainer import Trainer
from tests.test_recipes import ONE_PROCESS, PARAMETERS, Run

LARGER = {
    "autoencoder/denoising": ["--model.image_size=16", "--data.image_size=16"],
    "gan/dcgan": ["--model.image_size=32", "--data.image_size=32"],
}
"""Tiny versions of less than half a MiB, of which the 16 KiB that a convolution takes for itself would be 5 %."""
MIDDLE = {
    "autoencoder/denoising": [],
    "gan/dcgan": [],
    "image/fashion_mnist": [],
    "segmentation/digits": ["--trainer.accumulate_grad_batches=2"],
    "super_resolution/edsr_x2": ["--trainer.precision=32-true"],
    "text/quickstart": [],
}
"""Recipes at full size, on batches of their own size, with another setting of some."""


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Return a list to which `bigmodels batch-size` adds what is planned and what is allocated."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    found = []

    def batch_size(trainer, model, datamodule=None, **options):
        rows = datamodule.batch_size
        found.append(simulate(model, datamodule, setting_of(trainer, datamodule)).peak.total)
        found.extend(find_batch_size(trainer, model, datamodule, max_batch_size=rows).peaks)

    monkeypatch.setattr(Trainer, "batch_size", batch_size)
    # one step, of the recipe's own batch
    monkeypatch.setattr(Search, "next_size", lambda search: None if search.trials else search.max_size)
    return found


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_1_the_planned_peak_is_within_two_percent_of_the_allocated_one(name, tmp_path, text_file, found):
    assert Run(name, tmp_path, text_file, tmp_path).command("batch-size", *LARGER.get(name, [])) == 0
    planned, allocated = found
    assert planned == pytest.approx(allocated, rel=0.02)


@pytest.mark.parametrize("name", MIDDLE)
def test_the_planned_peak_at_full_size_is_within_two_percent_of_the_allocated_one(name, tmp_path, found):
    flags = [f"--trainer.{key}={value}" for key, value in ONE_PROCESS.items()]
    assert main(["batch-size", "--config", name, *flags, f"--trainer.default_root_dir={tmp_path}", *MIDDLE[name]]) == 0
    planned, allocated = found
    assert planned == pytest.approx(allocated, rel=0.02)
