"""ViT-B/16 as a model, with the shapes of its weights, for what follows the channels of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WIDTH, _HEADS, _HIDDEN, _LAYERS, _PATCH, _IMAGE = 768, 12, 3072, 12, 16, 224


class _Block(nn.Module):
    """Attention and two linear layers, around each of which the input is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(_WIDTH, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _WIDTH))

    def forward(self, input: Tensor) -> Tensor:
        x = self.first_norm(input)
        input = input + self.attention(x, x, x, need_weights=False)[0]
        return input + self.hidden(self.second_norm(input))


class _ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (_IMAGE // _PATCH) ** 2 + 1, _WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(_LAYERS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, 1000)

    def forward(self, input: Tensor) -> Tensor:
        x = self.patches(input).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_b_16() -> nn.Module:
    """The model with the weights it starts training from, for inference."""
    return _ViT().eval()
