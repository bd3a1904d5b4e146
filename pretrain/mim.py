"""BEiT's masked image modeling (2106.08254): predict the tokens of hidden cells.

Legend: B batch, C channels, H W pixels, P Q token and mask grid, D width, V codebook size, K hidden cells per image, M = B*K.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import Backbone
from mimetic.backbones.layers import Linear
from mimetic.data.picture import in_unit_range
from mimetic.data.views import Normalize
from mimetic.engine.errors import SettingError
from mimetic.engine.objective import Objective, StepOutput, frozen
from mimetic.engine.pictures import contact_sheet

SHOWN = 12


class TokenHead(nn.Module):
    """`(map_BDhw, hidden_BPQ) -> logits_MV`: a linear classifier over the codebook, computed for hidden cells only.

    Args:
        width: D.
        vocab_size: V.
        count: K, the same in every image: with it known, gathering needs no look at the mask on the host.
        scale: cells of the token grid on a side of a place of the map. Where it is more than one, a linear layer gives each
            place of the map D numbers for each of its cells, and a pixel shuffle lays them out (SimMIM's decoder, arXiv:2111.09886).
    """

    def __init__(self, width: int, vocab_size: int, count: int, scale: int = 1) -> None:
        super().__init__()
        self.count, self.scale = count, scale
        self.expand = Linear(width, scale * scale * width) if scale > 1 else None
        self.linear = Linear(width, vocab_size)
        for layer in (self.linear, self.expand):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, map_BDhw: Tensor, hidden_BPQ: Tensor) -> Tensor:
        """Logits of the hidden cells, image by image, in reading order."""
        x_BhwD = rearrange(map_BDhw, "B D h w -> B h w D")
        if self.expand is not None:
            x_BhwD = rearrange(self.expand(x_BhwD), "B h w (a b D) -> B (h a) (w b) D", a=self.scale, b=self.scale)
        return self.linear(gather_hidden(x_BhwD.flatten(1, 2), hidden_BPQ, self.count))


def gather_hidden(values_BND: Tensor, hidden_BPQ: Tensor, count: int) -> Tensor:
    """(B, P*Q, D) and exactly `count` hidden cells per image -> (B*count, D), without a host sync."""
    index_BK = hidden_BPQ.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return rearrange(values_BND.gather(1, index_BK[..., None].expand(-1, -1, values_BND.shape[-1])), "B K D -> (B K) D")


def check_grids(backbone: Backbone, token_grid: tuple[int, int], stride: int) -> int:
    """Cells of the token grid on a side of a place of the backbone's map.

    Args:
        stride: the tokenizer's, for the cure.

    Raises:
        SettingError: the token grid is no whole multiple of the feature grid, or the mask on it would cut the stem's cells.
    """
    scales = [tokens // places for tokens, places in zip(token_grid, backbone.feature_grid, strict=True)]
    fits = [tokens == scale * places and stem % tokens == 0
            for tokens, scale, places, stem in zip(token_grid, scales, backbone.feature_grid, backbone.stem_grid, strict=True)]  # fmt: skip
    if not all(fits) or len(set(scales)) > 1:
        tokens, places, stem = ("x".join(map(str, grid)) for grid in (token_grid, backbone.feature_grid, backbone.stem_grid))
        cure = f"{backbone.mask_grid[0]} x the tokenizer's stride {stride} = {backbone.mask_grid[0] * stride}"
        raise SettingError(f"the token grid is {tokens}; it must be a whole multiple of the backbone's feature grid {places} and divide "
                           f"its stem's grid {stem}; set views.target_size to {cure}")  # fmt: skip
    return scales[0]


class MaskedImageModeling(Objective):
    """ids = tokenizer(target); features = backbone(image, hidden); logits = head(features, hidden); loss = CE(logits, ids[hidden]).

    The tokenizer is frozen, and in neither state_dict nor optimizer; so are the backbone's parts that only classify.
    """

    def __init__(self, backbone: Backbone, tokenizer: Any, head: TokenHead, normalize: Normalize, device: torch.device) -> None:
        super().__init__()
        self.backbone, self.head, self.normalize = backbone, head, normalize
        for name in backbone.head_names():
            backbone.get_parameter(name).requires_grad_(False)
        self._tokenizer = frozen(tokenizer, device)
        self.num_depths = backbone.num_depths

    @property
    def tokenizer(self) -> Any:
        """The frozen image tokenizer."""
        return self._tokenizer[0]

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image`, `target` (B, C, H, W), uint8 or in [0, 1], or its `ids` int64 (B, P, Q); `hidden` bool (B, P, Q); `valid` bool (B,)."""
        ids_BPQ = self.tokens(batch)
        features = self.backbone.forward_features(self.normalize(batch["image"]), batch["hidden"])
        return self.predict(features.map_BDhw, ids_BPQ, batch)

    def tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """The batch's ids_BPQ, cached or made here of its `target`."""
        return batch["ids"] if "ids" in batch else self.tokenizer.encode(in_unit_range(batch["target"]))

    def predict(self, map_BDhw: Tensor, ids_BPQ: Tensor, batch: Mapping[str, Any]) -> StepOutput:
        """The cross-entropy of the head's logits at hidden cells; metrics over the valid images."""
        logits_MV = self.head(map_BDhw, batch["hidden"])
        ids_M = gather_hidden(ids_BPQ.flatten(1)[..., None], batch["hidden"], self.head.count)[:, 0]
        valid_M = batch["valid"].repeat_interleave(self.head.count).float()
        valid_M = valid_M / valid_M.sum().clamp(min=1)
        loss = (F.cross_entropy(logits_MV.float(), ids_M, reduction="none") * valid_M).sum()
        guess_M = logits_MV.detach().max(1).indices  # on a CPU argmax takes more than twice as long
        accuracy = ((guess_M == ids_M) * valid_M).sum()
        codes = torch.zeros(logits_MV.shape[1], device=logits_MV.device).index_add_(0, guess_M, torch.ones_like(valid_M))
        return StepOutput(loss, {"masked_accuracy": accuracy}, {"predicted_codes": codes})

    @property
    def measured_on(self) -> dict[str, Any]:
        """What a record of held-out images says beside the number."""
        return {"hidden": self.head.count, "vocab_size": self.tokenizer.vocab_size}

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Rows: image, what the encoder sees, its true tokens decoded, predicted tokens at hidden cells decoded."""
        image, target = in_unit_range(batch["image"][:SHOWN]), in_unit_range(batch["target"][:SHOWN])
        hidden = batch["hidden"][:SHOWN]
        side = image.shape[-1] // hidden.shape[-1]
        covered = hidden.repeat_interleave(side, -1).repeat_interleave(side, -2)[:, None]
        rows = [image, torch.where(covered, 0.5, image)]
        if hasattr(self.tokenizer, "decode"):
            was_training = self.backbone.training
            self.backbone.eval()
            ids_BPQ = self.tokenizer.encode(target)
            features = self.backbone.forward_features(self.normalize(batch["image"][:SHOWN]), hidden)
            guess_M = self.head(features.map_BDhw, hidden).argmax(1)
            self.backbone.train(was_training)
            predicted_BPQ = ids_BPQ.masked_scatter(hidden, guess_M)
            rows += [self.tokenizer.decode(ids_BPQ), self.tokenizer.decode(predicted_BPQ)]
        return contact_sheet(rows)

    def describe(self) -> dict[str, Any]:
        """The backbone, and what its input is normalized with."""
        return {"prefix": "backbone.", "create_backbone": self.backbone.config, **self.normalize.describe()}

    def depth_of(self, parameter_name: str) -> int:
        """The backbone's own depths; the token head is last."""
        owner, _, name = parameter_name.partition(".")
        return self.backbone.depth_of(name) if owner == "backbone" else self.num_depths - 1

    def no_weight_decay_names(self) -> set[str]:
        """The backbone's tokens, positions and bias tables."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay_names()}
