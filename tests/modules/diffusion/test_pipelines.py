"""Folders for diffusers: they load without this package, and make the same pictures of the same seeds."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_bigmodels
from lightning_bigmodels import Diffusion, Images
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.export import export
from lightning_bigmodels.modules.diffusion.pipelines import PIPELINE_FILE, check_pipeline, load_pipeline
from tests.modules.diffusion.toys import UNET, tiny
from tests.toy_pictures import write_folders

# diffusers 0.42 makes arrays of tensors in a way of which NumPy 2 warns
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STOCK = [{}, {"sampler": "ddpm", "noise_schedule": "cosine"}, {"sampler": "dpm_solver"}, {"process": "flow_matching"}]
OWN = [
    {"num_classes": 3, "guidance_scale": 2.0},
    {"process": "score_matching"},
    {"dit": True},
    {"dit": True, "num_classes": 3, "process": "flow_matching"},
]


def pictures_of(pipeline, seeds, **more):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipeline(generator=generators, num_inference_steps=4, **more).images
    return torch.from_numpy(np.stack([np.asarray(one) for one in made])).int()


def made_by(model, indices):
    """Return pictures and their seeds, as predict has them."""
    rows = model.predict_step({"indices": indices}, 0)
    return torch.stack([model._made[index] for index in indices.tolist()])[:, 0].int(), [row["seed"] for row in rows]


@pytest.mark.parametrize("changes", STOCK)
def test_a_u_net_becomes_a_pipeline_that_diffusers_knows(changes, tmp_path):
    from diffusers import DDPMPipeline

    model = tiny(**changes).eval()
    with torch.no_grad():
        expected, seeds = made_by(model, torch.arange(3))
    pipeline = load_pipeline(export(model, tmp_path / "out"))
    assert type(pipeline) is DDPMPipeline
    assert not (tmp_path / "out" / PIPELINE_FILE).exists()
    found = pictures_of(pipeline, seeds, batch_size=3)
    assert (found - expected).abs().max() <= 1
    assert expected.float().std() > 10
    description = json.loads((tmp_path / "out" / "description.json").read_text())
    assert description["num_inference_steps"] == 4


@pytest.mark.parametrize("changes", OWN)
def test_others_bring_their_pipeline_along(changes, tmp_path):
    model = tiny(**changes).eval()
    model.class_names = ["cat", "dog", "fox"] if model.num_classes else None
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        expected, seeds = made_by(model, torch.arange(3))
    pipeline = load_pipeline(export(model, tmp_path / "out"))
    assert "lightning_bigmodels" not in (tmp_path / "out" / PIPELINE_FILE).read_text()
    more = {"class_labels": [0, 1, 2]} if model.num_classes else {"batch_size": 3}
    found = pictures_of(pipeline, seeds, **more)
    assert (found - expected).abs().max() <= 1
    if model.num_classes:
        assert pipeline.config.class_names == ["cat", "dog", "fox"]
        assert (pictures_of(pipeline, seeds, class_labels=[1, 2, 0]) - expected).abs().max() > 1
        with pytest.raises(ValueError, match="the network knows 3 classes; give class_labels"):
            pipeline()


def test_first_noise_may_be_given(tmp_path):
    model = tiny(num_classes=2).eval()
    pipeline = load_pipeline(export(model, tmp_path / "out"))
    latents = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    with torch.no_grad():
        expected = model.make_pictures([5, 6], torch.tensor([1, 0]))
    found = pipeline(class_labels=[1, 0], latents=latents, output_type="pt").images
    assert ((found * 255).round() - expected).abs().max() <= 1


def test_a_folder_that_gives_other_pictures_is_no_export(tmp_path):
    model = tiny().eval()
    folder = export(model, tmp_path / "out")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: -value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(RunError, match="pictures differ from the model's by up to"):
        check_pipeline(model, folder)


def test_training_goes_on_from_the_network_of_a_folder_and_its_checkpoint_needs_it_no_more(tmp_path, trainer):
    model = tiny(num_classes=2)
    folder = export(model, tmp_path / "out")
    started = tiny(seed=5, pretrained=str(folder / "network"), config=None, num_classes=2)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, started.network.state_dict()[name])
    source = write_folders(tmp_path / "pictures", {"cat": 6, "dog": 6})
    data = Images(str(source), image_size=8, channels=1, val_fraction=0.25, batch_size=4)
    fitter = trainer(max_steps=1)
    fitter.fit(started, data)
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    shutil.rmtree(folder)
    loaded = Diffusion.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for name, value in started.network.state_dict().items():
        assert torch.equal(value, loaded.network.state_dict()[name])


def test_a_pipelines_folder_is_as_good_as_its_networks(tmp_path):
    model = tiny()
    started = tiny(seed=5, pretrained=str(export(model, tmp_path / "out")), config=None)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, started.network.state_dict()[name])


def test_weights_that_are_described_otherwise_are_refused(tmp_path):
    folder = export(tiny(num_classes=2), tmp_path / "out") / "network"
    for changes, words in [
        ({"num_classes": 3}, "knows 2 classes and num_classes is 3; set it to 2"),
        ({"num_classes": 2, "channels": 3}, "has 1 channels; set model.channels"),
        ({"num_classes": 2, "image_size": 9}, "the next that it can make is 10"),
        ({"architecture": "DiTTransformer2DModel"}, "holds a UNet2DModel; set model.architecture to it"),
    ]:
        with pytest.raises(InputError) as error:
            tiny(pretrained=str(folder), config=None, **changes)
        assert words in str(error.value)
    with pytest.raises(InputError, match=r"pretrained '.*nowhere' cannot be read: .*; name a folder of diffusers"):
        tiny(pretrained=str(tmp_path / "nowhere"), config=None)


def test_diffusers_is_imported_by_nothing_but_files_that_leave_the_package():
    for path in Path(lightning_bigmodels.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "diffusers" for name in names):
                assert path.name.startswith("standalone_"), path
            assert not any("standalone_" in name for name in names), path


def test_unknown_sizes_of_u_nets_are_told_by_their_levels():
    with pytest.raises(
        InputError, match="UNet2DModel of 3 levels makes multiples of 4; the next that it can make is 12"
    ):
        tiny(
            image_size=10,
            config={
                **UNET,
                "block_out_channels": [8, 8, 8],
                "down_block_types": ["DownBlock2D"] * 3,
                "up_block_types": ["UpBlock2D"] * 3,
            },
        )
