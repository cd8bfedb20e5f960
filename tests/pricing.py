"""What a plan of a recipe must say at full size, by sums of our own, from its YAML and the layers of its network."""

import math
import re

import pytest
from torch import nn

FLOAT = 4
BLOCK = 512  # bytes that CUDA's allocator rounds up to
GIB = 2**30
PRICE = 2
H100 = {"bf16-mixed": 989.4e12, "32-true": 494.7e12}  # FLOP/s by its data sheet, of float32 in TF32
BANDWIDTH = 3.35e12
NUMBER = r"\d[\d,]*\.?\d*"
PUBLISHED = {
    # by torchvision's weights, at 224 x 224, of 1000 classes
    "image/finetune_efficientnet": (0.386, 3),
    "image/resnet50_imagenet": (4.089 * (176 / 224) ** 2, 3),
    # at 520 x 520, whose features are 65 x 65; those of 769 x 769 are 97 x 97
    "segmentation/cityscapes": (258.743 * (97 / 65) ** 2, 3),
    # 512 proposals, not 1000, of 7 x 7 x 256 x 1024 + 1024 x 1024 each; 10.1 are in layers that do not learn
    "detection/fasterrcnn_coco": (127.6, 3 - 2 * 10.1 / 127.6),
    # 338.7 in Kim et al. 2023, "BK-SDM", without attention, whose backward pass takes 2.5 times its forward pass:
    # 2 T^2 C of five layers each with T = 64^2 and C = 320, 32^2 and 640, 16^2 and 1280
    "text_to_image/latent_diffusion": (338.7 + 61.2, 3 + 0.5 * 61.2 / 399.9),
}
"""10^9 multiplications of a row in the forward pass, and how many times as many there are in the whole step."""


class Network:
    """The sizes of what a plan builds and runs."""

    def __init__(self):
        self.shapes, self.trained, self.learning, self.buffers = {}, [], [], []
        self.normalized = []
        self.multiplications = 0

    def note(self, model):
        """Note the network of a model, of which `configure_model` has made it, once."""
        if self.shapes:
            return
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        # of BERT's answers the one for a whole text is not asked for
        self.learning = [name for name in self.trained if ".pooler." not in name]
        self.buffers = [buffer.nbytes for buffer in model.buffers()]
        self.normalized = [m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(self._count)

    def _count(self, layer, inputs, output):
        places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        self.multiplications += places.numel() * layer.weight[0].numel()

    def number(self, names=None):
        """Return how many weights there are."""
        return sum(math.prod(self.shapes[name]) for name in (self.shapes if names is None else names))

    def bytes_of(self, names, shards):
        """Return the bytes of a float for each weight, in the allocator's blocks."""
        return sum(rounded(FLOAT * math.prod(self.shapes[name]) // shards) for name in names)

    @property
    def hidden(self):
        """Names of the matrices in blocks, which are what Muon is for."""
        return [name for name, shape in self.shapes.items() if len(shape) == 2 and re.search(r"\.\d+\.", name)]


def rounded(size):
    return -(-size // BLOCK) * BLOCK


def check_plan(name, recipe, network, plan, samples=None):
    """Assert that a plan for H100s at `PRICE`, of so many samples, is what can be worked out without a planner."""
    trainer, setting = recipe["trainer"], plan["setting"]
    devices = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    rows = recipe["data"]["init_args"]["batch_size"] * trainer.get("accumulate_grad_batches", 1)
    # in all of these the weights are float32
    assert setting["precision"] == trainer.get("precision", "32-true")
    assert setting["precision"] in H100
    check_memory(recipe, network, plan["memory"], setting, devices)
    check_traffic(trainer, network, plan["step"]["traffic"], setting["strategy"], devices)
    check_flops(name, recipe, network, plan["step"]["flops"], rows)
    check_time(network, plan, rows, devices)
    check_run(trainer, plan, samples, rows, devices)


def check_memory(recipe, network, memory, setting, devices):
    shards = devices if setting["strategy"] == "fsdp2" else 1
    averages = network.bytes_of(network.trained, shards) if setting["averages_weights"] else 0
    held, gradients = memory["kinds"], network.bytes_of(network.learning, shards)
    weights = network.bytes_of(network.shapes, shards) + sum(map(rounded, network.buffers))
    assert held["parameters"] == weights + averages
    assert held["optimizer state"] == state_of(recipe, network, shards)
    # in the backward pass they come one after the other, and a GAN has none in the forward pass of its generator
    if memory["peak"]["phase"] == "backward" or recipe["model"]["class_path"] == "GAN":
        assert held.get("gradients", 0) < gradients
    else:
        assert held["gradients"] == gradients
    if setting["strategy"] == "ddp":
        assert held["communication"] == gradients
    assert sum(held.values()) == memory["allocated"] <= memory["reserved"] <= memory["used"]
    assert memory["spare"] == memory["available"] - memory["used"]


def state_of(recipe, network, shards):
    """Return the bytes of the optimizer's moments, and of the number of steps that Adam keeps for each tensor."""
    optimizer = recipe["model"]["init_args"]["optimizer"]["class_path"].rpartition(".")[2]
    one = {"SGD": network.learning, "MuonWithAdamW": network.hidden, "Adam": [], "AdamW": []}[optimizer]
    two = set(network.learning) - set(one)
    return network.bytes_of(one, shards) + 2 * network.bytes_of(two, shards) + len(two) * BLOCK


def check_traffic(trainer, network, traffic, strategy, devices):
    others = (devices - 1) / devices
    if devices == 1:
        assert traffic == {}
    elif strategy == "fsdp2":
        batches = trainer["accumulate_grad_batches"]
        # weights in bfloat16 before each of the two passes, gradients in float32
        assert traffic["all-gather"]["sent"] == 2 * 2 * batches * others * network.number()
        assert traffic["reduce-scatter"]["sent"] == FLOAT * batches * others * network.number()
    else:
        summed, gathered = network.number(network.learning), 0
        if trainer.get("sync_batchnorm"):
            # mean and deviation of each channel and a count are gathered, and two sums of gradients made
            gathered = sum(2 * channels + 1 for channels in network.normalized) * (devices - 1)
            summed += sum(2 * channels for channels in network.normalized)
        assert traffic.get("all-gather", {"sent": 0})["sent"] == FLOAT * gathered
        # the numbers that losses are divided by are summed too, and each sum is rounded
        assert 0 <= traffic["all-reduce"]["sent"] - 2 * FLOAT * others * summed < 16
    assert all(exchanged["sent"] == exchanged["received"] for exchanged in traffic.values())


def check_flops(name, recipe, network, flops, rows):
    if name.startswith("text/"):
        assert flops == pytest.approx(language_model_flops(recipe, network, rows), rel=1e-3)
        assert flops >= 6 * network.number(network.hidden) * rows * recipe["data"]["init_args"]["block_size"]
    elif name in PUBLISHED:
        forward, passes = PUBLISHED[name]
        assert flops == pytest.approx(2e9 * forward * passes * rows, rel=0.03)
    elif recipe["model"]["class_path"] == "GAN":
        # each weight is in a product of the forward pass at least, its gradient in one of the backward pass
        assert flops >= 4 * network.number() * rows
    else:
        # of two steps; the first layer wants no gradient of the pictures, and of attention no layer tells
        assert flops == pytest.approx(3 * 2 * network.multiplications / 2, rel=0.03)


def language_model_flops(recipe, network, rows):
    """Return 6 N T with attention, blocks that are computed anew, and Muon's five iterations for each matrix."""
    model, length = recipe["model"]["init_args"], recipe["data"]["init_args"]["block_size"]
    config = {"hidden_size": model["config"].get("n_embd"), "num_hidden_layers": model["config"].get("n_layer")}
    config |= model["config"]
    width, num_layers = config["hidden_size"], config["num_hidden_layers"]
    blocks, attention = network.number(network.hidden), 4 * length * width * num_layers
    # fused attention computes its first product anew
    backward = 2 if config.get("attn_implementation") == "eager" else 2.5
    of_token = 6 * (blocks + config["vocab_size"] * width) + (1 + backward) * attention
    if model.get("activation_checkpointing"):
        # but for the last product of a block, which no gradient needs
        of_token += 2 * (blocks - num_layers * width * config["intermediate_size"]) + attention
    update = 0
    if model["optimizer"]["class_path"].endswith("MuonWithAdamW"):
        sides = [sorted(network.shapes[key]) for key in network.hidden]
        update = sum(5 * 2 * (2 * short**2 * long + short**3) for short, long in sides)
    return of_token * rows * length + update


def check_time(network, plan, rows, devices):
    step, shards = plan["step"], devices if plan["setting"]["strategy"] == "fsdp2" else 1
    assert step["seconds"] >= step["flops"] / H100[plan["setting"]["precision"]]
    assert step["seconds"] >= FLOAT * network.number() / shards / BANDWIDTH
    assert step["seconds"] == pytest.approx(sum(step["seconds_by_bound"].values()))
    assert step["rows"] == rows * devices
    units = step["rows"] * step["units_per_row"] / step["seconds"]
    assert step["units_per_second"] == pytest.approx(units)
    assert step["units_per_second_and_device"] == pytest.approx(units / devices)


def check_run(trainer, plan, samples, rows, devices):
    run, steps = plan["run"], trainer.get("max_steps") if samples is None else math.ceil(samples / rows / devices)
    if steps is None:
        assert run is None  # only the data know how long an epoch is
        return
    assert run["steps"] == steps
    assert run["rows"] == steps * rows * devices
    assert run["hours"] == pytest.approx(steps * plan["step"]["seconds"] / 3600)
    assert run["cost"] == pytest.approx(run["hours"] * devices * PRICE)


def planned_of(header):
    """Return what a header says of its plan, and the words of the command that gives it; None where there is none."""
    found = re.search(r" Planned: (.*?): bigmodels (plan .*?) [A-Z]", header)
    return found and (found[1], found[2].split())


def planned_words(plan):
    """Return what the header of a recipe that was not run says of its plan."""
    memory, step, run, setting = (plan[key] for key in ("memory", "step", "run", "setting"))
    devices, seconds = setting["devices"] * setting["num_nodes"], step["seconds"]
    allocated, used = (figures(memory[key] / GIB) for key in ("allocated", "used"))
    time = f"{figures(seconds)} s" if seconds >= 1 else f"{figures(1000 * seconds)} ms"
    each = " of each" if devices > 1 else ""
    words = f"{devices} x h100, {allocated} GiB{each} allocated and {used} used; {time} a step, "
    words += f"{figures(step['units_per_second'])} {step['unit']}/s in all"
    if run:
        words += (
            f"; {figures(run['hours'])} hours of training alone, {figures(run['cost'])} at {PRICE} a device and hour"
        )
    return words


def figures(number):
    return f"{float(f'{number:.3g}'):,g}"


def check_words(found, plan):
    """Assert that the words in a header are those of a plan, with figures that are off by a fiftieth at most."""
    expected = planned_words(plan)
    assert re.sub(NUMBER, "#", found) == re.sub(NUMBER, "#", expected), expected
    numbers = ([float(number.replace(",", "")) for number in re.findall(NUMBER, words)] for words in (found, expected))
    for stated, planned in zip(*numbers, strict=True):
        assert stated == pytest.approx(planned, rel=0.02), expected
