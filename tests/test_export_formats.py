"""Export to torch.export, ONNX and safetensors: pixels in, probabilities out, on any batch; what differs is refused."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_bigmodels import export_comparison, export_formats
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.export import export, load_exported, unsupported
from lightning_bigmodels.exportable import Exportable
from lightning_bigmodels.networks.pixels import PixelNetwork


class Probabilities(nn.Module):
    """A softmax behind a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return (self.network(images).softmax(1),)


class Classifier(LightningModule):
    """A convolution with batch norm and dropout, of pictures of a fixed size."""

    def __init__(self, side=8):
        super().__init__()
        body = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(4 * (side - 2) ** 2, 5),
        )
        self.network = PixelNetwork(body, [0.4] * 3, [0.2] * 3)
        self.side = side
        self.changes = {}

    def exportable(self):
        pixels = torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)
        given = Exportable(
            Probabilities(self.network),
            (pixels,),
            ("images",),
            ("probabilities",),
            ({0: "batch"},),
            {"class_names": ["ant", "bee", "cat", "dog", "élan"]},
        )
        return given._replace(**self.changes)


class Halving(nn.Module):
    """Classes of pixels of a picture of any even size, and the picture enlarged, through a network that halves it."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 5, 2, stride=2)

    def forward(self, images):
        classes = self.up(self.down(images / 255).relu()).softmax(1)
        large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return classes, large, classes.argmax(1)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    return export(classifier, tmp_path_factory.mktemp("exported") / "out")


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def expected(classifier, images):
    network = classifier.exportable().network.eval()
    with torch.no_grad():
        (found,) = network(images)
    network.train()
    return found


def test_pixels_go_in_and_probabilities_come_out_for_any_batch(classifier, folder):
    assert {path.name for path in folder.iterdir()} == {
        "model.pt2",
        "model.onnx",
        "weights.safetensors",
        "description.json",
    }
    for batch in (1, 2, 7):
        images = pixels(batch, 3, 8, 8)
        want = expected(classifier, images)
        assert torch.equal(load_exported(folder)(images)["probabilities"], want)
        found = load_exported(folder, "onnx")(images)["probabilities"]
        assert (found - want).abs().max() < 1e-6
        assert found.sum(1) == pytest.approx([1.0] * batch)


def test_the_weights_are_the_networks_own(classifier, folder):
    other = Classifier()
    other.network.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    for name, value in classifier.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], value), name


def test_the_description_says_what_goes_in_and_what_comes_out(folder):
    described = json.loads((folder / "description.json").read_text(encoding="utf-8"))
    assert described["model"] == "Classifier"
    assert described["class_names"][4] == "élan"
    assert described["inputs"] == [{"name": "images", "dtype": "uint8", "shape": ["batch", 3, 8, 8]}]
    assert described["outputs"] == [{"name": "probabilities", "dtype": "float32", "shape": ["batch", 5]}]
    assert described["files"] == export_formats.FILES
    assert described["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert described["packages"] == ["torch"]
    assert described["largest_difference"]["torch"] <= described["largest_difference"]["onnx"] < 1e-6


def test_torch_alone_and_onnxruntime_alone_load_it(classifier, folder):
    script = """
import sys, torch
program = torch.export.load(sys.argv[1] + "/model.pt2").module()
(probabilities,) = program(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
assert not {"lightning", "lightning_bigmodels", "torchvision"} & set(sys.modules)
print(probabilities.shape)
"""
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([3, 5])", done.stderr
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [(given.name, given.shape, given.type) for given in session.get_inputs()] == [
        ("images", ["batch", 3, 8, 8], "tensor(uint8)")
    ]
    (probabilities,) = session.run(None, {"images": np.zeros((3, 3, 8, 8), np.uint8)})
    assert probabilities.shape == (3, 5)


def test_the_module_stays_as_it_was(classifier, folder):
    assert all(module.training for module in classifier.modules())


def test_axes_of_pictures_are_free_too(tmp_path):
    module = Classifier()
    module.network = Halving()
    module.exportable = lambda: Exportable(
        module.network,
        (pixels(2, 3, 8, 12),),
        ("images",),
        ("classes", "large", "labels"),
        ({0: "batch", 2: "height", 3: "width"},),
        {},
    )
    folder = export(module, tmp_path / "out")
    described = json.loads((folder / "description.json").read_text())
    assert [output["shape"] for output in described["outputs"]] == [
        ["batch", 5, "height", "width"],
        ["batch", 3, "2 * height", "2 * width"],
        ["batch", "height", "width"],
    ]
    images = pixels(3, 3, 20, 6)
    for name in ("torch", "onnx"):
        found = load_exported(folder, name)(images)
        classes, large, labels = module.network(images)
        assert found["classes"] == pytest.approx(classes.detach(), abs=1e-6)
        assert torch.equal(found["large"], large)
        assert torch.equal(found["labels"], labels)


@pytest.mark.parametrize(
    ("formats", "files"), [(["onnx"], {"model.onnx"}), (["weights", "torch"], {"weights.safetensors", "model.pt2"})]
)
def test_formats_are_chosen(classifier, tmp_path, formats, files):
    folder = export(classifier, tmp_path / "out", formats)
    assert {path.name for path in folder.iterdir()} == files | {"description.json"}
    missing = "torch" if formats == ["onnx"] else "onnx"
    with pytest.raises(InputError, match=rf"export with --formats \[{missing}\], or name another folder"):
        load_exported(folder, missing)


def test_weights_alone_are_not_run(tmp_path):
    module = Classifier()
    module.changes = {"network": Undecided()}
    folder = export(module, tmp_path / "out", ["weights"])
    described = json.loads((folder / "description.json").read_text(encoding="utf-8"))
    assert described["class_names"]
    assert not {"inputs", "outputs"} & described.keys()


def test_a_format_that_cannot_hold_the_network_is_left_out_with_its_reason(tmp_path):
    module = Classifier()
    module.changes = {"unsupported": {"onnx": "ONNX has no such operator"}}
    with pytest.raises(InputError, match="model.onnx cannot be written: ONNX has no such operator; leave onnx out"):
        export(module, tmp_path / "out", ["onnx", "torch"])
    folder = export(module, tmp_path / "out")
    assert not (folder / "model.onnx").exists()
    assert json.loads((folder / "description.json").read_text())["unsupported"] == {"onnx": "ONNX has no such operator"}


def test_large_networks_have_their_tensors_beside_the_onnx_file(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(export_formats, "_ONE_FILE", 100)
    folder = export(classifier, tmp_path / "out", ["onnx"])
    assert (folder / "model.onnx.data").is_file()
    images = pixels(2, 3, 8, 8)
    found = load_exported(folder, "onnx")(images)["probabilities"]
    assert (found - expected(classifier, images)).abs().max() < 1e-6


def test_what_is_not_there_is_said_with_its_remedy(classifier, folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="formats: there is no 'onx'; did you mean 'onnx'"):
        export(classifier, tmp_path / "out", ["onx"])
    with pytest.raises(InputError, match="formats is empty; name some of torch, onnx, weights"):
        export(classifier, tmp_path / "out", [])
    with pytest.raises(InputError, match=r"holds no description.json; name a folder that bigmodels export has written"):
        load_exported(tmp_path)
    with pytest.raises(InputError, match="weights.safetensors holds tensors, which do not run by themselves"):
        load_exported(folder, "weights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_its_packages_onnx_is_left_out_unless_it_is_asked_for(classifier, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    reason = f"{package} is not installed; install it with: pip install 'lightning-bigmodels[onnx]'"
    with pytest.raises(InputError) as refused:
        export(classifier, tmp_path / "out", ["torch", "onnx"])
    assert str(refused.value) == reason
    assert list(tmp_path.iterdir()) == []
    folder = export(classifier, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "weights.safetensors", "description.json"}
    assert unsupported(folder) == {"model.onnx": reason}


class Undecided(nn.Module):
    """Does what the pixels say, which no traced program can."""

    def forward(self, images):
        return (images.float() * float(images.float().mean().item() > 3),)


def test_what_torch_cannot_write_is_said_in_one_line(tmp_path):
    module = Classifier()
    module.changes = {"network": Undecided()}
    expected = r"torch cannot write the network as model.pt2 \(.+\); do without: --formats \[weights\]"
    with pytest.raises(RunError, match=expected):
        export(module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_differs_is_refused_and_nothing_is_left(classifier, tmp_path, monkeypatch):
    original = export_formats.load

    def off_by(change):
        def load(folder, name):
            run = original(folder, name)
            return lambda inputs: tuple(map(change, run(inputs)))

        monkeypatch.setattr(export_formats, "load", load)

    off_by(lambda found: found + 0.01)
    with pytest.raises(RunError) as refused:
        export(classifier, tmp_path / "out", ["torch"])
    assert "model.pt2, loaded back, differs from the network for inputs (1, 3, 8, 8): output 'probabilities'" in str(
        refused.value
    )
    assert "by up to 0.01, where 1e-05 is allowed; do without torch: --formats [onnx,weights]" in str(refused.value)
    off_by(lambda found: found * torch.nan)
    with pytest.raises(RunError, match="by up to inf"):
        export(classifier, tmp_path / "out", ["torch"])
    off_by(lambda found: found[:1])
    with pytest.raises(RunError, match=r"inputs \(2, 3, 8, 8\).* has shape \(1, 5\) and not \(2, 5\)"):
        export(classifier, tmp_path / "out", ["torch"])
    off_by(lambda found: found.double())
    with pytest.raises(RunError, match=r"is torch.float64 and not torch.float32"):
        export(classifier, tmp_path / "out", ["torch"])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_differ_are_refused(classifier, tmp_path, monkeypatch):
    original = safetensors.torch.load_file
    monkeypatch.setattr(
        export_comparison.safetensors.torch,
        "load_file",
        lambda path: {name: value + 1 for name, value in original(path).items()},
    )
    with pytest.raises(RunError, match="weights.safetensors, loaded back, does not hold the network's mean"):
        export(classifier, tmp_path / "out", ["weights"])


@pytest.mark.parametrize(
    ("found", "want", "difference", "allowed"),
    [
        (torch.tensor([7], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8), 1.0, 1.0),
        (torch.tensor([7]), torch.tensor([8]), 1.0, 0.0),
        (torch.tensor([torch.inf, torch.nan]), torch.tensor([torch.inf, torch.nan]), 0.0, 1e-4),
        (torch.tensor([200.0]), torch.tensor([201.0]), 1.0, 0.0201),
        (torch.zeros(0, 4), torch.zeros(0, 4), 0.0, 0.0),
    ],
)
def test_how_far_numbers_may_part(found, want, difference, allowed):
    assert export_comparison._difference(found, want) == difference
    assert export_comparison._allowed("onnx", want) == pytest.approx(allowed)


def test_a_network_that_returns_no_tuple_is_refused(tmp_path):
    module = Classifier()
    module.changes = {"network": module.network}
    with pytest.raises(TypeError, match="returns a tuple of 1 tensors, not tensor"):
        export(module, tmp_path / "out", ["torch"])


@pytest.mark.parametrize(
    ("lengths", "found", "axis"),
    [
        ([{"batch": 1, "height": 48}, {"batch": 2, "height": 96}], (96, 192), "2 * height"),
        ([{"batch": 2}, {"batch": 3}, {"batch": 1}], (2, 3, 1), "batch"),
        ([{"batch": 2}, {"batch": 3}], (10, 10), 10),
        ([{"batch": 2}, {"batch": 3}], (4, 7), "any"),
        ([{}], (4,), 4),
    ],
)
def test_the_names_of_axes_are_found(lengths, found, axis):
    assert export_comparison._axis(found, lengths) == axis
