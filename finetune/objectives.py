"""Losses of classification: supervised, and DeiT's hard distillation.

Legend: B batch, C channels, H W pixels, N classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from mimetic.backbones.contract import Backbone
from mimetic.data.randomness import mix
from mimetic.data.views import Normalize
from mimetic.engine.errors import SettingError
from mimetic.engine.objective import Objective, StepOutput, frozen


class Mixing:
    """Mixup (1710.09412) and CutMix (1905.04899) by torchvision, drawn from (seed, step), the same on every rank.

    Draws belong to the batch, not to the sample: unlike everything else they change with the number of processes.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float, seed: int) -> None:
        self.kinds = [kind(num_classes=num_classes, alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
        self.num_classes, self.seed = num_classes, seed

    def __call__(self, image_BCHW: Tensor, label_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images and targets (B, N) of probabilities."""
        if not self.kinds:
            return image_BCHW, F.one_hot(label_B, self.num_classes).float()
        with torch.random.fork_rng(devices=[]):  # the draws are all on the CPU
            torch.default_generator.manual_seed(int(mix(self.seed, step)) % (1 << 32))  # torch's generator on CPUs keeps 32 bits
            return v2.RandomChoice(self.kinds)(image_BCHW, label_B)


class Supervised(Objective):
    """Cross entropy with label smoothing on (mixed) labels.

    Args:
        model: image -> logits, with `depth_of`, `num_depths` and `no_weight_decay_names`.
        normalize: pixels to the model's range.
        mixing: of images and labels.
        smoothing: label smoothing.
    """

    def __init__(self, model: Any, normalize: Normalize, mixing: Mixing, smoothing: float) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize
        self.mixing, self.smoothing = mixing, smoothing
        self.num_depths = model.num_depths
        self._step = 0

    def begin_step(self, step: int, steps: int) -> None:
        """Mixing is drawn per step."""
        self._step = step

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image` (B, C, H, W), uint8 or in [0, 1], `label` int64 (B,), `valid` bool (B,)."""
        image_BCHW, target_BN = self.mixing(self.normalize(batch["image"]), batch["label"], self._step)
        weight_B = batch["valid"] / batch["valid"].sum().clamp(min=1)
        loss, logits_BN = self.loss(image_BCHW, target_BN, weight_B)
        accuracy = ((logits_BN.argmax(1) == target_BN.argmax(1)) * weight_B).sum()
        return StepOutput(loss, {"train_accuracy": accuracy})

    def loss(self, image_BCHW: Tensor, target_BN: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and logits (B, N) to measure training accuracy with."""
        logits_BN = self.model(image_BCHW)
        return self.cross_entropy(logits_BN, target_BN, weight_B), logits_BN.detach()

    def cross_entropy(self, logits_BN: Tensor, target_BN: Tensor, weight_B: Tensor) -> Tensor:
        """Smoothed, weighted by `weight_B`, which sums to 1."""
        losses_B = F.cross_entropy(logits_BN.float(), target_BN, label_smoothing=self.smoothing, reduction="none")
        return (losses_B * weight_B).sum()

    def describe(self) -> dict[str, Any]:
        """The model if it is a backbone, and what its input is normalized with."""
        if not isinstance(self.model, Backbone):
            return {}
        return {"prefix": "model.", "create_backbone": self.model.config, **self.normalize.describe()}

    def depth_of(self, parameter_name: str) -> int:
        """The model's own depths."""
        return self.model.depth_of(parameter_name.removeprefix("model."))

    def no_weight_decay_names(self) -> set[str]:
        """The model's tokens, positions and bias tables."""
        return {f"model.{name}" for name in self.model.no_weight_decay_names()}


class Distill(Supervised):
    """DeiT's hard distillation (2012.12877, equation 3): half the loss from the label, half from the teacher's decision.

    The class token's head learns the label, the distillation token's head what the teacher says of the same augmented image.
    """

    def __init__(self, model: Any, normalize: Normalize, mixing: Mixing, smoothing: float, teacher: Any,
                 teacher_normalize: Normalize, device: torch.device) -> None:  # fmt: skip
        if not getattr(model, "has_dist", False):
            raise SettingError("distill.teacher needs a backbone with a distillation token, such as deit_tiny_distilled_patch16_224")
        theirs, ours = (
            f"{net.config['num_classes']} classes, {net.config['in_channels']} channels, {'x'.join(map(str, net.image_size))} pixels"
            for net in (teacher, model)
        )
        if theirs != ours:
            raise SettingError(f"distill.teacher was trained for {theirs}, the student is for {ours}; train a teacher on the same data")
        super().__init__(model, normalize, mixing, smoothing)
        self._teacher = frozen(nn.Sequential(_Between(normalize, teacher_normalize), teacher), device)

    def loss(self, image_BCHW: Tensor, target_BN: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of both heads' losses; the logits are the heads' mean, as at inference."""
        with torch.no_grad():
            decision_B = self._teacher[0](image_BCHW).argmax(1)
        class_BN, dist_BN = self.model.forward_heads(image_BCHW)
        of_teacher = (F.cross_entropy(dist_BN.float(), decision_B, reduction="none") * weight_B).sum()
        loss = 0.5 * self.cross_entropy(class_BN, target_BN, weight_B) + 0.5 * of_teacher
        return loss, (0.5 * (class_BN + dist_BN)).detach()


class _Between(nn.Module):
    """From the student's normalization to the teacher's."""

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, ours: Normalize, theirs: Normalize) -> None:
        super().__init__()
        self.register_buffer("scale_C11", ours.std_C11 / theirs.std_C11)
        self.register_buffer("shift_C11", (ours.mean_C11 - theirs.mean_C11) / theirs.std_C11)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW * self.scale_C11 + self.shift_C11
