"""LightningDataModules, one data type per file; `batches` declares what they yield."""

from typing import TYPE_CHECKING

from lightning_bigmodels.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_bigmodels.data.captioned_images import CaptionedImages
    from lightning_bigmodels.data.datamodule import DataModule
    from lightning_bigmodels.data.detection_images import DetectionImages
    from lightning_bigmodels.data.images import Images
    from lightning_bigmodels.data.segmentation_images import SegmentationImages
    from lightning_bigmodels.data.super_resolution_images import SuperResolutionImages
    from lightning_bigmodels.data.text import Text
    from lightning_bigmodels.data.uneven import EvenBatches

__all__ = [
    "CaptionedImages",
    "DataModule",
    "DetectionImages",
    "EvenBatches",
    "Images",
    "SegmentationImages",
    "SuperResolutionImages",
    "Text",
]

# sources and token caches are usable without waiting for Lightning, text without torchvision, images without tokenizers
__getattr__ = lazy_names(
    __name__,
    {
        "CaptionedImages": "captioned_images",
        "DataModule": "datamodule",
        "DetectionImages": "detection_images",
        "EvenBatches": "uneven",
        "Images": "images",
        "SegmentationImages": "segmentation_images",
        "SuperResolutionImages": "super_resolution_images",
        "Text": "text",
    },
)
