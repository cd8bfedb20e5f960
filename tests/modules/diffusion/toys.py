"""Tiny diffusion models."""

import torch

from lightning_bigmodels import Diffusion

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}


def tiny(seed=0, dit=False, **changes):
    """Return a built model of 8 x 8 pixels, with `changes`, whose layers of zeros are none."""
    torch.manual_seed(seed)
    network = {"architecture": "DiTTransformer2DModel", "config": DIT} if dit else {"config": UNET}
    model = Diffusion(**{"image_size": 8, "channels": 1, "num_sampling_steps": 4, **network, **changes})
    model.configure_model()
    return model


def batch_of(count, num_classes=3):
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(count) % num_classes,
        "indices": torch.arange(count),
    }
