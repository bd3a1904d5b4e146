"""The dVAE's convolutions: from pixels down to the cell grid, and back.

Legend: B batch, C channels, H W pixels, P Q cells, D code width.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), on the cell grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, P, Q) to the same shape."""
        return x + self.out(torch.relu(self.mix(torch.relu(x))))


def stage_widths(width: int, stride: int) -> list[int]:
    """Channels after each halving of the image: `width` last, half as many for each doubling of the side, but 16 at least."""
    halvings = stride.bit_length() - 1
    return [max(width >> left, min(16, width)) for left in reversed(range(halvings))]


def build_encoder(in_channels: int, stride: int, width: int, code_width: int, depth: int) -> nn.Sequential:
    """(B, C, H, W) to (B, D, P, Q): 4x4 convolutions of stride 2 down to the grid, then residual blocks."""
    channels = [in_channels, *stage_widths(width, stride)]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
    blocks = [Residual(width) for _ in range(depth)]
    return nn.Sequential(*layers[:-1], *blocks, nn.ReLU(), nn.Conv2d(width, code_width, 1))


def build_decoder(out_channels: int, stride: int, width: int, code_width: int, depth: int) -> nn.Sequential:
    """(B, D, P, Q) to (B, out_channels, H, W): the encoder's mirror image."""
    channels = [*reversed(stage_widths(width, stride)), out_channels]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    return nn.Sequential(nn.Conv2d(code_width, width, 1), *[Residual(width) for _ in range(depth)], *layers)
