"""The segmenter: every network, its losses and metrics by hand, exact on any number of processes, its pictures."""

import csv

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

from lightning_bigmodels import ImageSegmenter, SegmentationImages
from lightning_bigmodels.callbacks import ClassTable
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn import segmenters
from lightning_bigmodels.modules.cnn.registry import network_names
from lightning_bigmodels.modules.cnn.segmentation_metrics import (
    class_rows,
    dice_losses,
    pixel_metrics,
    summed_cross_entropy,
)
from tests.modules.cnn.segmenter_toys import DATA, DIGITS, TINY, batch_of, built
from tests.workers import run_on

NETWORKS = ["unet", *network_names("segmentation")]


# ---- networks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_builds_on_meta_for_any_classes_and_channels(name, channels):
    with torch.device("meta"):
        model = built(network=name, num_classes=5, channels=channels, network_args=None)
        assert model.network is not None
        assert model.logits({"images": torch.zeros(2, channels, 64, 80, dtype=torch.uint8)}).shape == (2, 5, 64, 80)
    blocks = {id(p) for block in model.blocks() for p in block.parameters()}
    covered = sum(p.numel() for p in model.network.parameters() if id(p) in blocks)
    assert covered > 0.97 * sum(p.numel() for p in model.network.parameters()) or name == "unet"
    for layer in model.output_modules():
        assert layer.out_channels == 5


# the larger of each kind differ in the number of their blocks alone
@pytest.mark.parametrize("name", ["unet", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_every_parameter_gets_a_gradient(name):
    model = built(network=name, network_args={"depth": 1, "width": 8} if name == "unet" else None)
    model.log = lambda *args, **kwargs: None
    masks = torch.randint(3, (2, 33, 40), generator=torch.Generator().manual_seed(0))
    model.step("train", batch_of(masks)).backward()
    for key, parameter in model.network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    assert all(p.grad.abs().sum() > 0 for layer in model.output_modules() for p in layer.parameters())


def test_the_auxiliary_output_is_there_where_it_has_a_weight():
    without = {"backbone", "classifier"}
    for weight, expected in {0.5: without | {"aux_classifier"}, 0.0: without}.items():
        with torch.device("meta"):
            model = built(network="fcn_resnet50", network_args=None, auxiliary=weight)
        assert {name.split(".")[1] for name, _ in model.network.named_parameters()} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "unett"}, "no segmentation network is named 'unett'; did you mean 'unet'"),
        ({"network": "deeplabv3_resnet18"}, "did you mean 'deeplabv3_resnet101'"),
        ({"num_classes": 1}, "num_classes is 1; set it to 2 or more"),
        ({"dice": -1.0}, "dice is -1.0; set it to 0 or more"),
        ({"class_weights": [1.0]}, "class_weights holds 1 numbers; give one for each class, 3"),
        ({"mean": [0.5]}, "mean holds 1 numbers; give one for each channel, 3"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ImageSegmenter(**{**TINY, **changes})


@pytest.mark.parametrize("options", [{"depth": -1}, {"deep": 2}])
def test_wrong_arguments_of_the_network_are_refused(options):
    with pytest.raises(InputError, match="unet cannot be built: .*correct model.network_args"):
        built(network_args=options)


# ---- weights


def test_weights_of_a_file_are_taken_but_for_other_classes(tmp_path):
    one = built()
    torch.save(one.state_dict(), tmp_path / "one.pth")
    other = built(num_classes=4, weights=str(tmp_path / "one.pth"))
    torch.manual_seed(1)
    for key, value in other.network.body.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(value, one.network.body.state_dict()[key]), key
    with pytest.raises(InputError, match="one.pth has no weights of the right shape for .* of unet"):
        built(weights=str(tmp_path / "one.pth"), network_args={"depth": 2, "width": 8, "norm": "group"})
    with pytest.raises(InputError, match="gone.pth: no such file"):
        built(weights=str(tmp_path / "gone.pth"))
    with pytest.raises(InputError, match="there are no weights 'DEFAULT' for unet"):
        built(weights="DEFAULT")


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_a_backbone_begins_from_a_classifiers_weights(name, tmp_path):
    torch.manual_seed(3)
    classifier = torchvision.models.mobilenet_v3_large()
    torch.save(classifier.state_dict(), tmp_path / "mobilenet.pth")
    model = built(network=name, network_args=None, backbone_weights=str(tmp_path / "mobilenet.pth"), channels=1)
    found, expected = model.network.body.backbone.state_dict(), classifier.features.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items() if key != "0.0.weight")
    # of a gray picture as of three equal channels
    assert torch.allclose(found["0.0.weight"], expected["0.0.weight"].sum(1, keepdim=True))
    with pytest.raises(InputError, match="backbone_weights do not go with unet"):
        built(backbone_weights=str(tmp_path / "mobilenet.pth"))
    torch.save({"features.0.0.weight": expected["0.0.weight"]}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="part.pth has no weights of the right shape for .*, the first backbone"):
        built(network=name, network_args=None, backbone_weights=str(tmp_path / "part.pth"))


# ---- losses by hand


def test_the_dice_loss_is_the_formula():
    logits = torch.log(torch.tensor([[[[0.5, 0.25, 1.0]], [[0.5, 0.75, 1e-30]]]]))  # one row of three pixels
    masks = torch.tensor([[[0, 1, IGNORED]]])
    # class 0: 2 * 0.5 / (1 + 0.75), class 1: 2 * 0.75 / (1 + 1.25)
    assert dice_losses(logits, masks).tolist() == pytest.approx([1 - (1 / 1.75 + 1.5 / 2.25) / 2])
    one_class = torch.tensor([[[0, 0, IGNORED]]])
    assert dice_losses(logits, one_class).tolist() == pytest.approx([1 - 2 * 0.75 / (2 + 0.75)])
    assert dice_losses(logits, torch.full_like(masks, IGNORED)).tolist() == [0]
    both = dice_losses(torch.cat([logits, logits]), torch.cat([masks, one_class]))
    assert torch.allclose(both, torch.cat([dice_losses(logits, masks), dice_losses(logits, one_class)]))


def test_the_summed_cross_entropy_is_torchs():
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    masks[0, :2] = IGNORED
    weights = torch.tensor([1.0, 2.0, 0.5])
    for given in (None, weights):
        total, weight = summed_cross_entropy(logits, masks, given)
        expected = F.cross_entropy(logits, masks, given, ignore_index=IGNORED)
        assert float(total / weight) == pytest.approx(float(expected), rel=1e-6)


def test_the_training_loss_is_cross_entropy_auxiliary_and_dice(monkeypatch):
    masks = torch.randint(3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    masks[1, :3] = IGNORED
    batch = batch_of(masks)
    model = built(network="fcn_resnet50", network_args=None, auxiliary=0.4, dice=0.3, class_weights=[1.0, 2.0, 3.0])
    out, aux = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    monkeypatch.setattr(model, "_outputs", lambda images: {"out": out, "aux": aux})
    model.log = lambda *args, **kwargs: None
    weights = torch.tensor([1.0, 2.0, 3.0])
    parts = [F.cross_entropy(logits, masks, weights, ignore_index=IGNORED) for logits in (out, aux)]
    expected = parts[0] + 0.4 * parts[1] + 0.3 * dice_losses(out, masks).mean()
    assert float(model.step("train", batch)) == pytest.approx(float(expected), rel=1e-6)
    assert float(model.step("train", {**batch, "masks": torch.full_like(masks, IGNORED)})) == 0


# ---- metrics by hand


def test_metrics_are_those_worked_out_by_hand():
    #            predicted: 0  1  2
    # truth 0 (4 pixels):   3  1  0
    # truth 1 (3 pixels):   0  2  1
    # class 3 is in neither, class 2 in the prediction alone
    truth = torch.tensor([[[0, 0, 0, 0, 1, 1, 1, IGNORED, IGNORED]]])
    predicted = torch.tensor([[[0, 0, 0, 1, 1, 1, 2, 0, 3]]])
    metrics = pixel_metrics("val", 4)
    metrics.update(predicted, truth)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == pytest.approx(
        {
            "val_mean_iou": (3 / 4 + 2 / 4 + 0) / 3,
            "val_mean_dice": (6 / 7 + 4 / 6 + 0) / 3,
            "val_pixel_accuracy": 5 / 7,
        }
    )
    rows = class_rows(metrics["val_mean_iou"].confmat, ["a", "b", "c", "d"])
    assert rows == [
        ("a", "4", "0.7500", "0.8571", "1.0000", "0.7500"),
        ("b", "3", "0.5000", "0.6667", "0.6667", "0.6667"),
        ("c", "0", "0.0000", "0.0000", "0.0000", ""),
        ("d", "0", "", "", "", ""),
    ]


def evaluate(processes, folder):
    """Validate and test on some processes; what each of them saw."""

    def work():
        from lightning.pytorch import Trainer

        torch.manual_seed(0)
        model = ImageSegmenter(**DIGITS)
        trainer = Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder / str(processes),
            callbacks=[ClassTable()],
        )
        data = SegmentationImages(**DATA, val_source=str(folder / "p"), val_masks=str(folder / "m"))
        (found,) = trainer.validate(model, data, verbose=False)
        return found, model.class_table()

    return run_on(processes, work)


def test_metrics_and_table_are_exact_on_one_two_and_three_processes(tmp_path):
    for name in ("p", "m"):
        (tmp_path / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        pixels = torch.randint(256, (20 + number, 28, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / "p" / f"{number}.png")
        mask = torch.randint(13, (20 + number, 28), dtype=torch.uint8, generator=generator)
        mask[mask > 10] = 255
        Image.fromarray(mask.numpy()).save(tmp_path / "m" / f"{number}.png")
    ((alone, table),) = evaluate(1, tmp_path)
    assert set(alone) == {"val_loss", "val_mean_iou", "val_mean_dice", "val_pixel_accuracy"}
    for processes in (2, 3):
        for found, rows in evaluate(processes, tmp_path):
            assert found == pytest.approx(alone, rel=1e-7)
            assert rows == table
        with (tmp_path / str(processes) / "val_classes" / "step_00000000.csv").open() as file:
            assert [tuple(row) for row in csv.reader(file)] == [table[0], *table[1]]
    # the loss is the plain mean over pixels, whatever the batches
    data = SegmentationImages(**DATA, val_source=str(tmp_path / "p"), val_masks=str(tmp_path / "m"))
    data.setup("validate")
    whole = data.parts["val"].__getitems__(list(range(5)))
    torch.manual_seed(0)
    model = ImageSegmenter(**DIGITS)
    model.configure_model()
    with torch.no_grad():
        expected = F.cross_entropy(model.eval().logits(whole), whole["masks"], ignore_index=IGNORED)
    assert alone["val_loss"] == pytest.approx(float(expected), rel=1e-5)


def gradients(processes):
    """Return the gradient of one batch, in which half of the pictures have few pixels that count, on some processes."""

    def work():
        from lightning.pytorch import Trainer

        masks = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(0))
        masks[2:, :6] = IGNORED
        batch = batch_of(masks)
        rows = 4 // processes
        torch.manual_seed(0)

        class Given(torch.utils.data.Dataset):
            def __len__(self):
                return processes

            def __getitem__(self, place):
                return {key: value[place * rows : (place + 1) * rows] for key, value in batch.items()}

        model = ImageSegmenter(**TINY, dice=0.5, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        trainer = Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            max_steps=1,
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loader = torch.utils.data.DataLoader(Given(), batch_size=None)
        trainer.fit(model, loader, loader)
        return {key: value.detach() for key, value in model.network.named_parameters()}

    return run_on(processes, work)[0]


def test_each_pixel_weighs_the_same_however_processes_share_them():
    one, two = gradients(1), gradients(2)
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-6), key


# ---- names of classes


def test_class_names_travel_in_plain_checkpoints(trainer, tmp_path):
    run = trainer(max_steps=1, limit_val_batches=0)
    model = ImageSegmenter(**DIGITS)
    run.fit(model, SegmentationImages(**DATA))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["class_names"][:2] == ["background", "0"]
    loaded = ImageSegmenter.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.class_name(10) == "9"
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_checkpoints_load_where_the_weights_they_began_from_are_gone(trainer, tmp_path):
    torch.save(built(num_classes=11).state_dict(), tmp_path / "one.pth")
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(ImageSegmenter(**DIGITS, weights=str(tmp_path / "one.pth")), SegmentationImages(**DATA))
    run.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "one.pth").unlink()
    assert ImageSegmenter.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).weights is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, r"the data have 11 classes \(background, 0, 1, ...\) and model.num_classes is 3"),
        ({"channels": 1}, "data.channels is 3 and model.channels is 1"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(trainer, changes, message):
    with pytest.raises(InputError, match=message):
        trainer().validate(ImageSegmenter(**{**DIGITS, **changes}), SegmentationImages(**DATA), verbose=False)


def test_data_of_other_names_than_the_checkpoints_are_refused(trainer):
    model = ImageSegmenter(**DIGITS)
    model.on_load_checkpoint({"class_names": ["background", *"1234567890"]})
    with pytest.raises(InputError, match="class 1 is '0' in the data and '1' in the checkpoint"):
        trainer().validate(model, SegmentationImages(**DATA), verbose=False)


# ---- export


def test_pixels_go_into_an_export_and_probabilities_come_out():
    model = built(channels=1)
    model.eval()
    found = model.exportable()
    assert found.inputs[0].dtype == torch.uint8
    assert found.description["class_names"] == ["0", "1", "2"]
    images = torch.randint(256, (3, 1, 21, 40), dtype=torch.uint8)
    (probabilities,) = found.network(images)
    assert torch.allclose(probabilities, model.logits({"images": images}).softmax(1))


def test_flops_grow_with_the_picture():
    model = built()
    counts = []
    for side in (8, 16):
        model.logits({"images": torch.zeros(2, 3, side, side, dtype=torch.uint8)})
        counts.append(model.flops_per_batch)
    assert 3.5 < counts[1] / counts[0] < 4.5
    # two 3x3 convolutions at full size, twice for the multiply and the add, thrice for forward and backward, and more
    assert counts[1] > 2 * 16 * 16 * 2 * 3 * 9 * (3 * 8 + 8 * 8) / 3


def test_torchvision_reaches_no_network_of_its_own_accord():
    # weights_backbone has a default in some builders that would be fetched
    assert segmenters.build_body("lraspp_mobilenet_v3_large", 2, 3, False, {}) is not None
