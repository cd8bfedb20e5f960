"""Attention of diffusers' networks on a CPU, where torch's fused kernel is slow for short rows."""

from typing import Any

from torch import Tensor, nn

LONGEST_PLAIN = 256
"""Rows of up to that many positions are attended to step by step on a CPU.

One thread of an AMD Zen 5 took for bf16 rows of (64 examples, 4 heads, 64 positions, 32 values) 6.6 ms forward and
backward where `scaled_dot_product_attention` took 37.9 ms; with 256 positions 148 and 157 ms (torch 2.14).
"""


class ShortRowsByHand:
    """An attention processor of diffusers: products and softmax one by one for short rows on a CPU, else torch's own.

    Both compute the same; it is chosen at each call, since a network may move to another device.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self._by_hand = AttnProcessor()
        self._fused = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return states like those given, (B, T, C) or (B, C, H, W), after attention.

        Args:
            attn: The layer.
            hidden_states: What asks.
            encoder_hidden_states: (B, S, D), what is asked; None: the states themselves.
            attention_mask: Added to the scores.
            temb: The embedding of the time, for layers with a spatial norm.
        """
        asking = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
        asked = asking if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        by_hand = hidden_states.device.type == "cpu" and max(asking, asked) <= LONGEST_PLAIN
        process = self._by_hand if by_hand else self._fused
        return process(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def attend_by_hand(network: nn.Module) -> nn.Module:
    """Let the layers of a network that have torch's fused attention do without it for short rows on a CPU."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for module in network.modules():
        # norms of queries and keys are known to the fused processor alone
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0 and module.norm_q is None:
            module.set_processor(ShortRowsByHand())
    return network
