"""Attention by hand on a CPU gives what torch's fused kernel gives, and long rows are left to that."""

from unittest import mock

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F

from lightning_bigmodels.modules.diffusion.attention import LONGEST_PLAIN, attend_by_hand

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 2, "sample_size": 8}
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([3, 700])
STATES = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def unet():
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return network, {}


def dit():
    network = DiTTransformer2DModel(**HEADS, in_channels=3, out_channels=3, num_embeds_ada_norm=4)
    return network, {"class_labels": torch.tensor([0, 3])}


def conditional_unet():
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return network, {"encoder_hidden_states": STATES}


def pixart():
    network = PixArtTransformer2DModel(
        **HEADS,
        in_channels=3,
        out_channels=3,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    told = {"resolution": None, "aspect_ratio": None}
    return network, {"encoder_hidden_states": STATES, "encoder_attention_mask": MASK, "added_cond_kwargs": told}


@pytest.mark.parametrize("make", [unet, dit, conditional_unet, pixart])
def test_it_gives_what_the_fused_kernel_gives(make):
    network, told = make()
    for parameter in network.parameters():
        # layers that begin at zero would hide what comes before them
        parameter.data = parameter + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    network.eval()

    def predict():
        made = network(PICTURES, timestep=TIMES, return_dict=False, **told)[0]
        made.square().mean().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        network.zero_grad()
        return [made, *gradients]

    fused = predict()
    attend_by_hand(network)
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError("by the fused kernel")):
        by_hand = predict()
    assert len(by_hand) == len(fused) > 20
    for one, other in zip(by_hand, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, LONGEST_PLAIN + 1, 16), (1, 16, 1, LONGEST_PLAIN + 1)])
def test_long_rows_are_left_to_the_fused_kernel(shape):
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    attend_by_hand(layer)
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=F.scaled_dot_product_attention) as fused:
        layer(torch.randn(shape))
        assert fused.call_count == 1
        layer(torch.randn(1, LONGEST_PLAIN, 16))
        assert fused.call_count == 1
        # short ones that ask for much
        layer(torch.randn(1, 4, 16), encoder_hidden_states=torch.randn(1, LONGEST_PLAIN + 1, 16))
        assert fused.call_count == 2


def test_layers_that_norm_queries_and_keys_are_left_alone():
    layer = Attention(query_dim=16, heads=2, dim_head=8, qk_norm="layer_norm")
    attend_by_hand(layer)
    assert type(layer.processor) is AttnProcessor2_0
