"""A small residual CNN: the teacher that DeiT's students learn from, trained in the same harness."""

import torch.nn.functional as F
from torch import Tensor, nn

from mimetic.finetune.recipe import RESIDUAL_CNN as NAME

__all__ = ["NAME", "ResidualCNN"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 1512.03385), the first with stride."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, inside, h, w) -> (B, outside, h / stride, w / stride)."""
        y_BDhw = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BDhw)))))
        return F.relu(y_BDhw + self.shortcut(x_BDhw))


class ResidualCNN(nn.Module):
    """A stem, three stages of `blocks` residual blocks at widths w, 2w, 4w, mean pooling, a linear classifier."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int, *, width: int = 32, blocks: int = 1) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size, "width": width, "blocks": blocks}
        self.image_size, self.num_depths = (image_size, image_size), 1
        stages: list[nn.Module] = []
        inside = width
        for stage in range(3):
            for block in range(blocks):
                outside = width << stage
                stages.append(ResidualBlock(inside, outside, 2 if stage and not block else 1))
                inside = outside
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inside, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.stages(self.stem(image_BCHW)).mean((2, 3)))

    def depth_of(self, parameter_name: str) -> int:
        """One depth: a CNN has no layer decay here."""
        return 0

    def no_weight_decay_names(self) -> set[str]:
        """None: all its vectors are biases and norms."""
        return set()
