"""Image classifiers: every network of torchvision's registry, and small ones of our own."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn.classifiers import OWN, build_body, fixed_size, load_pretrained, output_layers
from lightning_bigmodels.modules.cnn.registry import check_network
from lightning_bigmodels.networks.pixels import PixelNetwork, statistics
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks import Classification

# of each auxiliary head's loss: section 5 of Szegedy et al. 2015, and torchvision's training script
_AUXILIARY = {"googlenet": 0.3, "inception_v3": 0.4}


@final
class ImageClassifier(Classification):
    """Names what a picture shows, with any classifier of torchvision's registry, from scratch or pretrained.

    Args:
        network: Name in torchvision's registry, such as resnet50, convnext_tiny or vit_b_16, or small_cnn.
        num_classes: Classes, as many as the data have.
        channels: Channels of the pictures; another number than 3 replaces the first convolution.
        image_size: Height and width of the pictures, for the networks that are built for one size (small_cnn, ViT,
            MaxViT); the others take any, and this one as an example.
        weights: Weights to start from: DEFAULT or another name of torchvision's, or a local .pth or .safetensors file;
            null draws random ones. Layers that do not fit (classes, channels) are made anew.
        network_args: More arguments of torchvision's builder, such as dropout or stochastic_depth_prob.
        multi_label: Whether a picture may show several classes or none.
        label_smoothing: Share of each training label that is spread evenly over all classes.
        class_weights: Factor on each class in the training loss.
        mean: Mean of each channel, of pixels in [0, 1]; null: that of the weights, ImageNet's, or one half.
        std: Standard deviation of each channel; null: as for the mean.
        channels_last: Keep pictures and weights with their channels innermost, which convolutions are fastest with.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Run the network through torch.compile.

    Raises:
        InputError: an unknown network, or a value out of range.
    """

    network: PixelNetwork | None

    def __init__(
        self,
        network: str = "resnet18",
        num_classes: int = 1000,
        channels: int = 3,
        image_size: int = 224,
        weights: str | None = None,
        network_args: dict[str, Any] | None = None,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels_last: bool = False,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            multi_label=multi_label,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            optimizer=optimizer,
            schedule=schedule,
            l1_penalty=l1_penalty,
            compile=compile,
        )
        check_network("classification", network, tuple(OWN))
        for name, value in {"channels": channels, "image_size": image_size}.items():
            if value < 1:
                raise InputError(f"{name} is {value}; set it to 1 or more")
        for name, values in {"mean": mean, "std": std}.items():
            if values is not None and len(values) != channels:
                raise InputError(f"{name} holds {len(values)} numbers and channels is {channels}; give one for each")
        self.network_name = network
        self.channels = channels
        self.image_size = image_size
        self.weights = weights
        self.network_args = dict(network_args or {})
        self.statistics = mean, std
        self.channels_last = channels_last
        self._flops: dict[tuple[int, ...], int] = {}
        self._batch_shape: tuple[int, ...] | None = None
        self.save_hyperparameters()

    # ---- the network

    def _random_network(self) -> PixelNetwork:
        body = build_body(self.network_name, self.num_classes, self.channels, self.image_size, self.network_args)
        return PixelNetwork(body, *statistics(self.channels, *self.statistics))

    @override
    def build_network(self) -> PixelNetwork:
        network = self._random_network()
        if self.weights is not None and network.mean.device.type != "meta":
            load_pretrained(network, self.network_name, self.weights, self.channels)
        if self.channels_last and self.device_mesh is None:
            # FSDP2 takes contiguous weights alone; there the pictures' layout is enough
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    @override
    def configure_model(self) -> None:
        is_new = self.network is None
        super().configure_model()
        if is_new and self.compile_network:
            assert self.network is not None
            self.network.compile()

    @override
    def output_modules(self) -> list[nn.Module]:
        assert self.network is not None
        return output_layers(self.network.body)

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        return []

    # ---- steps

    def _forward(self, images: Tensor) -> Any:
        assert self.network is not None
        self._batch_shape = tuple(images.shape)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    @override
    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        found = self._forward(batch["images"])
        return found if isinstance(found, Tensor) else found[0]

    @override
    def weighted_logits(self, batch: Mapping[str, Any]) -> list[tuple[float, Tensor]]:
        found = self._forward(batch["images"])
        if isinstance(found, Tensor):
            return [(1.0, found)]
        # of GoogLeNet and Inception, in training
        weight = _AUXILIARY[self.network_name]
        return [(1.0, found[0]), *((weight, logits) for logits in found[1:] if logits is not None)]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        channels = getattr(data, "channels", self.channels)
        if channels != self.channels:
            raise InputError(
                f"data.channels is {channels} and model.channels is {self.channels}; give both the same number"
            )
        size = getattr(data, "image_size", self.image_size)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if fixed_size(self.network_name) and sides != (self.image_size,) * 2:
            raise InputError(
                f"{self.network_name} is built for pictures of one size, model.image_size {self.image_size}, and "
                f"data.image_size is {size}; set both to the same"
            )

    @property
    @override
    def flops_per_batch(self) -> int | None:
        if self._batch_shape is None:
            raise RuntimeError("flops_per_batch is known after the first batch")
        rows, *shape = self._batch_shape
        key = tuple(shape)
        if key not in self._flops:
            with torch.device("meta"):
                network = self._random_network()
                counter = FlopCounterMode(display=False)
                with counter:
                    # two, since batch norm cannot be trained on one
                    found = network(torch.zeros(2, *shape, dtype=torch.uint8))
                    (found if isinstance(found, Tensor) else sum(x.sum() for x in found)).sum().backward()
            self._flops[key] = counter.get_total_flops() // 2
        return rows * self._flops[key]
