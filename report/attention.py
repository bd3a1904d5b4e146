"""`mimetic attention`: one picture of where a backbone looks.

Legend: B batch, C channels, H W pixels, P Q patch grid, h w feature grid.
"""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mimetic.backbones.attention import attention_distance, attention_maps, position_similarity, reach, rollout, seen_from
from mimetic.backbones.contract import Backbone
from mimetic.backbones.files import backbone_folder, load_backbone
from mimetic.backbones.vit import ViT
from mimetic.data.decode import decode
from mimetic.data.picture import cut, in_unit_range
from mimetic.data.pixelrange import Range, pixel_range
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

INK, HEAT, COLUMNS = "#333333", "magma", 6
Cell = tuple[int, int]


def draw_attention(run: str | Path, picture: Path, out: Path, *, fuse: str = "mean", discard: float = 0.9,
                   cell: Cell | None = None, range: Sequence[float] | None = None) -> None:  # fmt: skip
    """Writes a PNG: for a ViT attention rollout, per layer and per head; for windowed nets what a place can know.

    Args:
        run: a finished run or an exported folder.
        picture: an image file, or an `.npy` of the backbone's channels.
        out: the PNG.
        fuse: how heads are fused.
        discard: share of the lowest attention left out in the second rollout.
        cell: the place whose view is shown; None for [CLS], for the mean of all patches, or for the middle of the map.
        range: the pixel values that become 0 and 1, those of the data that the backbone was trained on; None for 8 bits.

    Raises:
        CheckpointError: no backbone there.
        DataError: no readable image.
        SettingError: a cell or share that cannot be, or a net whose blocks all mix everything.
    """
    if out.suffix.lower() != ".png":
        raise SettingError(f"--out {out} must end in .png")
    backbone = load_backbone(run).eval()
    shown_HWC, image_BCHW = _read(picture, backbone, backbone_folder(run), pixel_range(range))
    print(f"drawing where {backbone.config['name']} of {run} looks in {picture}", flush=True)
    from matplotlib.figure import Figure

    figure = Figure(dpi=110, layout="constrained", facecolor="white")
    if isinstance(backbone, ViT):
        _draw_vit(figure, backbone, image_BCHW, shown_HWC, fuse, discard, cell)
    else:
        _draw_reach(figure, backbone, image_BCHW, shown_HWC, cell)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, buffer.getvalue())
    print(f"picture in {out}")


def _read(picture: Path, backbone: Backbone, folder: Path, limits: Range | None) -> tuple[NDArray[np.uint8], Tensor]:
    """The centre of the image at the backbone's size, to show (of more than three channels the first three) and normalized."""
    is_deep = limits is not None or picture.suffix.lower() == ".npy"
    image_CHW = _deep(picture, backbone, limits) if is_deep else _picture(picture, backbone)
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    mean_C11, std_C11 = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    shown_CHW = image_CHW[:3] if len(image_CHW) >= 3 else image_CHW[:1].expand(3, -1, -1)
    return (shown_CHW * 255).round().byte().permute(1, 2, 0).numpy(), ((image_CHW - mean_C11) / std_C11)[None]


def _picture(picture: Path, backbone: Backbone) -> Tensor:
    """(C, H, W) in [0, 1] of a picture in 8 bits, as data without a pixel range is read; resized as Pillow does."""
    height, width = backbone.image_size
    if backbone.in_channels not in (1, 3):
        raise SettingError(f"the backbone reads images of {backbone.in_channels} channels; a picture has 1 or 3, give a .npy")
    pixels_HWC = _decoded(picture, backbone, None).transpose(1, 2, 0)
    image = ImageOps.fit(Image.fromarray(pixels_HWC[..., 0] if backbone.in_channels == 1 else pixels_HWC), (width, height),
                         Image.Resampling.BICUBIC)  # fmt: skip
    return (torch.from_numpy(np.asarray(image).reshape(height, width, -1).copy()).float() / 255).permute(2, 0, 1)


def _decoded(picture: Path, backbone: Backbone, limits: Range | None) -> NDArray[Any]:
    try:
        return decode(picture.read_bytes(), backbone.in_channels, limits)
    except (OSError, ValueError) as error:
        raise DataError(f"{picture} is no readable image ({getattr(error, 'strerror', None) or error})") from None


def _deep(picture: Path, backbone: Backbone, limits: Range | None) -> Tensor:
    """(C, H, W) in [0, 1] of an array, or of a picture that is read deeper than 8 bits, as data with a pixel range is."""
    image_CHW = in_unit_range(torch.from_numpy(_decoded(picture, backbone, limits)))
    there, wanted = image_CHW.shape[1:], backbone.image_size
    scale = min(side / target for side, target in zip(there, wanted, strict=True))
    height, width = (max(1, round(scale * target)) for target in wanted)
    centre_CHW = cut(image_CHW, ((there[0] - height) // 2, (there[1] - width) // 2, height, width))
    return F.interpolate(centre_CHW[None], wanted, mode="bicubic", antialias=True)[0].clamp(0, 1)


def _draw_vit(figure: Any, backbone: ViT, image_BCHW: Tensor, shown_HWC: NDArray[np.uint8], fuse: str, discard: float,
              cell: Cell | None) -> None:  # fmt: skip
    maps = attention_maps(backbone, image_BCHW)
    plain, strict = rollout(maps, fuse), rollout(maps, "max", discard)
    heads = maps[-1].shape[1]
    layer_rows, head_rows = math.ceil(len(maps) / COLUMNS), math.ceil(heads / COLUMNS)
    figure.set_size_inches(12.5, 3.4 + 2.15 * (layer_rows + head_rows))
    top, layers, of_heads = figure.subfigures(3, 1, height_ratios=[3.4, 2.15 * layer_rows, 2.15 * head_rows])
    whose = f"patch {cell[0]}, {cell[1]}" if cell else "[CLS]" if backbone.has_cls else "the mean of all patches"

    axes = top.subplots(1, 5)
    top.suptitle(f"{backbone.config['name']}: what {whose} sees", color=INK, fontsize=12)
    _plain(axes[0], shown_HWC, "image")
    _overlay(axes[1], shown_HWC, seen_from(backbone, plain[-1], cell)[0], f"rollout, {fuse} of heads")
    _overlay(axes[2], shown_HWC, seen_from(backbone, strict[-1], cell)[0], f"rollout, max, lowest {100 * discard:g} % left out")
    _draw_distance(axes[3], attention_distance(backbone, maps))
    _draw_positions(axes[4], backbone)

    layers.suptitle("rollout after each layer", color=INK, fontsize=10)
    for i, axis in enumerate(_grid(layers, layer_rows)):
        _overlay(axis, shown_HWC, seen_from(backbone, plain[i], cell)[0], f"layer {i}") if i < len(maps) else axis.axis("off")
    of_heads.suptitle("attention of each head of the last layer", color=INK, fontsize=10)
    for i, axis in enumerate(_grid(of_heads, head_rows)):
        _overlay(axis, shown_HWC, seen_from(backbone, maps[-1][:, i], cell)[0], f"head {i}") if i < heads else axis.axis("off")


def _draw_reach(figure: Any, backbone: Backbone, image_BCHW: Tensor, shown_HWC: NDArray[np.uint8], cell: Cell | None) -> None:
    at = cell or (backbone.feature_grid[0] // 2, backbone.feature_grid[1] // 2)
    maps = reach(backbone, at)
    rows = math.ceil(len(maps) / COLUMNS)
    figure.set_size_inches(12.5, 3.4 + 2.15 * rows)
    top, blocks = figure.subfigures(2, 1, height_ratios=[3.4, 2.15 * rows])
    top.suptitle(f"{backbone.config['name']}: what place {at[0]}, {at[1]} of the {'x'.join(map(str, backbone.feature_grid))} map can know",
                 color=INK, fontsize=12)  # fmt: skip
    axes = top.subplots(1, 3)
    place = torch.zeros(backbone.feature_grid)
    place[at] = 1
    _plain(axes[0], shown_HWC, "image")
    _overlay(axes[1], shown_HWC, place, "the place")
    _overlay(axes[2], shown_HWC, _influence(backbone, image_BCHW, at), "how much it used each part in the end")
    blocks.suptitle("where its information can have come from after each block", color=INK, fontsize=10)
    for i, axis in enumerate(_grid(blocks, rows)):
        if i < len(maps):
            _overlay(axis, shown_HWC, maps[i].float(), f"block {i}: {100 * maps[i].float().mean():.3g} %")
        else:
            axis.axis("off")


def _influence(backbone: Backbone, image_BCHW: Tensor, cell: Cell) -> Tensor:
    """Size of the gradient of a place's features with respect to each pixel, over squares of eight pixels, (h, w)."""
    image_BCHW = image_BCHW.clone().requires_grad_()
    backbone.forward_features(image_BCHW).map_BDhw[0, :, cell[0], cell[1]].square().sum().backward()
    gradient_hw = image_BCHW.grad[0].abs().sum(0) if image_BCHW.grad is not None else torch.zeros(backbone.image_size)
    backbone.zero_grad()
    return torch.nn.functional.avg_pool2d(gradient_hw[None], 8, 8, ceil_mode=True)[0].sqrt()


def _draw_distance(axis: Any, distance_ln: Tensor) -> None:
    for head in range(distance_ln.shape[1]):
        axis.plot(distance_ln[:, head].numpy(), ".", color="#b5367a", markersize=5, alpha=0.6)
    axis.plot(distance_ln.mean(1).numpy(), color=INK, linewidth=1)
    axis.set_title("how far each head looks", color=INK, fontsize=9)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_ylabel("mean distance, pixels", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_positions(axis: Any, backbone: ViT) -> None:
    similar = position_similarity(backbone)
    if similar is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "no absolute positions:\na relative bias\nin every block", ha="center", va="center", color=INK, fontsize=9)
        return
    p, q = backbone.mask_grid
    step = max(1, -(-max(p, q) // 7))
    tiles = similar[::step, ::step]
    gap = torch.full((tiles.shape[0], tiles.shape[1], p + 1, q + 1), torch.nan)
    gap[..., :p, :q] = tiles
    axis.imshow(gap.permute(0, 2, 1, 3).reshape(tiles.shape[0] * (p + 1), -1).numpy(), cmap="viridis", vmin=-1, vmax=1)
    axis.set_title(f"likeness of positions, one in {step}" if step > 1 else "likeness of positions", color=INK, fontsize=9)
    axis.axis("off")


def _grid(figure: Any, rows: int) -> list[Any]:
    return list(np.atleast_1d(figure.subplots(rows, COLUMNS)).ravel())


def _plain(axis: Any, shown_HWC: NDArray[np.uint8], title: str) -> None:
    axis.imshow(shown_HWC)
    axis.set_title(title, color=INK, fontsize=9)
    axis.axis("off")


def _overlay(axis: Any, shown_HWC: NDArray[np.uint8], heat_hw: Tensor, title: str) -> None:
    """The picture in grey under the heat, each map on its own scale from 0 to its largest value."""
    height, width = shown_HWC.shape[:2]
    grey_HW = shown_HWC.mean(-1)
    heat = heat_hw.detach().double() / heat_hw.max().clamp(min=1e-12)
    axis.imshow(grey_HW, cmap="gray", extent=(0, width, height, 0))
    axis.imshow(heat.numpy(), cmap=HEAT, alpha=0.65, extent=(0, width, height, 0), vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, color=INK, fontsize=8)
    axis.axis("off")
