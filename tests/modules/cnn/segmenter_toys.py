"""Small segmenters and batches of a few pixels."""

import torch

from lightning_bigmodels import ImageSegmenter

TINY = {"network": "unet", "num_classes": 3, "network_args": {"depth": 1, "width": 8, "norm": "group"}}
DATA = {"source": "digits:30", "image_size": 32, "batch_size": 4, "eval_batch_size": 2}
DIGITS = {**TINY, "num_classes": 11}


def built(**changes):
    torch.manual_seed(0)
    model = ImageSegmenter(**{**TINY, **changes})
    model.configure_model()
    return model


def batch_of(masks, channels=3):
    masks = torch.as_tensor(masks)
    images = torch.randint(
        256, (len(masks), channels, *masks.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return {"images": images, "masks": masks, "indices": torch.arange(len(masks))}
