"""A discrete VAE as image tokenizer (Ramesh et al., arXiv 2102.12092, section 2.1), made so that it does not collapse.

Legend: B batch, C channels, H W pixels, P Q cells (P = H / stride), M = B*P*Q, D code width, V codebook size.

Three things differ from the naive recipe, which fell to 29 of 512 codes on Fashion-MNIST: codes are seeded by k-means of
features (`seed_codebook`), dead codes are restarted on badly served cells, and the decoder looks up the very points that the encoder's
logits measure distances to.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.engine.errors import SettingError
from mimetic.tokenizers.codebook import Codebook
from mimetic.tokenizers.contract import check_image_fits
from mimetic.tokenizers.usage import code_usage, count_codes


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), on the cell grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, P, Q) to the same shape."""
        return x + self.out(torch.relu(self.mix(torch.relu(x))))


def stage_widths(width: int, stride: int) -> list[int]:
    """Widths after each halving of the image, the last at the cell grid: halved for every doubling of the side, 16 at least."""
    stages = stride.bit_length() - 1
    return [max(width >> (stages - 1 - i), min(16, width)) for i in range(stages)]


def build_encoder(in_channels: int, stride: int, width: int, code_width: int, depth: int) -> nn.Sequential:
    """Images to features (B, D, P, Q): 4x4 convolutions of stride 2 down to the grid, then residual blocks."""
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in stage_widths(width, stride):
        layers += [nn.Conv2d(channels, stage, 4, 2, 1), nn.ReLU()]
        channels = stage
    layers = layers[:-1] + [Residual(width) for _ in range(depth)] + [nn.ReLU(), nn.Conv2d(width, code_width, 1)]
    return nn.Sequential(*layers)


def build_decoder(in_channels: int, stride: int, width: int, code_width: int, depth: int) -> nn.Sequential:
    """The encoder's mirror image."""
    layers: list[nn.Module] = [nn.Conv2d(code_width, width, 1)] + [Residual(width) for _ in range(depth)]
    channels = width
    for stage in [*stage_widths(width, stride)[-2::-1], in_channels]:
        layers += [nn.ReLU(), nn.ConvTranspose2d(channels, stage, 4, 2, 1)]
        channels = stage
    return nn.Sequential(*layers)


class DVAE(nn.Module):
    """The trainable tokenizer. Images are in [0, 1]; inside they have mean 0 and variance 1 for each channel of the training data.

    `vocab_size` V, `stride` in {4, 8, 16} (any power of two from 2), `in_channels` C; `width` of the convolutions at the grid, `code_width` D, `depth` residual blocks
    on each side. `config` rebuilds the module.
    """

    def __init__(
        self, vocab_size: int, stride: int, in_channels: int, width: int = 64, code_width: int = 32, depth: int = 1
    ) -> None:
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise SettingError(f"tokenizer stride {stride} is no power of two: choose 4, 8 or 16")
        if vocab_size < 2:
            raise SettingError(f"vocab_size {vocab_size} is below 2: a tokenizer chooses between codes")
        self.vocab_size, self.stride, self.in_channels = vocab_size, stride, in_channels
        self.config: dict[str, Any] = dict(
            vocab_size=vocab_size, stride=stride, in_channels=in_channels, width=width, code_width=code_width, depth=depth
        )
        self.encoder = build_encoder(in_channels, stride, width, code_width, depth)
        self.decoder = build_decoder(in_channels, stride, width, code_width, depth)
        self.codebook = Codebook(vocab_size, code_width)
        self.register_buffer("pixel_mean", torch.full((in_channels, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((in_channels, 1, 1), 0.25))
        self.to(memory_format=torch.channels_last)  # 1.2 to 2 times as fast on CPUs

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Return features_MD of images in [0, 1], cells in row-major order."""
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        x = ((image_BCHW - self.pixel_mean) / self.pixel_std).contiguous(memory_format=torch.channels_last)
        return rearrange(self.encoder(x), "B D P Q -> (B P Q) D")

    def draw(self, code_BDPQ: Tensor) -> Tensor:
        """Return image_BCHW that these code vectors stand for, in standardised pixels."""
        return self.decoder(code_BDPQ.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Return ids_BPQ, int64: the most likely code of each cell of images in [0, 1]. Always in full precision."""
        with torch.autocast(image_BCHW.device.type, enabled=False):
            ids_M = self.codebook.logits(self.features(image_BCHW.float())).argmax(1)
        height, width = image_BCHW.shape[2:]
        return rearrange(ids_M, "(B P Q) -> B P Q", P=height // self.stride, Q=width // self.stride)

    @torch.no_grad()
    def decode(self, ids_BPQ: Tensor) -> Tensor:
        """Return image_BCHW in [0, 1] drawn from ids in [0, V)."""
        code_BPQD = F.embedding(ids_BPQ, self.codebook.codes_VD)
        x = self.draw(rearrange(code_BPQD, "B P Q D -> B D P Q"))
        return (x * self.pixel_std + self.pixel_mean).clamp(0, 1)

    def loss(
        self, image_BCHW: Tensor, temperature: float, kl_weight: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics) of the relaxed evidence bound: reconstruction + kl_weight * KL(q || uniform) / log V.

        Reconstruction is the mean squared error in standardised pixels: 1 is what the mean image costs. The KL is over log V for the
        same reason: 1 is a posterior that is certain everywhere. Both weights so keep their meaning on other data.
        """
        logits_MV = self.codebook.logits(self.features(image_BCHW)).float()
        ids_M = logits_MV.argmax(1)
        if self.training:
            self.codebook.count(ids_M)
        soft_MV = gumbel_softmax(logits_MV, temperature, generator)
        height, width = image_BCHW.shape[2:]
        code_BDPQ = rearrange(
            soft_MV @ self.codebook.codes_VD, "(B P Q) D -> B D P Q", P=height // self.stride, Q=width // self.stride
        )
        target = (image_BCHW - self.pixel_mean) / self.pixel_std
        recon = F.mse_loss(self.draw(code_BDPQ), target)
        kl = kl_to_uniform(logits_MV)
        used, perplexity = code_usage(count_codes(ids_M.detach(), self.vocab_size))
        loss = recon + kl_weight * kl / math.log(self.vocab_size)
        return loss, {"recon": recon.detach(), "kl": kl.detach(), "batch_used": used, "batch_perplexity": perplexity}

    @torch.no_grad()
    def seed_codebook(self, image_BCHW: Tensor, seed: int = 0) -> None:
        """Fit pixel mean and std, then seed the codes with k-means of the features of these images. Once, before training."""
        image_BCHW = image_BCHW.float()
        self.pixel_mean.copy_(image_BCHW.mean((0, 2, 3))[:, None, None])
        self.pixel_std.copy_(image_BCHW.std((0, 2, 3)).clamp(min=1e-3)[:, None, None])
        z_ND = torch.cat([self.features(part) for part in image_BCHW.split(256)])
        self.codebook.seed(z_ND, seed)

    @torch.no_grad()
    def restart_dead_codes(self, image_BCHW: Tensor, seed: int) -> Tensor:
        """Restart codes that were hardly used since the last call, on cells of these images; see `Codebook.restart_dead`."""
        return self.codebook.restart_dead(self.features(image_BCHW), seed)


def gumbel_softmax(logits_MV: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return relaxed one-hot samples_MV of Categorical(logits) (Jang et al., arXiv 1611.01144; Maddison et al., 1611.00712)."""
    noise_MV = torch.empty_like(logits_MV).exponential_(generator=generator).log()
    return ((logits_MV - noise_MV) / temperature).softmax(1)


def kl_to_uniform(logits_MV: Tensor) -> Tensor:
    """Return the mean over cells of KL(Categorical(logits) || uniform over V), in nats: log V less the entropy."""
    log_q_MV = logits_MV.log_softmax(1)
    return math.log(logits_MV.shape[1]) + (log_q_MV.exp() * log_q_MV).sum(1).mean()
