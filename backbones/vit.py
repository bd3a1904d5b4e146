"""Vision transformers with one resolution: ViT (arXiv:2010.11929), DeiT (arXiv:2012.12877), BEiT (arXiv:2106.08254).

Legend: B batch, C channels, H W pixels, P Q token grid, N tokens ([CLS] and [DIST] first), D width, n heads, d width of a head.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import TABLE, Backbone, Features, Grid, hide, repeat_mask, sides, zero_hidden
from mimetic.backbones.interpolation import resize_positions, resize_table
from mimetic.backbones.layers import KeylessBiasLinear, Linear, add_branch, drop_path_rates, linear, mlp
from mimetic.backbones.windows import attend, fused_attend
from mimetic.backbones.windows import relative_position_index as patch_index
from mimetic.engine.errors import CheckpointError, SettingError

INIT_STD = 0.02
SHORT = 256  # tokens


class ViT(Backbone):
    """A plain vision transformer; arguments beyond the first three bear timm's names.

    Args:
        image_size: side or (H, W) in pixels, a multiple of the patch.
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        patch_size: side or (height, width) of a patch in pixels.
        embed_dim: D; depth: blocks; num_heads: n, a divisor of D; mlp_ratio: hidden width of the MLP over D.
        qkv_bias: biases of queries, keys and values.
        key_bias: False as in BEiT: queries and values have a bias, keys none (softmax would not feel it).
        init_values: layer scale's initial value; None for no layer scale.
        class_token: put [CLS] before the patches. dist_token: put DeiT's distillation token after it, with a second head.
        use_abs_pos_emb: learned position per token. no_embed_class: positions for patches only (DeiT III, arXiv:2204.07118).
        use_rel_pos_bias: relative position bias, a table in each block.
        use_shared_rel_pos_bias: one table for all blocks in place of theirs, as BEiT pretrains; becomes a table per block in
            `timm_state_dict`, as BEiT fine-tunes.
        global_pool: what the classifier sees: "token", [CLS] after the norm, or "avg", the norm of the patches' mean.
        drop_path_rate: stochastic depth (arXiv:1603.09382) of the last block, rising linearly from 0.
        head_init_scale: factor on the classifier's initial weights.
        weight_init: "beit" as BEiT pretrains, tuned at width 768; "mae" as MAE (arXiv:2111.06377) does, Glorot's rule and
            sine-cosine positions (here they go on learning), which at widths near 100 learns several times as fast.

    Raises:
        SettingError: arguments that contradict each other, both named.
    """

    def __init__(
        self, image_size: int | Sequence[int] = 224, in_channels: int = 3, num_classes: int = 0, *,
        patch_size: int | Sequence[int] = 16, embed_dim: int = 768, depth: int = 12, num_heads: int = 12,
        mlp_ratio: float = 4.0, qkv_bias: bool = True, key_bias: bool = True, init_values: float | None = None,
        class_token: bool = True, dist_token: bool = False, use_abs_pos_emb: bool = True, no_embed_class: bool = False,
        use_rel_pos_bias: bool = False, use_shared_rel_pos_bias: bool = False, global_pool: str = "token",
        drop_path_rate: float = 0.0, head_init_scale: float = 1.0, weight_init: str = "beit",
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size = sides(image_size), sides(patch_size, "patch_size")
        self.in_channels, self.num_classes, self.embed_dim, self.num_depths = in_channels, num_classes, embed_dim, depth + 2
        self.mask_grid = self.feature_grid = self.stem_grid = _grid(self.image_size, self.patch_size)
        self.has_cls, self.has_dist, self.global_pool = class_token, dist_token, global_pool
        self._is_beit = not key_bias  # timm writes BEiT in a file of its own, with its own names
        self.relative = relative = use_rel_pos_bias or use_shared_rel_pos_bias
        if depth < 1 or mlp_ratio <= 0 or not 0 <= drop_path_rate < 1:
            raise SettingError(f"depth {depth}, mlp_ratio {mlp_ratio:g}, drop_path_rate {drop_path_rate:g}: depth must be 1 or more, "
                               "mlp_ratio above 0, drop_path_rate in [0, 1)")  # fmt: skip
        _refuse_contradictions(embed_dim, num_heads, global_pool, class_token, dist_token, relative)
        if weight_init not in ("beit", "mae"):
            raise SettingError(f'weight_init must be "beit" or "mae", not "{weight_init}"')

        self.patch_embed = PatchEmbedding(
            self.mask_grid, self.patch_size, in_channels, embed_dim, class_token, dist_token, use_abs_pos_emb, no_embed_class
        )
        self.rel_pos_bias = RelativePositionBias(self.mask_grid, num_heads) if use_shared_rel_pos_bias else None
        window = self.mask_grid if relative and not use_shared_rel_pos_bias else None
        mlp_width, rates = int(embed_dim * mlp_ratio), drop_path_rates(drop_path_rate, [depth])[0]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_width, qkv_bias, key_bias, init_values, window, rate) for rate in rates
        )
        # One norm, whose place depends on the pooling: `norm` before it or `fc_norm` after it, in timm's words.
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.head_dist = (nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()) if dist_token else None
        self._init_weights(head_init_scale)
        if weight_init == "mae":
            self._init_as_mae()

    @property
    def mask_token(self) -> nn.Parameter:
        """The stand-in for hidden cells, (1, 1, D)."""
        return self.patch_embed.mask_token

    def forward_features(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, layers: Sequence[int] = ()) -> Features:
        """Encode images; see `Backbone.forward_features`. The map is (B, D, P, Q)."""
        x_BND, maps = self.forward_tokens(image_BCHW, hidden_BPQ, layers)
        x_BND = self.norm(x_BND)
        return Features(
            self._map(x_BND), x_BND[:, 0] if self.has_cls else None, x_BND[:, 1] if self.has_dist else None, tuple(maps)
        )

    def forward_visible(self, image_BCHW: Tensor, visible_BN: Tensor) -> Tensor:
        """Encode some patches of each image as if there were no others, which costs nothing then (MAE, arXiv:2111.06377).

        Args:
            image_BCHW: normalised pixels; those of other patches reach nothing.
            visible_BN: int64, places of patches in reading order from 0; as many in every image, in any order.

        Returns:
            Tokens after the final norm, (B, prefix + N, D): [CLS] and [DIST] where the net has them, then the patches as asked.

        Raises:
            SettingError: an image that does not fit, or relative position bias, whose tables are of whole grids.
        """
        self.check_image(image_BCHW)
        if self.relative:
            raise SettingError("relative position bias knows whole grids only, and here visible patches are encoded alone; set, among "
                               "backbone.overrides, use_rel_pos_bias, use_shared_rel_pos_bias to false and use_abs_pos_emb to true")
        x_BND = self.patch_embed(image_BCHW, None, visible_BN)
        for block in self.blocks:
            x_BND = self.run_block(block, x_BND, None)
        return self.norm(x_BND)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes. A distilled net answers with the mean of its two heads."""
        return torch.stack(self.forward_heads(image_BCHW)).mean(0)

    def forward_heads(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits of the class head, then of the distillation head where there is one: DeiT trains them on two targets."""
        x_BND, _ = self.forward_tokens(image_BCHW)
        if self.global_pool == "avg":
            return (self.head(self.norm(x_BND[:, self.patch_embed.num_prefix :].mean(1))),)
        x_BND = self.norm(x_BND[:, : self.patch_embed.num_prefix])
        if self.head_dist is None:
            return (self.head(x_BND[:, 0]),)
        return self.head(x_BND[:, 0]), self.head_dist(x_BND[:, 1])

    def forward_tokens(
        self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, layers: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """All tokens x_BND after the last block, before the final norm, and the raw maps (B, D, P, Q) of `layers`."""
        self.check_image(image_BCHW)
        self.check_layers(layers)
        bias_1nNN = self.rel_pos_bias() if self.rel_pos_bias is not None else None
        x_BND = self.patch_embed(image_BCHW, hidden_BPQ)
        seen: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x_BND = self.run_block(block, x_BND, bias_1nNN)
            if i in layers:
                seen[i] = self._map(x_BND)
        return x_BND, [seen[layer] for layer in layers]

    def _map(self, x_BND: Tensor) -> Tensor:
        return rearrange(x_BND[:, self.patch_embed.num_prefix :], "B (P Q) D -> B D P Q", P=self.mask_grid[0])

    def depth_of(self, parameter_name: str) -> int:
        """Depth for layer decay; see `Backbone.depth_of`. A shared bias table counts as a position: 0."""
        first, *rest = parameter_name.split(".")
        if first in ("patch_embed", "rel_pos_bias"):
            return 0
        return int(rest[0]) + 1 if first == "blocks" else self.num_depths - 1

    def no_weight_decay_names(self) -> set[str]:
        """Names of tokens, positions and bias tables."""
        ends = ("cls_token", "dist_token", "mask_token", "pos_embed", TABLE)
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def timm_name(self, name: str) -> str:
        """Name in timm's model, which keeps tokens at the top and spells layer scale and pooled norm in two ways."""
        name = re.sub(r"^patch_embed\.(cls_token|dist_token|pos_embed)$", r"\1", name)
        name = re.sub(r"\.attn\.(?:qkv\.(?=[qv]_bias)|rel_pos_bias\.)", ".attn.", name)
        if not self._is_beit:
            name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        return re.sub("^norm", "fc_norm", name) if self.global_pool == "avg" else name

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords for `timm.create_model`; a shared bias table is handed over as one per block."""
        arguments = super().timm_arguments()
        if arguments.pop("use_shared_rel_pos_bias", False):
            arguments["use_rel_pos_bias"] = True
        if arguments.get("init_values", 0.0) is None:
            arguments["init_values"] = 0.0  # timm ignores keywords that are None, and would keep the name's own value
        return arguments

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Weights under timm's names; a shared bias table is copied into each block (BEiT's fine-tuning does the same)."""
        state = super().timm_state_dict()
        if self.rel_pos_bias is not None:
            table = state.pop(f"rel_pos_bias.{TABLE}")
            state |= {f"blocks.{i}.attn.{TABLE}": table.clone() for i in range(len(self.blocks))}
        return state

    def load_timm_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over timm's weights; a shared bias table takes tables that are the same in every block, and no others."""
        if self.rel_pos_bias is not None:
            state, tables = dict(state), [f"blocks.{i}.attn.{TABLE}" for i in range(len(self.blocks))]
            found = [state.pop(key) for key in tables if key in state]
            if found and not all(torch.equal(found[0], table) for table in found):
                raise CheckpointError("bias tables differ between blocks: load them with use_shared_rel_pos_bias=False")
            state |= {f"rel_pos_bias.{TABLE}": found[0]} if len(found) == len(tables) else {}
        super().load_timm_state_dict(state)

    @torch.no_grad()
    def _init_weights(self, head_init_scale: float) -> None:
        """Init as in BEiT's pretraining: normal, cut at one standard deviation; residual branches shrink with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and TABLE not in name:
                nn.init.trunc_normal_(parameter, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                parameter.div_((2 * self.depth_of(name)) ** 0.5)
            elif name == "head.weight":
                parameter.mul_(head_init_scale)

    @torch.no_grad()
    def _init_as_mae(self) -> None:
        """Glorot's uniform rule for the stem and all matrices of the blocks, sine-cosine positions; heads and tokens as before."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and TABLE not in name and name.startswith(("blocks.", "patch_embed.proj.")):
                nn.init.xavier_uniform_(parameter.view(len(parameter), -1))
        if self.patch_embed.pos_embed is not None:
            cells = self.mask_grid[0] * self.mask_grid[1]
            self.patch_embed.pos_embed[0, -cells:] = sincos_positions(self.mask_grid, self.embed_dim)


class PatchEmbedding(nn.Module):
    """Pixels to tokens: project patches, put the mask token at hidden cells, prepend [CLS] and [DIST], add positions."""

    def __init__(self, grid: Grid, patch: Grid, channels: int, width: int, cls: bool, dist: bool, positions: bool,
                 patches_only: bool) -> None:
        super().__init__()
        self.grid, self.num_prefix = grid, cls + dist
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if cls else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if dist else None
        self.patches_only = patches_only
        count = grid[0] * grid[1] + (0 if patches_only else self.num_prefix)
        self.pos_embed = nn.Parameter(torch.empty(1, count, width)) if positions else None

    def forward(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, visible_BN: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and bool (B, P, Q), True = hidden -> (B, N, D); of the patches at `visible_BN` alone where that is given."""
        if hidden_BPQ is not None:
            hidden_BPQ = repeat_mask(hidden_BPQ, self.grid)
            image_BCHW = zero_hidden(image_BCHW, hidden_BPQ)
        # A product of patches and weights: the same as the convolution, and on a CPU its gradient takes a fraction of the time.
        patch_BNK = rearrange(image_BCHW, "B C (P a) (Q b) -> B (P Q) (C a b)", P=self.grid[0], Q=self.grid[1])
        if visible_BN is not None:
            patch_BNK = patch_BNK.gather(1, visible_BN[..., None].expand(-1, -1, patch_BNK.shape[-1]))
        x_BND = linear(patch_BNK, self.proj.weight.flatten(1), self.proj.bias)
        if hidden_BPQ is not None:
            x_BND = hide(x_BND, rearrange(hidden_BPQ, "B P Q -> B (P Q) 1"), self.mask_token)
        positions_BND = self.pos_embed if self.pos_embed is None or visible_BN is None else self._positions(visible_BN)
        if positions_BND is not None and self.patches_only:
            x_BND = x_BND + positions_BND
        prefix = [token.expand(len(x_BND), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x_BND = torch.cat([*prefix, x_BND], dim=1)
        return x_BND if positions_BND is None or self.patches_only else x_BND + positions_BND

    def _positions(self, visible_BN: Tensor) -> Tensor:
        """Of [CLS] and [DIST] if they have any, and of the visible patches, (B, N, D)."""
        first = 0 if self.patches_only else self.num_prefix
        prefix_BN = torch.arange(first, device=visible_BN.device).expand(len(visible_BN), -1)
        # not table[index]: see `RelativePositionBias.forward`
        return F.embedding(torch.cat([prefix_BN, visible_BN + first], 1), self.pos_embed[0])  # type: ignore[index]

    def resized_from(self, other: "PatchEmbedding") -> dict[str, Tensor]:
        """The other's positions on this grid.

        DeiT's distillation token comes second and has a position of its own; where the other has none, it stays as it is here.
        """
        if self.pos_embed is None or other.pos_embed is None or self.patches_only != other.patches_only:
            return {}
        prefix = 0 if other.patches_only else other.num_prefix
        positions_1ND = resize_positions(other.pos_embed, other.grid, self.grid, prefix)
        if prefix == 1 and self.dist_token is not None:
            positions_1ND = torch.cat([positions_1ND[:, :1], self.pos_embed[:, 1:2], positions_1ND[:, 1:]], 1)
        return {"pos_embed": positions_1ND}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); each branch with layer scale and stochastic depth."""

    def __init__(self, width: int, heads: int, mlp_width: int, qkv_bias: bool, key_bias: bool, init_values: float | None,
                 window: Grid | None, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qkv_bias, key_bias, window)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, mlp_width)
        self.gamma_1 = nn.Parameter(torch.full((width,), init_values)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((width,), init_values)) if init_values else None
        self.drop_path = drop_path

    def forward(self, x_BND: Tensor, bias_1nNN: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), with a bias on the attention scores that all blocks share, if any."""
        x_BND = add_branch(x_BND, self.attn(self.norm1(x_BND), bias_1nNN), self.gamma_1, self.drop_path, self.training)
        return add_branch(x_BND, self.mlp(self.norm2(x_BND)), self.gamma_2, self.drop_path, self.training)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d) + bias) v."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, key_bias: bool, window: Grid | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias) if key_bias or not qkv_bias else KeylessBiasLinear(width)
        self.rel_pos_bias = RelativePositionBias(window, heads) if window else None
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor, bias_1nNN: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `bias_1nNN` is the shared table's, used where the block has no table of its own."""
        if self.rel_pos_bias is not None:
            bias_1nNN = self.rel_pos_bias()
        qkv_3BnNd = self._split(x_BND)
        # Fused attention gives no gradient to a bias, and on a CPU it takes three times as long in bf16; for long sequences it still
        # saves the memory of all scores.
        learned = bias_1nNN is not None and bias_1nNN.requires_grad
        if learned or (qkv_3BnNd.requires_grad and qkv_3BnNd.dtype == torch.bfloat16 and qkv_3BnNd.shape[-2] <= SHORT):
            x_BnNd = attend(qkv_3BnNd.contiguous(), bias_1nNN)
        else:
            x_BnNd = fused_attend(qkv_3BnNd, bias_1nNN, None)
        return self.proj(rearrange(x_BnNd, "B n N d -> B N (n d)"))

    def weights(self, x_BND: Tensor, bias_1nNN: Tensor | None = None) -> Tensor:
        """What the fused attention of `forward` never shows: the share that each query (row) takes of each key, (B, n, N, N)."""
        if self.rel_pos_bias is not None:
            bias_1nNN = self.rel_pos_bias()
        q_BnNd, k_BnNd, _ = self._split(x_BND)
        score_BnNN = q_BnNd @ k_BnNd.mT * q_BnNd.shape[-1] ** -0.5
        return (score_BnNN if bias_1nNN is None else score_BnNN + bias_1nNN).softmax(-1)

    def _split(self, x_BND: Tensor) -> Tensor:
        return rearrange(self.qkv(x_BND), "B N (qkv n d) -> qkv B n N d", qkv=3, n=self.heads)


class RelativePositionBias(nn.Module):
    """A learned score for each offset between two patches and each head, with three more for pairs that involve [CLS]."""

    index_NN: Tensor

    def __init__(self, grid: Grid, heads: int) -> None:
        super().__init__()
        self.window = grid
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, heads))
        self.register_buffer("index_NN", relative_position_index(grid), persistent=False)

    def forward(self) -> Tensor:
        """Bias on the attention scores, (1, n, N, N)."""
        # F.embedding and not table[index]: the backward of advanced indexing differs between runs on several CPU threads.
        bias_NNn = F.embedding(self.index_NN, self.relative_position_bias_table)
        return rearrange(bias_NNn, "N M n -> 1 n N M").contiguous()

    def resized_from(self, other: "RelativePositionBias") -> dict[str, Tensor]:
        """The other's table for this grid; the scores that involve [CLS] stay."""
        return {TABLE: resize_table(other.relative_position_bias_table, other.window, self.window)}


def relative_position_index(grid: Grid) -> Tensor:
    """Row of the bias table for each pair (query, key), int32 (N, N) with N = 1 + P * Q; [CLS] comes first."""
    p, q = grid
    offsets = (2 * p - 1) * (2 * q - 1)
    index_NN = torch.full((1 + p * q, 1 + p * q), offsets + 1, dtype=torch.int32)  # patch to [CLS]
    index_NN[0] = offsets  # [CLS] to patch
    index_NN[0, 0] = offsets + 2
    index_NN[1:, 1:] = patch_index(grid)
    return index_NN


def sincos_positions(grid: Grid, width: int) -> Tensor:
    """Sines and cosines of row and column, (P*Q, D), as in MAE (arXiv:2111.06377).

    Wavelengths are spread geometrically from 5 cells to 7 times the longer side, so that small grids get codes as distinct as
    large ones; a fixed base of 10,000 leaves most of them constant on a 7x7 grid.

    Raises:
        SettingError: D is no multiple of 4.
    """
    if width % 4:
        raise SettingError(f"embed_dim {width} is no multiple of 4, which sine-cosine positions need")
    wavelengths_d = 5 * (7 * max(grid) / 5) ** (torch.arange(width // 4) / (width // 4))
    at_N2 = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    angle_N2d = at_N2[..., None] * 2 * torch.pi / wavelengths_d
    return rearrange(torch.stack([angle_N2d.sin(), angle_N2d.cos()], 2), "N a f d -> N (a f d)")


def _grid(image: Grid, patch: Grid) -> Grid:
    if image[0] % patch[0] or image[1] % patch[1]:
        near = "x".join(str(max(round(i / p), 1) * p) for i, p in zip(image, patch, strict=True))
        raise SettingError(f"image_size {image[0]}x{image[1]} is no multiple of patch_size {patch[0]}x{patch[1]}; {near} is")
    return image[0] // patch[0], image[1] // patch[1]


def _refuse_contradictions(width: int, heads: int, pool: str, cls: bool, dist: bool, relative: bool) -> None:
    if heads < 1 or width < 1 or width % heads:
        raise SettingError(f"embed_dim {width} is no multiple of num_heads {heads}")
    if pool not in ("token", "avg"):
        raise SettingError(f'global_pool must be "token" or "avg", not "{pool}"')
    if not cls and (pool == "token" or dist or relative):
        raise SettingError('class_token=False needs global_pool="avg", no distillation token and no relative position bias')
    if dist and pool != "token":
        raise SettingError('a distilled backbone answers from its two tokens: global_pool must be "token"')
