"""Parameters and multiply-adds of a backbone, counted from the code that runs."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mimetic.backbones.contract import MASK_TOKEN


class Count(NamedTuple):
    """Parameters without the mask token, and multiply-adds of one image's way to its logits."""

    parameters: int
    macs: int


def count(net: nn.Module, image_size: tuple[int, int], in_channels: int = 3) -> Count:
    """Counts a net that lies on the meta device: nothing is computed and no memory taken.

    Counted are the multiplications of matrix products and convolutions, as the papers do; norms, activations, biases, additions
    and pooling are not.
    """
    parameters = sum(p.numel() for name, p in net.named_parameters() if not name.endswith(MASK_TOKEN))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, in_channels, *image_size, device="meta"))
    return Count(parameters, counter.get_total_flops() // 2)
