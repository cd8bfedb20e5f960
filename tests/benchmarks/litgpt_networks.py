"""Decoders whose layers keep for the backward pass what those of litgpt do, for published runs of it to be planned.

Source: Lightning-AI/litgpt, `lit_gpt` at 8641822 (October 2023) and `litgpt` at 62a491c (May 2024), written anew.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Output(NamedTuple):
    """What a decoder returns."""

    logits: Tensor


class LowRankProjection(nn.Module):
    """Frozen queries, keys and values of one product, with a change of low rank to queries and values.

    The changes are one grouped convolution, whose result is copied into zeros where keys stay as they are.

    Args:
        width: Features in; three times as many come out.
        rank: Of each change.
        bias: Whether the frozen product has one.
    """

    def __init__(self, width: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, 3 * width, bias=bias).requires_grad_(False)
        self.down = nn.Parameter(torch.empty(2 * rank, width))
        self.up = nn.Parameter(torch.empty(2 * width, rank))
        self.changed = [*range(width), *range(2 * width, 3 * width)]

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.linear(F.dropout(x, 0.05), self.down).transpose(1, 2)
        change = F.conv1d(narrow, self.up.unsqueeze(-1), groups=2).transpose(1, 2)
        change = change.transpose(0, 1)
        zeros = change.new_zeros(*change.shape[:2], 3 * x.shape[-1]).flatten(0, 1)
        places = torch.tensor(self.changed, device=x.device)
        padded = zeros.index_copy(1, places, change.reshape(-1, change.shape[-1]))
        return self.frozen(x) + padded.unflatten(0, change.shape[:2]).transpose(0, 1) * 2.0


class RootMeanSquareNorm(nn.Module):
    """Written out, in float32 or in the format of its input, as before the end of 2023.

    Args:
        width: Features.
        widened: Whether it is in float32.
    """

    def __init__(self, width: int, widened: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.widened = widened

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if self.widened else x
        scaled = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
        return scaled.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Rotated and concatenated queries and keys; groups of keys are copied for each head.

    Args:
        width: Features.
        heads: Heads of queries.
        groups: Heads of keys and values.
        rotated: Share of a head's features that are rotated.
        bias: Whether products have one.
        rank: Of low-rank changes; 0: there are none.
    """

    def __init__(self, width: int, heads: int, groups: int, rotated: float, bias: bool, rank: int) -> None:
        super().__init__()
        self.size, self.heads, self.groups = width // heads, heads, groups
        self.rotated = int(rotated * self.size)
        self.project: nn.Module
        if rank:
            self.project = LowRankProjection(width, rank, bias)
        else:
            self.project = nn.Linear(width, (heads + 2 * groups) * self.size, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        rows, length, width = x.shape
        each = self.heads // self.groups
        grouped = self.project(x).view(rows, length, self.groups, each + 2, self.size).permute(0, 2, 3, 1, 4)
        query, key, value = grouped.split((each, 1, 1), dim=2)
        key, value = (part.expand(-1, -1, each, -1, -1) for part in (key, value))
        query, key, value = (part.reshape(rows, -1, length, self.size) for part in (query, key, value))
        query, key = (self._rotate(part, turns) for part in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(rows, length, width))

    def _rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        front, rest = x[..., : self.rotated], x[..., self.rotated :]
        first, second = front.chunk(2, dim=-1)
        turned = front * turns + torch.cat((-second, first), dim=-1) * turns
        return torch.cat((turned.to(x.dtype), rest), dim=-1)


class GatedNetwork(nn.Module):
    """Llama's two layers, of which the first is gated."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then two layers; or both of the same input, whose norm they may share."""

    def __init__(self, attention: Attention, norms: list[nn.Module], network: nn.Module, parallel: bool) -> None:
        super().__init__()
        self.attention, self.norms, self.network = attention, nn.ModuleList(norms), network
        self.parallel = parallel

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        normed = self.norms[0](x)
        attended = self.attention(normed, turns)
        if self.parallel:
            return self.network(normed if len(self.norms) == 1 else self.norms[1](x)) + attended + x
        x = attended + x
        return self.network(self.norms[1](x)) + x


class Decoder(nn.Module):
    """A language model of such blocks.

    Args:
        vocabulary: Logits.
        width: Features.
        inner: Features within the two layers.
        layers: Blocks.
        heads: Heads of queries.
        groups: Heads of keys and values; None: as many.
        rotated: Share of a head's features that are rotated.
        kind: `llama`; `neox`, with layer norms, biases and parallel layers; or `phi`, where these share a norm.
        widened: Whether Llama's norms are in float32.
        rank: Of low-rank changes to queries and values, which learn alone; 0: all learns.
    """

    _no_split_modules = ("Block",)

    def __init__(
        self,
        vocabulary: int,
        width: int,
        inner: int,
        layers: int,
        heads: int,
        groups: int | None = None,
        rotated: float = 1.0,
        kind: str = "llama",
        widened: bool = True,
        rank: int = 0,
    ) -> None:
        super().__init__()
        llama = kind == "llama"
        self.rotated = int(rotated * (width // heads))

        def norm() -> nn.Module:
            return RootMeanSquareNorm(width, widened) if llama else nn.LayerNorm(width)

        def block() -> Block:
            attention = Attention(width, heads, groups or heads, rotated, not llama, rank)
            wide = nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width))
            network = GatedNetwork(width, inner) if llama else wide
            return Block(attention, [norm() for _ in range(1 if kind == "phi" else 2)], network, not llama)

        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = norm()
        self.head = nn.Linear(width, vocabulary, bias=kind == "phi")
        if rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.endswith((".down", ".up")) and "network" not in name)

    def get_input_embeddings(self) -> nn.Module:
        """Return what makes features of tokens."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return what makes logits of features."""
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Output:
        turns = torch.zeros(input_ids.shape[1], self.rotated, dtype=torch.float32)
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, turns)
        return Output(self.head(self.norm(x)))
