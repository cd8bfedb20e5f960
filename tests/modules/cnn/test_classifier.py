"""ImageClassifier: building, weights of other shapes, mixing, drawing, export, and its messages."""

import math

import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from lightning_bigmodels.modules.cnn.classifiers import spread_channels
from lightning_bigmodels.modules.cnn.mixing import Mixing
from tests.modules.cnn.classifier_toys import NUM_CLASSES, Bars, BarsData

TINY = {"network": "small_resnet", "num_classes": NUM_CLASSES, "channels": 1, "image_size": 8}
ARGS = {"widths": [4, 8], "num_blocks": 1}


def tiny(**changes):
    return ImageClassifier(**{**TINY, "network_args": ARGS, **changes})


def built(**changes):
    torch.manual_seed(0)
    model = tiny(**changes)
    model.configure_model()
    return model.eval()


def batch(rows=6):
    return Bars(rows).__getitems__(range(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet81"}, "no classification network is named 'resnet81'; did you mean 'resnet18'"),
        ({"channels": 0}, "channels is 0; set it to 1 or more"),
        ({"image_size": 0}, "image_size is 0; set it to 1 or more"),
        ({"mean": [0.5, 0.5]}, "mean holds 2 numbers and channels is 1; give one for each"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0 and at most 1"),
        ({"unfreeze_after": -1}, "unfreeze_after is -1; it must be a number of steps, or a fraction"),
        ({"unfreeze_after": 3}, "unfreeze_after keeps a random body from learning; name weights"),
        ({"mixup_alpha": -0.1}, "mixup_alpha is -0.1; it must be 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network_args": {"depth": 3}}, "small_resnet cannot be built: .*'depth'; correct model.network_args"),
        ({"network": "vit_b_16", "image_size": 40, "network_args": {}}, "patches of 16 pixels; set image_size"),
        ({"weights": "DEFAULT"}, "there are no weights 'DEFAULT' for small_resnet; name a file"),
        ({"weights": "gone.pth"}, "gone.pth: no such file of weights"),
        (
            {"network": "resnet18", "network_args": {}, "weights": "IMAGENET1K_V9"},
            "resnet18 has no weights 'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V1'",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny(**arguments).configure_model()


def test_data_of_another_size_or_channels_are_refused(trainer):
    with pytest.raises(InputError, match="small_cnn is built for pictures of one size, model.image_size 9, and"):
        trainer().fit(tiny(network="small_cnn", network_args={}, image_size=9), BarsData())
    with pytest.raises(InputError, match="data.channels is 1 and model.channels is 2; give both the same"):
        trainer().fit(tiny(channels=2), BarsData())


# ---- weights


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
def test_weights_for_other_channels_answer_alike_to_gray(channels):
    weight = torch.randn(5, 3, 2, 2)
    spread = spread_channels(weight, channels)
    assert spread.shape == (5, channels, 2, 2)
    if channels in (1, 3, 6):
        assert torch.allclose(spread.sum(1), weight.sum(1), atol=1e-5)
    assert torch.allclose(spread[:, 0] * channels, weight[:, 0] * 3 if channels > 1 else weight.sum(1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_a_file_of_weights_fills_all_but_the_new_output_layer(suffix, tmp_path):
    source = built()
    state = {key: value.contiguous() for key, value in source.network.body.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".ckpt":
        torch.save({"state_dict": {f"network.body.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(state, path)
    model = tiny(num_classes=3, channels=2, weights=str(path))
    model.configure_model()
    found = model.network.body.state_dict()
    assert found["head.weight"].shape[0] == 3
    assert torch.equal(found["stem.0.weight"], spread_channels(state["stem.0.weight"], 2))
    for key in state.keys() - {"head.weight", "head.bias", "stem.0.weight"}:
        assert torch.equal(found[key], state[key]), key


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(built().network.body.state_dict(), path)
    with pytest.raises(
        InputError, match="has no weights of the right shape for .* parameters of small_resnet, the first"
    ):
        tiny(weights=str(path), network_args={"widths": [4, 16], "num_blocks": 1}).configure_model()


def test_the_positions_of_a_vit_are_interpolated(tmp_path):
    torch.manual_seed(0)
    body = torchvision.models.vit_b_32(image_size=64, num_classes=2)
    del body.encoder.layers[1:]
    state = body.state_dict()
    path = tmp_path / "vit.pth"
    torch.save(state, path)
    with torch.device("meta"):
        larger = ImageClassifier("vit_b_32", 2, image_size=96, weights=str(path))
        larger.configure_model()  # the meta device has no weights to read
    from lightning_bigmodels.modules.cnn.classifiers import load_pretrained
    from lightning_bigmodels.networks.pixels import PixelNetwork, statistics

    wide = torchvision.models.vit_b_32(image_size=96, num_classes=2)
    del wide.encoder.layers[1:]
    load_pretrained(PixelNetwork(wide, *statistics(3)), "vit_b_32", str(path), 3)
    old, new = state["encoder.pos_embedding"], wide.encoder.pos_embedding
    assert new.shape[1] == 10
    assert torch.equal(new[:, 0], old[:, 0])
    assert torch.allclose(new[0, 1], old[0, 1], atol=0.05)


def test_a_checkpoint_loads_where_the_weights_it_began_from_are_gone(tmp_path, trainer):
    path = tmp_path / "weights.pth"
    torch.save(built().network.body.state_dict(), path)
    run = trainer(max_steps=4)
    run.fit(tiny(weights=str(path), unfreeze_after=2), BarsData())
    run.save_checkpoint(tmp_path / "fit.ckpt")
    path.unlink()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "fit.ckpt", weights_only=True)
    assert loaded.class_names == list("abcdef")


# ---- steps


def test_auxiliary_heads_are_in_the_loss_and_not_in_the_answer():
    torch.manual_seed(0)
    model = ImageClassifier("googlenet", 3, image_size=64, network_args={"dropout": 0.0, "dropout_aux": 0.0})
    model.configure_model()
    data = {"images": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), "labels": torch.tensor([0, 2])}
    model.log = lambda *args, **kwargs: None
    model.train()
    parts = model.weighted_logits(data)
    assert [weight for weight, _ in parts] == [1.0, 0.3, 0.3]
    losses = [weight * nn.functional.cross_entropy(logits, data["labels"]) for weight, logits in parts]
    assert model.step("train", data).item() == pytest.approx(sum(losses).item(), rel=1e-4)
    assert model.eval().logits(data).shape == (2, 3)


def test_channels_last_changes_nothing_but_the_layout():
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    plain, last = built(), built(channels_last=True)
    weight = last.network.body.blocks[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert torch.allclose(plain.logits({"images": images}), last.logits({"images": images}), atol=1e-6)


def test_pixels_are_scaled_in_the_network():
    model = built(mean=[0.25], std=[0.5])
    pixels = torch.full((1, 1, 8, 8), 51, dtype=torch.uint8)
    assert torch.allclose(model.network.normalize(pixels), torch.full((1, 1, 8, 8), (0.2 - 0.25) / 0.5))
    assert torch.allclose(model.network.normalize(pixels / 255), model.network.normalize(pixels))


def test_flops_are_three_times_the_forward_pass_and_grow_with_the_batch():
    model = built()
    model.logits(batch(6))
    six = model.flops_per_batch
    model.logits(batch(3))
    assert six == 2 * model.flops_per_batch
    macs = 8 * 8 * (4 * 9) * (1 + 4 + 4) + 4 * 4 * (4 * 8 + 9 * (4 * 8 + 8 * 8)) + 8 * 6
    assert 2 * 2 * macs * 6 < six < 2 * 3 * macs * 6


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_labels_are_mixed_as_the_pixels_are(mixup, cutmix):
    torch.manual_seed(1)
    mix = Mixing(3, mixup, cutmix, multi_label=False)
    # each picture is its class's own number all over, so that its mean tells the shares
    labels = torch.tensor([0, 1, 2, 0])
    images = (labels * 100).to(torch.uint8).view(4, 1, 1, 1).expand(4, 1, 16, 16).contiguous()
    ways = set()
    for _ in range(20):
        found = mix({"images": images, "labels": labels, "indices": torch.arange(4)})
        assert torch.allclose(found["labels"].sum(1), torch.ones(4))
        expected = found["labels"] @ torch.tensor([0.0, 100.0, 200.0]) / 255
        assert torch.allclose(found["images"].mean((1, 2, 3)), expected, atol=1e-4)
        ways.add(found["images"][1].unique().numel() > 1)
    assert ways >= ({True, False} if mixup and cutmix else {cutmix > 0})


def test_what_does_not_count_takes_its_share_of_the_weight_along():
    torch.manual_seed(0)
    labels = torch.tensor([0, IGNORED, 2])
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    found = Mixing(3, 0.4, 0.0, multi_label=False)({"images": images, "labels": labels})["labels"]
    shares = found.sum(1)
    assert shares[0] == 1
    assert shares[1] + shares[2] == pytest.approx(1)
    several = torch.tensor([[1.0, 1, 0], [float(IGNORED)] * 3, [0, 0, 1]])
    found = Mixing(3, 0.4, 0.0, multi_label=True)({"images": images, "labels": several})["labels"]
    assert (found[1:] == IGNORED).all()
    assert (found[0] != IGNORED).all()


def test_a_batch_is_left_as_it_is_where_nothing_mixes():
    own = batch()
    assert Mixing(NUM_CLASSES, 0.0, 0.0, False)(own) is own


def test_mixing_draws_from_the_stream_that_checkpoints_hold():
    mix, own = Mixing(NUM_CLASSES, 0.4, 1.0, False), batch()
    state = torch.get_rng_state()
    first = [mix(own)["images"] for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(a, mix(own)["images"]) for a in first)
    assert not torch.equal(first[0], first[1])


def test_it_learns(trainer):
    torch.manual_seed(0)
    model = ImageClassifier("small_cnn", NUM_CLASSES, 1, 8, mixup_alpha=0.1, label_smoothing=0.1, channels_last=True)
    run = trainer(max_steps=-1, max_epochs=25, limit_val_batches=1.0)
    run.fit(model, BarsData())
    assert run.callback_metrics["val_accuracy"] > 0.85
    assert run.callback_metrics["val_loss"] < math.log(NUM_CLASSES)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_compiled_it_trains_as_without_and_resumes_bit_for_bit(trainer, tmp_path):
    def run(compile, checkpoint=None):
        torch.manual_seed(0)
        model = ImageClassifier("small_cnn", NUM_CLASSES, 1, 8, compile=compile)
        keep = ModelCheckpoint(tmp_path / str(compile), "half", every_n_train_steps=5)
        run = trainer(max_steps=8, limit_val_batches=0, enable_checkpointing=True, callbacks=[keep])
        run.fit(model, BarsData(), ckpt_path=checkpoint, weights_only=True)
        assert run.global_step == 8
        return dict(model.network.named_parameters())

    eager, whole = run(False), run(True)
    assert whole.keys() == eager.keys()
    assert all(torch.allclose(whole[name], value, atol=1e-4) for name, value in eager.items())
    half = tmp_path / "True" / "half.ckpt"
    assert torch.load(half, weights_only=True)["global_step"] == 5
    resumed = run(True, half)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


# ---- what others see


def test_drawn_pictures_show_the_truth_and_mistakes_in_red():
    model = built()
    model.class_names = list("abcdef")
    drawn = model.draw(batch())
    assert all(picture.shape == (3, 112 + 28, 112) for picture in drawn)
    right = model.logits(batch()).argmax(1) == batch()["labels"]
    for picture, is_right in zip(drawn, right.tolist(), strict=True):
        text = picture[:, 112:].int()
        assert ((text[0] - text[1]).max() > 100) == (not is_right)


@pytest.mark.parametrize("multi_label", [False, True])
def test_what_is_exported_takes_pixels_and_gives_probabilities(multi_label):
    model = built(multi_label=multi_label)
    model.class_names = list("abcdef")
    exported = model.exportable()
    (found,) = exported.network(*exported.inputs)
    assert exported.inputs[0].dtype == torch.uint8
    assert torch.equal(found, model.probabilities(model.logits({"images": exported.inputs[0]})))
    assert exported.description["class_names"] == list("abcdef")
    assert exported.description["multi_label"] is multi_label
    assert exported.dynamic == ({0: "batch"},)
