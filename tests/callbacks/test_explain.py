import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.callbacks import Explain
from lightning_bigmodels.data import Images
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from tests.patches import make_patches
from tests.toys import ToyData, ToyModel
from tests.workers import fit_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty pictures of two classes in a folder each."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures, labels, _ = make_patches(40, seed=0)
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        path = folder / ("lying" if label else "standing") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return folder


def data(folder, **changes):
    values = {"source": str(folder), "val_fraction": 0.3, "image_size": 32, "batch_size": 8, "crop_scale": None}
    return Images(**{**values, **changes})


def model(**changes):
    values = {"network": "small_cnn", "num_classes": 2, "image_size": 32}
    return ImageClassifier(**{**values, **changes})


def pictures_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


# ---- the callback


def test_it_writes_pictures_of_the_first_examples_and_trains_as_without(folder, trainer, tmp_path):
    weights = []
    for callbacks in ([], [Explain(num_examples=3, every_n_validations=2), Explain("occlusion", num_examples=1)]):
        torch.manual_seed(0)
        module = model()
        run = trainer(
            max_steps=9, val_check_interval=1, limit_val_batches=1, callbacks=callbacks, num_sanity_val_steps=1,
            default_root_dir=tmp_path,
        )  # fmt: skip
        run.fit(module, data(folder))
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    found = pictures_in(tmp_path)
    steps = [1, 3, 5, 7, 9]
    assert found == [f"explanations/grad_cam_step_{step:08d}.png" for step in steps] + [
        f"explanations/occlusion_step_{step:08d}.png" for step in range(1, 10)
    ]
    three, one = (pil_to_tensor(Image.open(tmp_path / name)).shape for name in (found[0], found[-1]))
    assert three[1] > 1.9 * one[1]  # in two rows
    assert three[2] > 1.9 * one[2]  # two beside each other
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients"])
def test_it_works_in_16_bits(folder, trainer, tmp_path, precision, method):
    run = trainer(max_steps=1, val_check_interval=1, precision=precision, callbacks=[Explain(method)])
    run.fit(model(), data(folder))
    assert pictures_in(tmp_path) == [f"explanations/{method}_step_00000001.png"]


def test_loggers_get_the_picture(folder, trainer, tmp_path):
    board = TensorBoardLogger(tmp_path, name="board")
    run = trainer(
        max_steps=1, val_check_interval=1, callbacks=[Explain()], logger=[CSVLogger(tmp_path, "csv", version=0), board]
    )
    run.fit(model(), data(folder))
    assert pictures_in(tmp_path / "csv/version_0") == ["explanations/grad_cam_step_00000001.png"]
    board.experiment.flush()
    (events,) = (tmp_path / "board").rglob("events*")
    assert b"explanations_grad_cam" in events.read_bytes()


def test_several_processes_explain_together_and_one_writes(folder, tmp_path):
    fits = fit_on(
        2, "fsdp2", model, lambda: data(folder), max_steps=1, limit_val_batches=1, val_check_interval=1,
        callbacks=[Explain(num_examples=2), Explain("integrated_gradients", num_examples=2)],
        default_root_dir=tmp_path,
    )  # fmt: skip
    assert len(fits) == 2
    assert len(pictures_in(tmp_path)) == 2


def test_what_does_not_fit_the_network_is_found_before_training(folder, trainer):
    for arguments, words in {
        ("grad_cam", "predicted", "head.7"): "no layer 'head.7'; did you mean 'head'",
        (
            "grad_cam",
            "lyin",
        ): "no class is named 'lyin'; did you mean 'lying'.; set target to a class, predicted or true",
    }.items():
        run = trainer(num_sanity_val_steps=1, callbacks=[Explain(*arguments)])
        with pytest.raises(InputError, match=words):
            run.fit(model(), data(folder))
        assert run.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "oclusion"}, "no method of explanation is named 'oclusion'; did you mean 'occlusion'"),
        ({"num_examples": 0}, "num_examples is 0; set it to 1 or more"),
        ({"every_n_validations": 0}, "every_n_validations is 0; set it to 1 or more"),
        ({"method": "occlusion", "layer": "x"}, "occlusion looks at none; choose grad_cam"),
        ({"window": 3}, "window is 3 and grad_cam has none; choose occlusion"),
        ({"baseline": 0.0}, "baseline is 0.0 and grad_cam has none"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Explain(**arguments)


def test_a_model_that_is_no_classifier_is_refused(trainer):
    with pytest.raises(InputError, match="ToyModel is no classifier that can be explained; choose another model"):
        trainer(num_sanity_val_steps=1, callbacks=[Explain()]).fit(ToyModel(), ToyData())


# ---- the verb


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Return a function that runs the verb on a trained checkpoint, and gives its exit code."""
    root = tmp_path_factory.mktemp("runs")
    common = [
        "--data", "Images", "--data.source", str(folder), "--data.val_fraction", "0.3", "--data.image_size", "32",
        "--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu",
        "--data.batch_size", "8", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    network = ["--model", "ImageClassifier", "--model.network", "small_cnn", "--model.num_classes", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        short = ["--model.image_size", "32", "--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]
        assert main(["fit", *common, *network, *short]) == 0
    (checkpoint,) = root.rglob("*.ckpt")

    def explain(*flags):
        return main(["explain", *common, "--ckpt_path", str(checkpoint), *flags]), root / "explain"

    return explain


def test_the_verb_explains_validation_pictures(run, capsys):
    code, folder = run("--part", "val", "--num_examples", "10", "--method", "integrated_gradients", "--target", "true")
    assert code == 0
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    assert pictures_in(newest) == [f"explanations/{i:06d}.png" for i in range(10)] + [
        "explanations/integrated_gradients_step_00000000.png"
    ]
    assert f"10 explanations in {newest}/explanations" in capsys.readouterr().out
    # what is validated in part has no metrics
    assert not (newest / "metrics.csv").exists()


def test_the_verb_explains_a_bare_folder(run, folder, tmp_path):
    pictures = sorted((folder / "lying").iterdir())[:3]
    for path in pictures:
        (tmp_path / path.name.replace(".png", " (1).png")).write_bytes(path.read_bytes())
    flags = ["--data.predict_source", str(tmp_path), "--target", "standing"]
    code, runs = run(*flags, "--trainer.precision", "bf16-mixed")
    assert code == 0
    newest = max(runs.iterdir(), key=lambda path: path.stat().st_mtime)
    names = [f"explanations/{i:06d}_{path.stem}_1_.png" for i, path in enumerate(pictures)]
    assert pictures_in(newest) == [*names, "explanations/grad_cam_step_00000000.png"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "gradcam"], "no method of explanation is named 'gradcam'; did you mean 'grad_cam'?"),
        (["--layer", "feature.0"], "the network has no layer 'feature.0'; did you mean 'features.0'?"),
        (["--layer", "hidden"], "hidden gives a tensor of shape ('B', 128), no maps of places; name a layer that does"),
        (["--target", "stading"], "no class is named 'stading'; did you mean 'standing'?"),
        (["--num_examples", "0"], "num_examples is 0; set it to 1 or more"),
        (["--part", "train"], "part"),
    ],
)
def test_the_verb_refuses_in_one_line(run, flags, words, capsys):
    assert run(*flags)[0] == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("bigmodels: error:") == 1


def test_a_bare_folder_has_no_true_classes(run, folder, capsys):
    assert run("--data.predict_source", str(folder / "lying"), "--target", "true")[0] == 2
    assert "the examples have no labels; set target to predicted or to a class" in capsys.readouterr().err


def test_untrained_weights_and_no_data_are_refused(tmp_path, capsys):
    model = ["--model", "ImageClassifier", "--model.network", "small_cnn", "--model.num_classes", "2"]
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main(["explain", *model, *root]) == 2
    assert "explain would look at untrained weights; name a checkpoint: --ckpt_path" in capsys.readouterr().err
    assert main(["explain", *model, *root, "--model.weights", "x.pth"]) == 2
    assert "no data is named" in capsys.readouterr().err
