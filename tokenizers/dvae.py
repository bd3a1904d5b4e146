"""A discrete VAE as image tokenizer (Ramesh et al., arXiv 2102.12092, section 2.1), made so that it does not collapse.

Legend: B batch, C channels, H W pixels, P Q cells (P = H / stride, Q = W / stride), M = B*P*Q, D code width, V codebook size,
E = C * stride**2 values in a cell.

A dVAE that starts from random weights soon finds a few codes good enough and never leaves them. This one starts as
k-means over the principal components of cells: encoder and decoder are each a fixed linear map of a cell, set from data by
`seed_codebook`, plus a convolutional branch that starts at zero and learns the rest. Codes that fall out of use are
restarted on cells that are served badly.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.engine.errors import SettingError
from mimetic.tokenizers.codebook import Codebook
from mimetic.tokenizers.contract import check_image_fits
from mimetic.tokenizers.usage import code_usage, count_codes

SEEDS_PER_CODE = 16


class DVAE(nn.Module):
    """The trainable tokenizer. It takes images in [0, 1] and standardises each channel by what `seed_codebook` measured.

    Args:
        vocab_size: V.
        stride: Pixels of a cell's side: a power of two, usually 4, 8 or 16.
        in_channels: C.
        width: Channels of the convolutions at the cell grid; halved for each doubling of the side before it.
        code_width: D.
        depth: Residual blocks on each side; each lets a cell see one cell further.

    Raises:
        SettingError: for a stride that is no power of two, or fewer than two codes.
    """

    pixel_mean_C11: Tensor
    pixel_std_C11: Tensor

    def __init__(
        self, vocab_size: int, stride: int, in_channels: int, width: int = 64, code_width: int = 32, depth: int = 1
    ) -> None:
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise SettingError(f"the tokenizer's stride {stride} is no power of two: choose 4, 8 or 16")
        if vocab_size < 2:
            raise SettingError(f"vocab_size {vocab_size} leaves nothing to choose: take 2 codes or more")
        self.vocab_size, self.stride, self.in_channels, self.code_width = vocab_size, stride, in_channels, code_width
        self.width, self.depth = width, depth
        # Statistics of the data, not trained: E inputs of small weights each would jump far in one step of Adam.
        self.patch_in = nn.Conv2d(in_channels, code_width, stride, stride).requires_grad_(False)
        self.patch_out = nn.ConvTranspose2d(code_width, in_channels, stride, stride).requires_grad_(False)
        self.encoder = build_encoder(in_channels, stride, width, code_width, depth)
        self.decoder = build_decoder(in_channels, stride, width, code_width, depth)
        self.codebook = Codebook(vocab_size, code_width)
        self.register_buffer("pixel_mean_C11", torch.full((in_channels, 1, 1), 0.5))
        self.register_buffer("pixel_std_C11", torch.full((in_channels, 1, 1), 0.25))
        self.to(memory_format=torch.channels_last)  # up to twice as fast on CPUs

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `DVAE(**config)` has this one's shapes."""
        names = ("vocab_size", "stride", "in_channels", "width", "code_width", "depth")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Return ids_BPQ, int64 in [0, V): the likeliest code of each cell of images in [0, 1]. The same under autocast.

        Raises:
            SettingError: the stride does not divide a side, the channels are not those of training, or pixels are not in [0, 1].
        """
        with torch.autocast(image_BCHW.device.type, enabled=False):
            z_BDPQ = self.features(image_BCHW)
            ids_M = self.codebook.logits(_rows(z_BDPQ)).argmax(1)
        return ids_M.view(len(z_BDPQ), *z_BDPQ.shape[2:])

    def encode_in(self, dtype: torch.dtype) -> None:
        """Compute the encoder's convolutions in this dtype, the linear map of cells and the logits still in fp32; see the contract."""
        self.encoder.to(dtype)

    @torch.no_grad()
    def decode(self, ids_BPQ: Tensor) -> Tensor:
        """Return image_BCHW in [0, 1] drawn from ids_BPQ in [0, V)."""
        code_BPQD = F.embedding(ids_BPQ, self.codebook.codes)
        x_BCHW = self.draw(rearrange(code_BPQD, "B P Q D -> B D P Q"))
        return (x_BCHW * self.pixel_std_C11 + self.pixel_mean_C11).clamp(0, 1)

    def loss(
        self, image_BCHW: Tensor, temperature: float, kl_weight: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics): the relaxed evidence bound, reconstruction + kl_weight * KL(q || uniform) / log V.

        Both terms are free of units, so weights keep their meaning on other data: reconstruction is the mean squared error
        in standardised pixels (1 is what the mean colour costs); KL / log V is 1 for a posterior that is certain everywhere.
        In training mode the codes' uses are counted. Noise comes from `generator`, or else from torch's own.
        """
        z_BDPQ = self.features(image_BCHW)
        logits_MV = self.codebook.logits(_rows(z_BDPQ))
        counts_V = self._count(logits_MV.detach().argmax(1))
        code_MD = gumbel_softmax(logits_MV, temperature, generator) @ self.codebook.codes
        x_BCHW = self.draw(rearrange(code_MD, "(B P Q) D -> B D P Q", B=len(z_BDPQ), P=z_BDPQ.shape[2]))
        reconstruction = F.mse_loss(x_BCHW, self._standardised(image_BCHW))
        kl = kl_to_uniform(logits_MV)
        used, perplexity = code_usage(counts_V)
        metrics = {"reconstruction": reconstruction, "kl": kl, "batch_codes_used": used, "batch_perplexity": perplexity}
        return reconstruction + kl_weight * kl / math.log(self.vocab_size), {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def seed_codebook(self, image_BCHW: Tensor, seed: int = 0) -> None:
        """Make this the k-means tokenizer of these images' cells: pixel statistics, linear maps, codes. Once, before training.

        Every rank must pass the same images. Cells beyond 16 V (or 32,768) are sampled down to that.

        Raises:
            SettingError: there are fewer cells than codes.
        """
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        self.pixel_mean_C11.copy_(image_BCHW.mean((0, 2, 3))[:, None, None])
        self.pixel_std_C11.copy_(image_BCHW.std((0, 2, 3)).clamp(min=1e-3)[:, None, None])
        x_BCHW = self._standardised(image_BCHW)
        cells_NE = rearrange(x_BCHW, "B C (P i) (Q j) -> (B P Q) (C i j)", i=self.stride, j=self.stride)
        if len(cells_NE) < self.vocab_size:
            raise SettingError(
                f"{len(cells_NE)} cells cannot seed {self.vocab_size} codes: seed from more images, or lower vocab_size"
            )
        order_N = torch.randperm(len(cells_NE), generator=torch.Generator().manual_seed(seed))
        cells_NE = cells_NE[order_N[: max(SEEDS_PER_CODE * self.vocab_size, 1 << 15)].to(cells_NE.device)]
        self._start_linear(cells_NE)
        z_NDPQ = self.patch_in(rearrange(cells_NE, "N (C i j) -> N C i j", i=self.stride, j=self.stride))
        self.codebook.seed(z_NDPQ.flatten(1), seed)

    @torch.no_grad()
    def restart_dead_codes(self, image_BCHW: Tensor, seed: int) -> Tensor:
        """Move codes hardly used since the last call onto cells of these images; return how many: `Codebook.restart_dead`."""
        return self.codebook.restart_dead(_rows(self.features(image_BCHW)), seed)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Return features z_BDPQ of images in [0, 1]."""
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        x_BCHW = self._standardised(image_BCHW.float()).contiguous(memory_format=torch.channels_last)
        return self.patch_in(x_BCHW) + self.encoder(x_BCHW.to(next(self.encoder.parameters()).dtype))

    def draw(self, code_BDPQ: Tensor) -> Tensor:
        """Return the image_BCHW, in standardised pixels, that these code vectors stand for."""
        code_BDPQ = code_BDPQ.contiguous(memory_format=torch.channels_last)
        return self.patch_out(code_BDPQ) + self.decoder(code_BDPQ)

    def _standardised(self, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW - self.pixel_mean_C11) / self.pixel_std_C11

    def _count(self, ids_M: Tensor) -> Tensor:
        if self.training:
            self.codebook.count(ids_M)
        return count_codes(ids_M, self.vocab_size)

    def _start_linear(self, cells_NE: Tensor) -> None:
        """Set the linear maps to the first D principal components, features to a mean squared norm of D, the branches to 0."""
        mean_E, axes_KE = principal_components(cells_NE, self.code_width)
        scale = math.sqrt(self.code_width) / (cells_NE - mean_E).square().sum(1).mean().sqrt().clamp(min=1e-6)
        shape = (len(axes_KE), *self.patch_in.weight.shape[1:])
        for parameter in (*self.patch_in.parameters(), *self.patch_out.parameters()):
            parameter.zero_()
        into, out = dict(self.patch_in.named_parameters()), dict(self.patch_out.named_parameters())
        into["weight"][: len(axes_KE)] = (axes_KE * scale).view(shape)
        into["bias"][: len(axes_KE)] = -(axes_KE @ mean_E) * scale
        out["weight"][: len(axes_KE)] = (axes_KE / scale).view(shape)
        out["bias"].copy_(mean_E.view(self.in_channels, -1).mean(1))
        for last in (*self.encoder[-1].parameters(), *self.decoder[-1].parameters()):
            last.zero_()


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
    """Channels after each halving of the image: `width` last, half as many for each doubling of the side, but 16 at least."""
    halvings = stride.bit_length() - 1
    return [max(width >> left, min(16, width)) for left in reversed(range(halvings))]


def build_encoder(in_channels: int, stride: int, width: int, code_width: int, depth: int) -> nn.Sequential:
    """(B, C, H, W) to (B, D, P, Q): 4x4 convolutions of stride 2 down to the grid, then residual blocks."""
    channels = [in_channels, *stage_widths(width, stride)]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
    blocks = [Residual(width) for _ in range(depth)]
    return nn.Sequential(*layers[:-1], *blocks, nn.ReLU(), nn.Conv2d(width, code_width, 1))


def build_decoder(in_channels: int, stride: int, width: int, code_width: int, depth: int) -> nn.Sequential:
    """(B, D, P, Q) to (B, C, H, W): the encoder's mirror image."""
    channels = [*reversed(stage_widths(width, stride)), in_channels]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    return nn.Sequential(nn.Conv2d(code_width, width, 1), *[Residual(width) for _ in range(depth)], *layers)


def gumbel_softmax(logits_MV: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return relaxed one-hot samples_MV of Categorical(logits) (Jang et al., arXiv 1611.01144; Maddison et al., 1611.00712)."""
    uniform_MV = torch.rand(logits_MV.shape, generator=generator, device=logits_MV.device, dtype=logits_MV.dtype)
    gumbel_MV = -(-uniform_MV.log()).log()  # on CPUs twice as fast as drawing exponentials
    return ((logits_MV + gumbel_MV) / temperature).softmax(1)


def kl_to_uniform(logits_MV: Tensor) -> Tensor:
    """Return the mean over cells of KL(Categorical(logits) || uniform over V) in nats: log V less the entropy."""
    negative_entropy_M = (logits_MV.softmax(1) * logits_MV).sum(1) - logits_MV.logsumexp(1)
    return math.log(logits_MV.shape[1]) + negative_entropy_M.mean()


def principal_components(x_NE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (mean_E, orthonormal axes_KE by falling variance), K = min(count, E)."""
    mean_E = x_NE.mean(0)
    centred_NE = x_NE - mean_E
    axes_EE = torch.linalg.eigh(centred_NE.T @ centred_NE / len(x_NE)).eigenvectors
    return mean_E, axes_EE.flip(1)[:, :count].T


def _rows(z_BDPQ: Tensor) -> Tensor:
    return rearrange(z_BDPQ, "B D P Q -> (B P Q) D")
