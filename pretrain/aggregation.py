"""BEiT v2's patch aggregation (Peng et al., arXiv 2208.06366, section 2.3): [CLS] learns to gather the image.

Legend: B batch, P Q token and mask grid, N tokens ([CLS] first), D width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.contract import TABLE, Backbone
from mimetic.backbones.vit import ViT
from mimetic.data.views import Normalize
from mimetic.engine.errors import SettingError
from mimetic.engine.objective import StepOutput
from mimetic.pretrain.mim import MaskedImageModeling, TokenHead


class PatchAggregation(MaskedImageModeling):
    """loss = CE(head(norm(last patches))) + CE(head(norm(blocks([last [CLS], patches after `layer` blocks])))): one norm, one head.

    The early patches miss what later blocks would add, and find it in one place only, the last [CLS]. The extra blocks serve
    pretraining alone.

    Args:
        layer: blocks of the backbone after which patches are taken.
        head_layers: extra blocks.

    Raises:
        SettingError: no ViT with a class token, or a layer that it has not below its last.
    """

    backbone: ViT

    def __init__(self, backbone: Backbone, tokenizer: Any, head: TokenHead, normalize: Normalize, device: torch.device, *,
                 layer: int, head_layers: int) -> None:  # fmt: skip
        if not isinstance(backbone, ViT) or not backbone.has_cls or backbone.has_dist:
            raise SettingError(f"backbone.name {backbone.config.get('name')} with these overrides has no [CLS] alone before its patches, "
                               "which aggregates them; use a ViT or BEiT with class_token, or pretrain/beit.py")  # fmt: skip
        if layer >= (depth := len(backbone.blocks)):
            raise SettingError(f"aggregation.layer is {layer}, the backbone has {depth} blocks; take patches after {depth - 1} at most")
        super().__init__(backbone, tokenizer, head, normalize, device)
        self.layer, self.blocks = layer, following_blocks(backbone, layer, head_layers)

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """As `MaskedImageModeling.forward`. `masked_accuracy` is that of the last patches, `aggregated_` what the extra blocks reach."""
        ids_BPQ = self.tokens(batch)
        last_BND, (early_BDPQ,) = self.backbone.forward_tokens(self.normalize(batch["image"]), batch["hidden"], [self.layer - 1])
        late = self.predict(self._map(last_BND), ids_BPQ, batch)
        aggregated = self.predict(self._map(self._aggregate(last_BND[:, :1], early_BDPQ)), ids_BPQ, batch)
        gathered = {"aggregated_accuracy": aggregated.metrics["masked_accuracy"], "aggregated_loss": aggregated.loss.detach()}
        return StepOutput(late.loss + aggregated.loss, {**late.metrics, **gathered}, late.counts)

    def _aggregate(self, cls_B1D: Tensor, early_BDPQ: Tensor) -> Tensor:
        shared = self.backbone.rel_pos_bias
        bias_1nNN = shared() if shared is not None else None
        x_BND = torch.cat([cls_B1D, rearrange(early_BDPQ, "B D P Q -> B (P Q) D")], 1)
        for block in self.blocks:
            x_BND = self.backbone.run_block(block, x_BND, bias_1nNN)
        return x_BND

    def _map(self, x_BND: Tensor) -> Tensor:
        return rearrange(self.backbone.norm(x_BND[:, 1:]), "B (P Q) D -> B D P Q", P=self.backbone.mask_grid[0])

    def no_weight_decay_names(self) -> set[str]:
        """The backbone's, and the bias tables of the extra blocks."""
        return super().no_weight_decay_names() | {name for name, _ in self.named_parameters() if name.endswith(TABLE)}


def following_blocks(backbone: ViT, layer: int, count: int) -> nn.ModuleList:
    """`count` fresh blocks as they come after the first `layer` ones in a net of this kind that is deep enough.

    So initial weights and drop path are those of that depth, as the authors set them; they leave the extra blocks' weights at
    torch's default before scaling them by depth, here they start as all others do.
    """
    config = backbone.config
    depth = max(len(backbone.blocks), layer + count)
    deep = create_backbone(config["name"], image_size=backbone.image_size, in_channels=backbone.in_channels,
                           **config["overrides"] | {"depth": depth})  # fmt: skip
    assert isinstance(deep, ViT)
    return nn.ModuleList(list(deep.blocks)[layer : layer + count])
