"""Object detectors: every one of torchvision's registry that finds boxes or masks, and small ones of our own."""

from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as InvertedResidualV2
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn import detectors
from lightning_bigmodels.networks.detection import DetectionNetwork
from lightning_bigmodels.networks.fixed_detection import FixedDetector, OneStage
from lightning_bigmodels.networks.fixed_detection_check import check_found
from lightning_bigmodels.networks.fixed_two_stages import TwoStages
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks import Exportable
from lightning_bigmodels.tasks.detection import Detection

_OUTPUTS = ("cls_logits", "bbox_reg", "bbox_ctrness", "bbox_pred", "cls_score", "mask_fcn_logits")


@final
class ObjectDetector(Detection):
    """Finds the objects in pictures: a box, a class and a score for each, and a mask where the network makes some.

    The loss is the sum of the network's own losses, each logged beside it. Validation and test look at one picture
    after the other, so that no picture's padding depends on its neighbours: loss and COCO's average precision (`map`,
    at overlaps of 50 % and 75 % `map_50` and `map_75`, of each class `map_of_...`; of masks `mask_map`, ...) are those
    of one process on any number of them.

    Args:
        network: Name in torchvision's registry of detectors, such as fasterrcnn_resnet50_fpn, fcos_resnet50_fpn,
            retinanet_resnet50_fpn_v2, ssd300_vgg16, ssdlite320_mobilenet_v3_large or maskrcnn_resnet50_fpn; or a small
            one that trains on a CPU: fcos_small, retinanet_small, fasterrcnn_small, maskrcnn_small.
        num_classes: Classes, the background not counted; null: those of the data.
        weights: Weights of a whole detector to start from: DEFAULT or another name of torchvision's, or a local .pth or
            .safetensors file; null draws random ones. Layers that do not fit (other classes) are made anew.
        backbone_weights: Weights of a classifier for the backbone, in place of `weights`: DEFAULT or another name of
            torchvision's, such as IMAGENET1K_V1, or a local file.
        trainable_backbone_layers: Stages of the backbone, from its end, that learn, of 5 (ResNet) or 6 (MobileNet);
            null: torchvision's 3 of them where the backbone starts from weights, or else all.
        frozen_batch_norm: Whether batch norms are constants; null: as in torchvision where weights are given, so that
            a few pictures a batch do no harm.
        network_args: More arguments of the network, under torchvision's names, such as min_size and max_size, to which
            it scales pictures, box_score_thresh or detections_per_img.
        drawn_score: Least score of the boxes that are drawn into pictures.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Run the backbone through torch.compile.

    Raises:
        InputError: an unknown network or argument of it, or a value out of range.
    """

    def __init__(
        self,
        network: str = "fasterrcnn_resnet50_fpn",
        num_classes: int | None = None,
        weights: str | None = None,
        backbone_weights: str | None = None,
        trainable_backbone_layers: int | None = None,
        frozen_batch_norm: bool | None = None,
        network_args: dict[str, Any] | None = None,
        drawn_score: float = 0.5,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        detectors.check_detector(network)
        super().__init__(
            num_classes=num_classes,
            loss_names=detectors.loss_names(network),
            finds_masks=detectors.kind_of(network) == "maskrcnn",
            drawn_score=drawn_score,
            optimizer=optimizer,
            schedule=schedule,
            l1_penalty=l1_penalty,
            compile=compile,
        )
        if weights is not None and backbone_weights is not None:
            raise InputError("weights hold a backbone too; set either weights or backbone_weights")
        self.network_name = network
        self.weights = weights
        self.backbone_weights = backbone_weights
        pretrained = weights is not None or backbone_weights is not None
        self.trainable_backbone_layers = trainable_backbone_layers
        if trainable_backbone_layers is None and pretrained and detectors.has_stages(network):
            self.trainable_backbone_layers = 3
        self.frozen_batch_norm = (
            detectors.freezes_norms(network, pretrained) if frozen_batch_norm is None else frozen_batch_norm
        )
        self.network_args = dict(network_args or {})
        self.save_hyperparameters()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        # torchvision takes no boxes in this format, in which an edge beyond 256 is off by a pixel and more (0.29)
        if str(self.trainer.precision) == "bf16-true" and detectors.kind_of(self.network_name).endswith("rcnn"):
            raise InputError(
                f"trainer.precision bf16-true would round the boxes that {self.network_name} learns from; set it to "
                f"bf16-mixed"
            )

    # ---- the network

    @override
    def build_network(self) -> DetectionNetwork:
        if not self.num_classes:
            raise InputError("num_classes is not known; set model.num_classes, or name data that name their classes")
        body = detectors.build_body(self.network_name, self.num_classes, self.network_args)
        if self.frozen_batch_norm:
            detectors.freeze_norms(body)
        if not next(body.parameters()).is_meta:
            if self.weights is not None:
                new = detectors.load_detector(body, self.network_name, self.weights)
                rank_zero_info(f"of {self.network_name} all weights were read but {len(new)}, which are made anew")
            if self.backbone_weights is not None:
                detectors.load_backbone(body, self.network_name, self.backbone_weights)
        if self.trainable_backbone_layers is not None:
            detectors.freeze_backbone(body, self.network_name, self.trainable_backbone_layers)
        return DetectionNetwork(body)

    @override
    def configure_model(self) -> None:
        is_new = self.network is None
        super().configure_model()
        if is_new and self.compile_network:
            assert self.network is not None
            self.network.body.backbone.compile()  # type: ignore[union-attr]

    @override
    def output_modules(self) -> list[nn.Module]:
        assert self.network is not None
        return [m for name, m in self.network.named_modules() if name.rpartition(".")[2] in _OUTPUTS]

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        kinds = (BasicBlock, Bottleneck, InvertedResidual, InvertedResidualV2)
        return [module for module in self.network.modules() if isinstance(module, kinds)]

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes or None,
            "weights": None,
            "backbone_weights": None,
            "trainable_backbone_layers": self.trainable_backbone_layers,
            "frozen_batch_norm": self.frozen_batch_norm,
        }

    @override
    def exportable(self) -> Exportable:
        network = self.network
        assert network is not None
        side = int(max(network.body.transform.min_size))  # type: ignore[arg-type, union-attr]
        two_stages = hasattr(network.body, "roi_heads")
        fixed: FixedDetector = TwoStages(network) if two_stages else OneStage(network)
        masks = {"masks": "255 times the probability of each pixel; 128 and more is the object"}
        return Exportable(
            network=fixed,
            inputs=(torch.zeros(3, side, side, dtype=torch.uint8),),
            input_names=("image",),
            output_names=("boxes", "labels", "scores", *(("masks",) if fixed.finds_masks else ())),
            dynamic=({},),
            description={
                "network": self.network_name,
                "network_args": self.network_args,
                "class_names": self.class_names,
                "category_ids": self.category_ids,
                "boxes": "left, top, right, bottom in pixels; rows of label 0 are none; label 1 is the first class",
                **(masks if fixed.finds_masks else {}),
            },
            check=lambda network, inputs, found, rounding: check_found(network, inputs[0], found, rounding),
        )
