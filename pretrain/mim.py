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
    """

    def __init__(self, width: int, vocab_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, vocab_size)
        nn.init.trunc_normal_(self.linear.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, map_BDhw: Tensor, hidden_BPQ: Tensor) -> Tensor:
        """Logits of the hidden cells, image by image, in reading order."""
        return self.linear(gather_hidden(rearrange(map_BDhw, "B D h w -> B (h w) D"), hidden_BPQ, self.count))


def gather_hidden(values_BND: Tensor, hidden_BPQ: Tensor, count: int) -> Tensor:
    """(B, P*Q, D) and exactly `count` hidden cells per image -> (B*count, D), without a host sync."""
    index_BK = hidden_BPQ.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return rearrange(values_BND.gather(1, index_BK[..., None].expand(-1, -1, values_BND.shape[-1])), "B K D -> (B K) D")


class MaskedImageModeling(Objective):
    """ids = tokenizer(target); features = backbone(image, hidden); logits = head(features, hidden); loss = CE(logits, ids[hidden]).

    The tokenizer is frozen, and in neither state_dict nor optimizer.

    Raises:
        SettingError: the backbone's grid is not the tokenizer's.
    """

    def __init__(self, backbone: Backbone, tokenizer: Any, head: TokenHead, normalize: Normalize,
                 token_grid: tuple[int, int], device: torch.device) -> None:  # fmt: skip
        super().__init__()
        if backbone.feature_grid != token_grid:
            ours, theirs = ("x".join(map(str, grid)) for grid in (backbone.feature_grid, token_grid))
            raise SettingError(
                f"the token grid is {theirs}, the patch grid {ours}; set views.target_size to {backbone.feature_grid[0]} x the "
                f"tokenizer's stride {tokenizer.stride} = {backbone.feature_grid[0] * tokenizer.stride}"
            )
        self.backbone, self.head, self.normalize = backbone, head, normalize
        self._tokenizer = frozen(tokenizer, device)
        self.num_depths = backbone.num_depths

    @property
    def tokenizer(self) -> Any:
        """The frozen image tokenizer."""
        return self._tokenizer[0]

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image`, `target` uint8 (B, C, H, W), `hidden` bool (B, P, Q), `valid` bool (B,)."""
        ids_BPQ = self.tokenizer.encode(batch["target"].float() / 255)
        features = self.backbone.forward_features(self.normalize(batch["image"]), batch["hidden"])
        logits_MV = self.head(features.map_BDhw, batch["hidden"])
        ids_M = gather_hidden(ids_BPQ.flatten(1)[..., None], batch["hidden"], self.head.count)[:, 0]
        valid_M = batch["valid"].repeat_interleave(self.head.count).float()
        valid_M = valid_M / valid_M.sum().clamp(min=1)
        loss = (F.cross_entropy(logits_MV.float(), ids_M, reduction="none") * valid_M).sum()
        guess_M = logits_MV.detach().argmax(1)
        accuracy = ((guess_M == ids_M) * valid_M).sum()
        codes = torch.zeros(logits_MV.shape[1], device=logits_MV.device).index_add_(0, guess_M, torch.ones_like(valid_M))
        return StepOutput(loss, {"masked_accuracy": accuracy}, {"predicted_codes": codes})

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Rows: image, what the encoder sees, its true tokens decoded, predicted tokens at hidden cells decoded."""
        image, target = batch["image"][:SHOWN], batch["target"][:SHOWN].float() / 255
        hidden = batch["hidden"][:SHOWN]
        side = image.shape[-1] // hidden.shape[-1]
        covered = hidden.repeat_interleave(side, -1).repeat_interleave(side, -2)[:, None]
        rows = [image.float() / 255, torch.where(covered, 0.5, image.float() / 255)]
        if hasattr(self.tokenizer, "decode"):
            was_training = self.backbone.training
            self.backbone.eval()
            ids_BPQ = self.tokenizer.encode(target)
            features = self.backbone.forward_features(self.normalize(image), hidden)
            guess_M = self.head(features.map_BDhw, hidden).argmax(1)
            self.backbone.train(was_training)
            predicted_BPQ = ids_BPQ.masked_scatter(hidden, guess_M)
            rows += [self.tokenizer.decode(ids_BPQ), self.tokenizer.decode(predicted_BPQ)]
        return contact_sheet(rows)

    def depth_of(self, parameter_name: str) -> int:
        """The backbone's own depths; the token head is last."""
        owner, _, name = parameter_name.partition(".")
        return self.backbone.depth_of(name) if owner == "backbone" else self.num_depths - 1

    def no_weight_decay_names(self) -> set[str]:
        """The backbone's tokens, positions and bias tables."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay_names()}
