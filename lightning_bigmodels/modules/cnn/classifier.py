"""Image classifiers: every network of torchvision's registry, and small ones of our own."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_bigmodels.attribution import Explainable
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn.classifiers import (
    OWN,
    build_body,
    fixed_size,
    load_pretrained,
    output_layers,
    repeated_blocks,
    undecayed_tensors,
)
from lightning_bigmodels.modules.cnn.explanation import draw_heat, explainable_pictures
from lightning_bigmodels.modules.cnn.mixing import Mixing
from lightning_bigmodels.modules.cnn.registry import check_network
from lightning_bigmodels.networks.pixels import PixelNetwork, statistics
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.pictures import captioned
from lightning_bigmodels.tasks import Classification, Exportable
from lightning_bigmodels.tasks.fine_tuning import FineTuning

# of each auxiliary head's loss: section 5 of Szegedy et al. 2015, and torchvision's training script
_AUXILIARY = {"googlenet": 0.3, "inception_v3": 0.4}


@final
class ImageClassifier(FineTuning, Classification):
    """Names what a picture shows, with any classifier of torchvision's registry, from scratch or pretrained.

    Args:
        network: Name in torchvision's registry, such as resnet50, convnext_tiny or vit_b_16, small_cnn or
            small_resnet.
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
        mixup_alpha: Blend pictures and labels of a training batch in pairs, by weights from a Beta distribution of this
            parameter; 0: no mixup. With both, each batch draws one of the two.
        cutmix_alpha: Put a rectangle of one picture into another, labels by area; 0: no CutMix.
        layer_decay: Factor on the learning rate from each block to the one below it, for fine-tuning; 1: none.
        unfreeze_after: Optimizer steps in which only the new output layer learns; below 1, the fraction of the run.
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
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        layer_decay: float = 1.0,
        unfreeze_after: float = 0.0,
        channels_last: bool = False,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(
            layer_decay=layer_decay,
            unfreeze_after=unfreeze_after,
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
        if unfreeze_after and weights is None:
            raise InputError(
                "unfreeze_after keeps a random body from learning; name weights to start from, or set it to 0"
            )
        self.network_name = network
        self.channels = channels
        self.image_size = image_size
        self.weights = weights
        self.network_args = dict(network_args or {})
        self.statistics = mean, std
        self.channels_last = channels_last
        self._mixing = Mixing(num_classes, mixup_alpha, cutmix_alpha, multi_label)
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
        return self.with_channels_last(network) if self.channels_last else network

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
        return repeated_blocks(self.network.body)

    @override
    def undecayed(self) -> set[nn.Parameter]:
        assert self.network is not None
        return undecayed_tensors(self.network.body)

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        return {} if self.weights is None else {"weights": None, "unfreeze_after": 0.0}

    # ---- steps

    @override
    def mix(self, batch: Any) -> Any:
        return self._mixing(batch)

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

    # ---- what others see

    def draw(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return each picture (3, H, W) uint8 above its class and what it was taken for, in red where that is wrong."""
        probabilities = self.probabilities(self.logits(batch)).cpu()
        drawn = []
        for image, label, own in zip(batch["images"], batch["labels"], probabilities, strict=True):
            right = self._shown(label)
            found = self._shown((own >= 0.5).long() if self.multi_label else own.argmax())
            sure = "" if self.multi_label else f" {own.max():.2f}"
            colour = "black" if right == found else "red"
            drawn.append(captioned(image, [f"is {right}", f"seen {found}{sure}"], colour))
        return drawn

    def _shown(self, label: Tensor) -> str:
        if label.ndim == 0:
            return "?" if int(label) == IGNORED else self.class_name(int(label))
        return ", ".join(self.class_name(i) for i, value in enumerate(label.tolist()) if value > 0.5) or "none"

    @override
    def exportable(self) -> Exportable:
        if self.network is None:
            raise RuntimeError("exportable needs the network; call configure_model or load a checkpoint first")
        size = (2, self.channels, self.image_size, self.image_size)
        pixels = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Exportable(
            network=_Probabilities(self.network, self.multi_label),
            inputs=(pixels,),
            input_names=("images",),
            output_names=("probabilities",),
            dynamic=({0: "batch"},),
            description={
                "task": "classification",
                "class_names": [self.class_name(i) for i in range(self.num_classes)],
                "multi_label": self.multi_label,
                "channels": self.channels,
                "image_size": self.image_size,
            },
        )

    @property
    @override
    def flops_per_batch(self) -> int | None:
        if self._batch_shape is None:
            raise RuntimeError("flops_per_batch is known after the first batch")
        rows, *shape = self._batch_shape
        key = tuple(shape)
        if key not in self._flops:
            # the monitor that asks does so without gradients
            with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
                with torch.device("meta"):
                    network = self._random_network()
                # two, since batch norm cannot be trained on one
                found = network(torch.zeros(2, *shape, dtype=torch.uint8, device="meta"))
                outputs = [found] if isinstance(found, Tensor) else [x for x in found if x is not None]
                torch.stack([output.sum() for output in outputs]).sum().backward()
            self._flops[key] = counter.get_total_flops() // 2
        return rows * self._flops[key]

    # ---- explanations

    def explainable(
        self,
        batch: Mapping[str, Any],
        layer: str | None = None,
        baseline: float | None = None,
        window: int | None = None,
    ) -> Explainable:
        """Return the network with a batch's pictures, see `attribution.Explains`."""
        assert self.network is not None
        return explainable_pictures(self.network, batch["images"], layer, baseline, window)

    def draw_explanations(
        self, batch: Mapping[str, Any], heat: Tensor, captions: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """Return each picture beside its heat map: (3, H, W) uint8."""
        return draw_heat(batch["images"], heat, captions)


class _Probabilities(nn.Module):
    """From pixels (B, C, H, W) uint8 to probabilities (B, K).

    Args:
        network: Makes logits.
        multi_label: Whether each class has a probability of its own.
    """

    def __init__(self, network: PixelNetwork, multi_label: bool) -> None:
        super().__init__()
        self.network = network
        self.multi_label = multi_label

    def forward(self, images: Tensor) -> tuple[Tensor]:
        # not through the network's own call, which may be compiled
        logits = self.network.body(self.network.normalize(images))
        return (logits.sigmoid() if self.multi_label else logits.softmax(1),)
