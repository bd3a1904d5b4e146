"""VQ-KD as image tokenizer (Peng et al., arXiv 2208.06366): tokens from which a teacher's features can be told, not pixels.

Legend: B batch, C channels, H W pixels, P Q cells (P = H / stride, Q = W / stride), M = B*P*Q, D code width, V codebook size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.contract import Backbone
from mimetic.backbones.layers import init_linear_
from mimetic.backbones.vit import ViT
from mimetic.engine.errors import SettingError
from mimetic.tokenizers.contract import check_image_fits
from mimetic.tokenizers.spherical import SphericalCodebook

SEEDS_PER_CODE = 16
HEAD_WIDTH = 64


class VQKD(nn.Module):
    """The tokenizer: a backbone, a projection to narrow unit vectors, and the codebook that they are looked up in.

    What learns beside it and is needed no more afterwards, the decoder, is `FeatureDecoder`: it is not part of a saved tokenizer.

    Args:
        vocab_size: V.
        in_channels: C.
        backbone: name of the encoder in the catalog.
        image_size: side in pixels; images of another size are refused. None for the name's own.
        overrides: arguments of the encoder that differ from the catalog's.
        code_width: D.

    Raises:
        SettingError: fewer than two codes, or an encoder whose cells are not square.
    """

    def __init__(
        self, vocab_size: int, in_channels: int = 3, backbone: str = "vit_base_patch16_224", image_size: int | None = None,
        overrides: dict[str, Any] | None = None, code_width: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        if vocab_size < 2:
            raise SettingError(f"vocab_size {vocab_size} leaves nothing to choose: take 2 codes or more")
        self.encoder = create_backbone(backbone, image_size=image_size, in_channels=in_channels, **overrides or {})
        (height, width), (rows, columns) = self.encoder.image_size, self.encoder.feature_grid
        if height // rows != width // columns:
            raise SettingError(f"the encoder {backbone} has cells of {height // rows}x{width // columns} pixels; they must be square")
        self.vocab_size, self.in_channels, self.code_width, self.stride = vocab_size, in_channels, code_width, height // rows
        self.image_size = height
        freeze_unused(self.encoder)
        self.projection = task_layer(self.encoder.embed_dim, code_width)
        self.codebook = SphericalCodebook(vocab_size, code_width)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `VQKD(**config)` has this one's shapes."""
        built = self.encoder.config
        return {"vocab_size": self.vocab_size, "in_channels": self.in_channels, "backbone": built["name"],
                "image_size": self.image_size, "overrides": built["overrides"], "code_width": self.code_width}  # fmt: skip

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Return ids_BPQ, int64 in [0, V), of images in [0, 1]. In fp32 under autocast too: some cells are near ties.

        Raises:
            SettingError: images of other channels or of another size than the encoder's.
        """
        with torch.autocast(image_BCHW.device.type, enabled=False):
            z_BDPQ = self.features(image_BCHW.float())
            ids_M = self.codebook.nearest(rows(z_BDPQ))
        return ids_M.view(len(z_BDPQ), *z_BDPQ.shape[2:])

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Return z_BDPQ of unit length, of images in [0, 1]; the projection is computed in fp32, as the authors do."""
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        if image_BCHW.shape[-2:] != self.encoder.image_size:
            raise SettingError(f"the tokenizer takes images of {self.image_size}x{self.image_size} pixels alone, and got "
                               f"{image_BCHW.shape[-2]}x{image_BCHW.shape[-1]}: resize them")  # fmt: skip
        map_BEPQ = self.encoder.forward_features(2 * image_BCHW - 1).map_BDhw
        with torch.autocast(image_BCHW.device.type, enabled=False):
            z_BPQD = F.normalize(self.projection(rearrange(map_BEPQ.float(), "B E P Q -> B P Q E")), dim=-1)
        return rearrange(z_BPQD, "B P Q D -> B D P Q")

    @torch.no_grad()
    def start_codebook(self, image_BCHW: Tensor, seed: int = 0) -> None:
        """Start the codes as the k-means centres of these images' features. Once, before training.

        Every process must pass the same images. Cells beyond 16 V (or 32,768) are sampled down to that.

        Raises:
            SettingError: there are fewer cells than codes.
        """
        z_ND = torch.cat([rows(self.features(part)) for part in image_BCHW.split(64)])
        if len(z_ND) < self.vocab_size:
            raise SettingError(f"{len(z_ND)} cells cannot start {self.vocab_size} codes: start from more images, or lower vocab_size")
        order_N = torch.randperm(len(z_ND), generator=torch.Generator().manual_seed(seed))
        self.codebook.start(z_ND[order_N[: max(SEEDS_PER_CODE * self.vocab_size, 1 << 15)].to(z_ND.device)], seed)


class FeatureDecoder(nn.Module):
    """Tells a teacher's features from codes: a small ViT over the cells, each a patch of one pixel and D channels.

    Args:
        grid: (P, Q).
        code_width: D.
        width: of its blocks.
        depth: blocks; 3 in the paper.
        teacher_width: of the features.
        weight_init: as `ViT` takes it.
    """

    def __init__(
        self, grid: tuple[int, int], code_width: int, width: int, depth: int, teacher_width: int, weight_init: str = "beit"
    ) -> None:
        super().__init__()
        heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.vit = ViT(grid, code_width, patch_size=1, embed_dim=width, depth=depth, num_heads=heads, weight_init=weight_init)
        freeze_unused(self.vit)
        self.projection = task_layer(width, teacher_width)

    def forward(self, code_BDPQ: Tensor) -> Tensor:
        """(B, D, P, Q) -> (B, P, Q, teacher's width)."""
        return self.projection(rearrange(self.vit.forward_features(code_BDPQ).map_BDhw, "B E P Q -> B P Q E"))


def task_layer(width: int, out: int) -> nn.Sequential:
    """The authors' linear, tanh, linear at both ends of the codebook."""
    layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
    init_linear_(layers)
    return layers


def freeze_unused(backbone: Backbone) -> None:
    """What only masking or classifying would use: DDP would wait for its gradient."""
    for name in backbone.head_names():
        backbone.get_parameter(name).requires_grad_(False)
    backbone.mask_token.requires_grad_(False)


def rows(z_BDPQ: Tensor) -> Tensor:
    """(B, D, P, Q) -> (B*P*Q, D)."""
    return rearrange(z_BDPQ, "B D P Q -> (B P Q) D")
