"""SuperResolver: its losses by hand, what it refuses, enlarging by tiles and by repetition, both networks."""

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Trainer
from PIL import Image

from lightning_bigmodels.callbacks import PredictionWriter
from lightning_bigmodels.callbacks.validation_pictures import ValidationPictures
from lightning_bigmodels.data import SuperResolutionImages
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import SuperResolver
from lightning_bigmodels.modules.cnn.adversarial import adversarial_loss
from lightning_bigmodels.modules.cnn.perceptual import PerceptualLoss
from lightning_bigmodels.networks.patch_discriminator import PatchDiscriminator
from tests.conftest import QUIET
from tests.data.test_super_resolution_images import write
from tests.workers import fit_on, run_on

TINY = {"num_blocks": 1, "num_features": 4}
TINY_SWIN = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "image_size": 16, "drop_path_rate": 0.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        write(folder / f"photo{number}.png", 36 + 3 * number, 44, number)
    return folder


def images(photos, **changes):
    values = {"crop_size": 8, "crops_per_photo": 6, "batch_size": 4, "val_photos": ["photo0", "photo1", "photo2"]}
    return SuperResolutionImages(str(photos), **{**values, **changes})


def resolver(**changes):
    torch.manual_seed(0)
    module = SuperResolver(**{"config": TINY, **changes})
    module.configure_model()
    return module


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(scale=2, indices=(0, 1)):
    size = len(indices)
    small, large = noise(size, 3, 8, 8), noise(size, 3, 8 * scale, 8 * scale, seed=1)
    return {"images": small, "targets": large, "indices": torch.tensor(indices)}


# ---- losses


def test_l1_by_hand_without_what_does_not_count():
    module = resolver()
    module.log = lambda *args, **kwargs: None
    one = batch(indices=(3, FILLER))
    loss = module.step("train", one)
    made = module.network(one["images"][:1])
    assert torch.allclose(loss, (made - one["targets"][:1] / 255).abs().mean(), atol=1e-6)
    assert module.step("train", batch(indices=(FILLER, FILLER))) == 0


def test_perceptual_loss_is_of_vgg_features_before_the_last_activation(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        vgg = torchvision.models.vgg19(weights=None)
    vgg.features.to_empty(device="cpu")
    # the layers that count; the classifier's 500 MB need not be written
    weights = {key: value.normal_(0, 0.03) for key, value in vgg.state_dict().items() if key.startswith("features.")}
    torch.save(weights, tmp_path / "vgg.pt")
    loss = PerceptualLoss(str(tmp_path / "vgg.pt"))
    one, two = (torch.rand(2, 3, 32, 32, requires_grad=True) for _ in range(2))
    found = loss(one, two)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = [vgg.features[:35]((image - mean.view(3, 1, 1)) / std.view(3, 1, 1)) for image in (one, two)]
    assert isinstance(vgg.features[34], torch.nn.Conv2d)
    assert isinstance(vgg.features[35], torch.nn.ReLU)
    assert torch.allclose(found, (seen[0] - seen[1]).abs().mean((1, 2, 3)), atol=1e-6)
    found.sum().backward()
    assert one.grad.abs().sum() > 0
    assert two.grad is None  # what is to be reached does not move
    torch.save({"features.0.weight": weights["features.0.weight"]}, tmp_path / "part.pt")
    with pytest.raises(InputError, match=r"part.pt holds no features.0.bias of VGG-19; name a file of torchvision's"):
        PerceptualLoss(str(tmp_path / "part.pt"))
    with pytest.raises(InputError, match="perceptual_weights 'IMAGENET1K_V2' is no file, .*mean 'IMAGENET1K_V1'"):
        PerceptualLoss("IMAGENET1K_V2")
    with pytest.raises(InputError, match="gone.pt: no such file of weights"):
        PerceptualLoss(str(tmp_path / "gone.pt"))


def test_one_backward_pass_gives_each_network_the_gradient_of_its_own_loss():
    torch.manual_seed(0)
    judge = PatchDiscriminator(num_features=4).eval()
    real, made = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16, requires_grad=True)
    loss = adversarial_loss(judge, real, made, 0.3, torch.tensor([1.0, 1.0, 0.0]))
    loss.total.backward()
    # cross entropy with the labels real and made, over the two pictures that count
    logits_real, logits_made = judge(real[:2]), judge(made.detach()[:2])
    ones, zeros = torch.ones_like(logits_real), torch.zeros_like(logits_made)
    entropy = F.binary_cross_entropy_with_logits
    expected = entropy(logits_real, ones) + entropy(logits_made, zeros)
    assert torch.allclose(loss.discriminator, expected, atol=1e-6)
    parameters = list(judge.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    again = made.detach().requires_grad_()
    for_generator = entropy(judge(again[:2]), ones)
    assert torch.allclose(loss.generator, for_generator, atol=1e-6)
    assert torch.allclose(made.grad, 0.3 * torch.autograd.grad(for_generator, again)[0], atol=1e-7)
    assert made.grad[:2].abs().sum() > 0


def adversarial(**changes):
    return SuperResolver(config=TINY, adversarial_weight=0.1, discriminator_lr_scale=0.5, **changes)


def test_adversarial_training_moves_both_networks_and_resumes_bit_for_bit(photos, trainer, tmp_path):
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "limit_val_batches": 0, "max_steps": 6}
    torch.manual_seed(0)
    whole = adversarial()
    trainer(**settings).fit(whole, images(photos))
    torch.manual_seed(0)
    first = adversarial()
    start = trainer(**{**settings, "max_steps": 3})
    start.fit(first, images(photos))
    start.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(9)
    second = adversarial()
    trainer(**settings).fit(second, images(photos), ckpt_path=tmp_path / "half.ckpt")
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    moved = {True: 0, False: 0}
    for (name, one), two in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
        moved[name.startswith("discriminator.")] += int(not torch.equal(one, half[name]))
    assert min(moved.values()) > 4


def test_each_network_is_clipped_by_its_own_norm(trainer):
    module = resolver(adversarial_weight=1.0)
    for parameter in module.network.parameters():
        parameter.grad = torch.full_like(parameter, 0.001)
    for parameter in module.discriminator.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    module.trainer = trainer()
    optimizer = torch.optim.SGD(module.parameter_groups(), lr=0.1)
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.discriminator.parameters()])
    assert norm.item() == pytest.approx(1.0, rel=1e-4)
    assert all(torch.all(p.grad == 0.001) for p in module.network.parameters())
    assert optimizer.param_groups[-1]["name"] == "undecayed_discriminator"
    assert optimizer.param_groups[-1]["weight_decay"] == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adversarial_training_on_two_processes_gives_the_losses_of_one(photos, strategy):
    def fit(processes, strategy):
        rows = 4 // processes
        runs = fit_on(processes, strategy, adversarial, lambda: images(photos, batch_size=rows, flips=False))
        return [sum(losses) / processes for losses in zip(*[run.losses for run in runs], strict=True)]

    assert fit(2, strategy) == pytest.approx(fit(1, "auto"), rel=1e-4)


# ---- enlarging


@pytest.mark.parametrize(("scale", "factor"), [(2, 2), (2, 8), (3, 9), (4, 4)])
def test_it_enlarges_by_the_scale_and_by_repetition(scale, factor):
    module = resolver(scale=scale, enlarge=factor)
    picture = noise(3, 7, 5)
    large = module.enlarge(picture)
    assert large.shape == (3, 7 * factor, 5 * factor)
    assert large.dtype == torch.uint8
    step = picture
    while step.shape[1] < large.shape[1]:
        step = module.enlarge(step, scale)
    assert torch.equal(step, large)
    assert module.training


@pytest.mark.parametrize(
    ("scale", "factor", "message"),
    [
        (2, 3, "enlarge is 3, and a network of scale 2 enlarges by 2, 4, 8, 16 or 32; set it to one"),
        (4, 8, "enlarge is 8, and a network of scale 4 enlarges by 4 or 16"),
        (2, 64, "enlarge is 64"),
        (3, 1, "enlarge is 1, and a network of scale 3 enlarges by 3, 9 or 27"),
    ],
)
def test_other_factors_are_refused(scale, factor, message):
    with pytest.raises(InputError, match=message):
        SuperResolver(scale=scale, enlarge=factor)


def test_tiles_give_the_whole_pictures_result():
    picture = noise(3, 50, 61)
    tiled, whole = resolver(tile_size=16).enlarge(picture), resolver(tile_size=64).enlarge(picture)
    assert (tiled.int() - whole.int()).abs().max() <= 1


def test_too_little_overlap_is_blended_and_too_much_to_blend_refused():
    module = resolver(tile_size=16, tile_overlap=3)
    assert not module.tiling().exact
    assert module.enlarge(noise(3, 40, 40)).shape == (3, 80, 80)
    assert resolver(tile_size=16, tile_overlap=6).tiling().exact
    with pytest.raises(InputError, match="tile_overlap 5 is more than a quarter of tile_size 16; raise tile_size"):
        resolver(tile_size=16, tile_overlap=5).tiling()


def test_predict_writes_a_folder_of_any_sizes_in_order(photos, trainer, tmp_path):
    sizes = {"a.png": (1, 1), "b.png": (30, 47), "sub/a.png": (9, 3)}
    for name, (height, width) in sizes.items():
        write(tmp_path / "in" / name, height, width)
    module = SuperResolver(config=TINY, enlarge=4, tile_size=16)
    data = SuperResolutionImages(predict_source=str(tmp_path / "in"), eval_batch_size=2)
    run = trainer(callbacks=[PredictionWriter()], default_root_dir=tmp_path / "out")
    run.predict(module, data, return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["file"] for row in rows] == [str(tmp_path / "in" / name) for name in sizes]
    for row, (height, width) in zip(rows, sizes.values(), strict=True):
        assert (row["height"], row["width"]) == (4 * height, 4 * width)
        with Image.open(tmp_path / "out" / row["picture"]) as image:
            assert image.size == (4 * width, 4 * height)
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == 3


def test_a_sharded_network_predicts_pictures_that_need_unequally_many_tiles(tmp_path):
    for number, side in enumerate((40, 5, 20)):
        write(tmp_path / "in" / f"{number}.png", side, side)

    def predict(strategy, processes, root):
        torch.manual_seed(0)
        module = SuperResolver(config=TINY, enlarge=4, tile_size=16)
        data = SuperResolutionImages(predict_source=str(tmp_path / "in"))
        settings = {**QUIET, "strategy": strategy, "devices": processes, "default_root_dir": tmp_path / root}
        Trainer(**settings, callbacks=[PredictionWriter()]).predict(module, data, return_predictions=False)

    run_on(1, lambda: predict("auto", 1, "one"))
    run_on(2, lambda: predict("fsdp2", 2, "two"))
    for path in (tmp_path / "one" / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "predictions" / path.name).read_bytes()
    assert (tmp_path / "one/predictions.jsonl").read_text() == (tmp_path / "two/predictions.jsonl").read_text()


# ---- Swin2SR


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_swin2sr_enlarges_any_size_and_every_parameter_gets_a_gradient(scale):
    module = resolver(architecture="swin2sr", scale=scale, config=TINY_SWIN, tile_size=16, tile_overlap=4)
    for height, width in ((1, 1), (3, 9), (37, 22)):
        assert module.enlarge(noise(3, height, width)).shape == (3, height * scale, width * scale)
    assert module.tiling() == (16, 4, False, 4)
    module.network(noise(1, 3, 8, 8)).square().sum().backward()
    for name, parameter in module.network.named_parameters():
        assert parameter.grad is not None, name
    assert len(module.blocks()) == 1


def test_swin2sr_from_a_folder_and_its_checkpoint_without_it(photos, trainer, tmp_path):
    module = resolver(architecture="swin2sr", config=TINY_SWIN)
    module.network.body.network.save_pretrained(tmp_path / "swin")
    copy = SuperResolver(architecture="swin2sr", pretrained=str(tmp_path / "swin"))
    copy.configure_model()
    picture = noise(3, 11, 8)
    assert torch.equal(copy.enlarge(picture), module.enlarge(picture))
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(copy, images(photos))
    run.save_checkpoint(tmp_path / "own.ckpt")
    (tmp_path / "swin").rename(tmp_path / "gone")
    loaded = SuperResolver.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert torch.equal(loaded.enlarge(picture), copy.enlarge(picture))
    with pytest.raises(InputError, match="the weights of .* enlarge by 2; set model.scale to that"):
        SuperResolver(architecture="swin2sr", scale=4, pretrained=str(tmp_path / "gone")).configure_model()
    with pytest.raises(InputError, match="cannot be read: .*; name a folder of a Swin2SR"):
        SuperResolver(architecture="swin2sr", pretrained=str(tmp_path / "swin")).configure_model()


def test_edsr_begins_from_the_weights_of_another_scale(photos, trainer, tmp_path):
    module = SuperResolver(config=TINY)
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, images(photos))
    run.save_checkpoint(tmp_path / "x2.ckpt")
    larger = SuperResolver(config=TINY, scale=4, pretrained=str(tmp_path / "x2.ckpt"))
    larger.configure_model()
    assert torch.equal(larger.network.body.head.weight, module.network.body.head.weight)
    assert torch.equal(larger.network.body.tail.weight, module.network.body.tail.weight)
    wider = SuperResolver(config={**TINY, "num_features": 5}, pretrained=str(tmp_path / "x2.ckpt"))
    with pytest.raises(InputError, match=r"x2.ckpt has no body.head.weight of this shape; describe the network"):
        wider.configure_model()


# ---- validation, arguments


def test_validation_counts_each_photo_once_and_draws(photos, trainer, tmp_path):
    module = resolver()
    values = []
    for size in (1, 2, 3):
        run = trainer(callbacks=[ValidationPictures()] if size == 3 else [], limit_val_batches=1.0)
        (found,) = run.validate(module, images(photos, eval_batch_size=size), verbose=False)
        values.append(found)
    assert values[1] == pytest.approx(values[0])
    assert values[2] == pytest.approx(values[0])
    assert 0 < values[0]["val_psnr_y_shave2"] < 100
    with Image.open(tmp_path / "validation_pictures" / "step_00000000.png") as image:
        # three photos of 44 pixels, three views each with gaps of 4, in a row
        assert image.size == (3 * (3 * 44 + 8) + 4 * 2, 42 + 2 * 2)


def test_the_pictures_drawn_are_bicubic_ours_and_true():
    module = resolver()
    small, large = noise(3, 200, 10), noise(3, 400, 20, seed=1)
    (picture,) = module.draw({"images": [small], "targets": [large], "indices": torch.tensor([0])})
    assert picture.shape == (3, 192, 3 * 20 + 8)
    assert torch.equal(picture[:, :, -20:], large[:, 104:296])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "edrs"}, "no network that enlarges is named 'edrs'; did you mean 'edsr'?"),
        ({"scale": 8}, r"scale is 8, and edsr enlarges by 2, 3 or 4; set .*, or model.architecture to swin2sr"),
        ({"scale": 7}, "scale is 7, and edsr enlarges by 2, 3 or 4; set model.scale to one of them$"),
        (
            {"config": {"num_block": 4}},
            "model.config.num_block is not in the configuration of edsr; did you mean 'num",
        ),
        (
            {"architecture": "swin2sr", "config": {"depth": [1]}},
            "config.depth is not .* did you mean 'depths'",
        ),
        ({"perceptual_weight": 1.0}, "set perceptual_weights to a file of torchvision's, or to IMAGENET1K_V1"),
        ({"adversarial_weight": -1.0}, "adversarial_weight is -1.0; it must be 0 or more"),
        ({"l1_weight": 0.0}, "all weights of the loss are 0; set l1_weight above 0"),
        ({"tile_size": 4}, "tile_size is 4; it must be 8 or more"),
        ({"tile_overlap": -1}, "tile_overlap is -1; it must be 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        SuperResolver(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"num_blocks": 0}}, "model.config.num_blocks is 0; it must be 1 or more"),
        ({"architecture": "swin2sr", "config": {"embed_dim": "wide"}}, "config of swin2sr: .*; correct model.config"),
        (
            {"architecture": "swin2sr", "config": {"embed_dim": 9, "num_heads": [2], "depths": [1]}},
            "config of swin2",
        ),
    ],
)
def test_configurations_that_build_nothing_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        SuperResolver(**changes).configure_model()


def test_another_scale_of_the_data_is_refused(photos, trainer):
    with pytest.raises(InputError, match="data.scale is 3 and model.scale is 2; set both to the same"):
        trainer().fit(SuperResolver(config=TINY), images(photos, scale=3))


def test_what_is_exported_takes_bytes_and_gives_fractions():
    module = resolver().eval()
    exportable = module.exportable()
    (found,) = exportable.network(exportable.inputs[0])
    assert found.shape == (1, 3, 96, 96)
    assert found.min() >= 0
    assert found.max() <= 1
