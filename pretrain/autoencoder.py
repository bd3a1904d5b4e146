"""Masked autoencoding (MAE, arXiv:2111.06377): the encoder sees visible patches alone, a light decoder paints the hidden ones.

Legend: B batch, C channels, H W pixels, P Q patch grid, N visible patches, K hidden ones, D width, X numbers of a patch's pixels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.layers import Linear
from mimetic.backbones.vit import Block, ViT, sincos_positions
from mimetic.data.views import Normalize
from mimetic.engine.objective import StepOutput
from mimetic.pretrain.pixels import PixelModeling


class Decoder(nn.Module):
    """Visible tokens and a mask token for each hidden patch, with fixed positions, through a few blocks to the hidden pixels.

    Attention knows no order beside positions, so tokens are not put back in reading order.

    Args:
        width: of the encoder.
        grid: (P, Q). outputs: X.
        embed_dim: width of the decoder; depth: its blocks; num_heads: its heads.
    """

    positions_LD: Tensor

    def __init__(self, width: int, grid: tuple[int, int], outputs: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embed = Linear(width, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("positions_LD", sincos_positions(grid, embed_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, 4 * embed_dim, True, True, None, None, 0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pred = Linear(embed_dim, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, tokens_BTD: Tensor, visible_BN: Tensor, hidden_BK: Tensor) -> Tensor:
        """The encoder's tokens (those before the patches have no position here) and places of patches -> (B, K, X)."""
        x_BTD = self.embed(tokens_BTD)
        first, count = x_BTD.shape[1] - visible_BN.shape[1], hidden_BK.shape[1]
        masks_BKD = self.mask_token.to(x_BTD.dtype).expand(len(x_BTD), count, -1)
        positions_BLD = self.positions_LD[torch.cat([visible_BN, hidden_BK], 1)]
        patches_BLD = torch.cat([x_BTD[:, first:], masks_BKD], 1) + positions_BLD
        x_BLD = torch.cat([x_BTD[:, :first], patches_BLD], 1)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.pred(self.norm(x_BLD[:, -count:]))


class MAE(PixelModeling):
    """tokens = backbone(visible patches); painted = decoder(tokens); loss = (painted - pixels)^2 over hidden patches.

    Args:
        norm_pix_loss: targets are a patch's pixels less their mean, over their deviation.
    """

    backbone: ViT

    def __init__(self, backbone: ViT, decoder: Decoder, normalize: Normalize, count: int, norm_pix_loss: bool = True) -> None:
        super().__init__(backbone, decoder, normalize, count)
        self.norm_pix_loss = norm_pix_loss
        backbone.mask_token.requires_grad_(False)  # the encoder never meets one

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image` (B, C, H, W), uint8 or in [0, 1], `hidden` bool (B, P, Q), `valid` bool (B,)."""
        image_BCHW = self.normalize(batch["image"])
        visible_BN, hidden_BK = visible_and_hidden(batch["hidden"], self.count)
        painted_BKX = self.decoder(self.backbone.forward_visible(image_BCHW, visible_BN), visible_BN, hidden_BK).float()
        pixels_BKX = take(self._patches(image_BCHW), hidden_BK)
        mean_BK1, deviation_BK1 = self._scale(pixels_BKX)
        error_B = (painted_BKX - (pixels_BKX - mean_BK1) / deviation_BK1).square().mean((1, 2))
        valid_B = batch["valid"].float()
        return StepOutput((error_B * valid_B).sum() / valid_B.sum().clamp(min=1))

    def paint(self, image_BCHW: Tensor, hidden_BPQ: Tensor) -> Tensor:
        """See `PixelModeling.paint`."""
        visible_BN, hidden_BK = visible_and_hidden(hidden_BPQ, self.count)
        painted_BKX = self.decoder(self.backbone.forward_visible(image_BCHW, visible_BN), visible_BN, hidden_BK)
        patch_BLX = self._patches(image_BCHW)
        mean_BK1, deviation_BK1 = self._scale(take(patch_BLX, hidden_BK))
        index_BKX = hidden_BK[..., None].expand_as(painted_BKX)
        patch_BLX = patch_BLX.scatter(1, index_BKX, painted_BKX * deviation_BK1 + mean_BK1)
        (rows, columns), (a, b) = self.backbone.mask_grid, self.backbone.patch_size
        return rearrange(patch_BLX, "B (P Q) (a b C) -> B C (P a) (Q b)", P=rows, Q=columns, a=a, b=b)

    def _patches(self, image_BCHW: Tensor) -> Tensor:
        a, b = self.backbone.patch_size
        return rearrange(image_BCHW, "B C (P a) (Q b) -> B (P Q) (a b C)", a=a, b=b)

    def _scale(self, pixels_BKX: Tensor) -> tuple[Tensor, Tensor]:
        if not self.norm_pix_loss:
            return pixels_BKX.new_zeros(()), pixels_BKX.new_ones(())
        return pixels_BKX.mean(-1, keepdim=True), (pixels_BKX.var(-1, keepdim=True) + 1e-6).sqrt()

    def no_weight_decay_names(self) -> set[str]:
        """The backbone's, and the decoder's mask token."""
        return super().no_weight_decay_names() | {"decoder.mask_token"}


def visible_and_hidden(hidden_BPQ: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places of visible patches (B, N) and of the `count` hidden ones (B, K), in reading order, without a host sync."""
    order_BL = hidden_BPQ.flatten(1).int().argsort(dim=1, stable=True)
    return order_BL[:, :-count], order_BL[:, -count:]


def take(values_BLX: Tensor, places_BK: Tensor) -> Tensor:
    """(B, L, X) and places (B, K) -> (B, K, X)."""
    return values_BLX.gather(1, places_BK[..., None].expand(-1, -1, values_BLX.shape[-1]))
