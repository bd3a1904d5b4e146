"""Contact sheets: what people would rather look at than read.

Legend: B images, C channels (1 or 3; of more, the first three are shown), H W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GAP = 2
TALLEST = 112  # small images are enlarged by a whole factor to about this many pixels


def contact_sheet(rows_BCHW: Sequence[Tensor]) -> np.ndarray:
    """uint8 (H, W, 3): one row per batch, images in [0, 1] side by side; column i is image i in every row."""
    height, width = rows_BCHW[0].shape[-2:]
    factor = max(1, TALLEST // max(height, width))
    bands = []
    for images_BCHW in rows_BCHW:
        shown = images_BCHW[:, :3] if images_BCHW.shape[1] >= 3 else images_BCHW[:, :1].expand(-1, 3, -1, -1)
        shown = shown.detach().float().cpu().clamp(0, 1)
        if shown.shape[-2:] != (height, width):
            shown = torch.nn.functional.interpolate(shown, (height, width), mode="nearest")
        shown = shown.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        padded = torch.nn.functional.pad(shown, [GAP] * 4, value=1.0)
        bands.append(torch.cat(list(padded), dim=-1))
    sheet_CHW = torch.cat(bands, dim=-2)
    return (sheet_CHW * 255).round().byte().permute(1, 2, 0).numpy()
