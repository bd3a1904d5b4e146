"""A discrete VAE as image tokenizer (Ramesh et al., arXiv 2102.12092, section 2.1), made so that it does not collapse.

Legend: B batch, C channels, H W pixels, P Q cells (P = H / stride, Q = W / stride), M = B*P*Q, D code width, V codebook size,
E = C * stride**2 values in a cell.

A dVAE that starts from random weights soon finds a few codes good enough and never leaves them. This one starts as
k-means over the principal components of cells: encoder and decoder are each a fixed linear map of a cell, set from data by
`seed_codebook`, plus a convolutional branch that starts at zero and learns the rest. Codes that fall out of use are
restarted on cells that are served badly.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimetic.engine.errors import SettingError
from mimetic.tokenizers.clustering import nearest
from mimetic.tokenizers.codebook import Codebook
from mimetic.tokenizers.components import principal_components
from mimetic.tokenizers.contract import check_image_fits
from mimetic.tokenizers.convolutions import build_decoder, build_encoder
from mimetic.tokenizers.logit_laplace import map_pixels, negative_log_likelihood, unmap_pixels
from mimetic.tokenizers.usage import code_usage, count_codes

SEEDS_PER_CODE = 16
HELD = 1 << 26  # numbers of cells that seed, and logits, held in memory at a time
SEEDING = ("dvae.seed_images", "dvae.vocab_size")
LEAST_LOG_B = math.log(0.8 / 255 * 4 / 2)  # half a grey level of 8 bits, at mid-grey: cut off there, numbers have infinite densities


class DVAE(nn.Module):
    """The trainable tokenizer. It takes images in [0, 1] and standardises each channel by what `seed_codebook` measured.

    With the logit-Laplace likelihood all of it happens in logits of pixels: they are what is standardised, clustered and predicted,
    and the decoder also says ln b, from the spread that is left by the clusters on.

    Args:
        vocab_size: V.
        stride: Pixels of a cell's side: a power of two, usually 4 to 32.
        in_channels: C.
        width: Channels of the convolutions at the cell grid; halved for each doubling of the side before it.
        code_width: D.
        depth: Residual blocks on each side; each lets a cell see one cell further.
        likelihood: "mse", or "logit_laplace" (arXiv 2102.12092, appendix A.3).

    Raises:
        SettingError: for a stride that is no power of two, fewer than two codes, or an unknown likelihood.
    """

    pixel_mean_C11: Tensor
    pixel_std_C11: Tensor
    log_b_C11: Tensor

    def __init__(
        self, vocab_size: int, stride: int, in_channels: int, width: int = 64, code_width: int = 32, depth: int = 1,
        likelihood: str = "mse",
    ) -> None:  # fmt: skip
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise SettingError(f"the tokenizer's stride {stride} is no power of two: choose 4, 8, 16 or 32")
        if vocab_size < 2:
            raise SettingError(f"vocab_size {vocab_size} leaves nothing to choose: take 2 codes or more")
        if likelihood not in ("mse", "logit_laplace"):
            raise SettingError(f"the likelihood {likelihood!r} is not known: choose mse or logit_laplace")
        self.vocab_size, self.stride, self.in_channels, self.code_width = vocab_size, stride, in_channels, code_width
        self.width, self.depth, self.likelihood = width, depth, likelihood
        laplace = likelihood == "logit_laplace"
        # Statistics of the data, not trained: E inputs of small weights each would jump far in one step of Adam.
        self.patch_in = nn.Conv2d(in_channels, code_width, stride, stride).requires_grad_(False)
        self.patch_out = nn.ConvTranspose2d(code_width, in_channels, stride, stride).requires_grad_(False)
        self.encoder = build_encoder(in_channels, stride, width, code_width, depth)
        self.decoder = build_decoder(2 * in_channels if laplace else in_channels, stride, width, code_width, depth)
        self.codebook = Codebook(vocab_size, code_width)
        self.register_buffer("pixel_mean_C11", torch.full((in_channels, 1, 1), 0.0 if laplace else 0.5))
        self.register_buffer("pixel_std_C11", torch.full((in_channels, 1, 1), 1.0 if laplace else 0.25))
        if laplace:
            self.register_buffer("log_b_C11", torch.zeros(in_channels, 1, 1))
        self.to(memory_format=torch.channels_last)  # up to twice as fast on CPUs

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `DVAE(**config)` has this one's shapes."""
        names = ("vocab_size", "stride", "in_channels", "width", "code_width", "depth", "likelihood")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Return ids_BPQ, int64 in [0, V): the likeliest code of each cell of images in [0, 1]. The same under autocast.

        Raises:
            SettingError: the stride does not divide a side, the channels are not those of training, or pixels are not in [0, 1].
        """
        with torch.autocast(image_BCHW.device.type, enabled=False):
            z_BDPQ = self.features(image_BCHW)
            parts = _rows(z_BDPQ).split(max(1, HELD // self.vocab_size))
            ids_M = torch.cat([self.codebook.logits(part_MD).argmax(1) for part_MD in parts])
        return ids_M.view(len(z_BDPQ), *z_BDPQ.shape[2:])

    def encode_in(self, dtype: torch.dtype) -> None:
        """Compute the encoder's convolutions in this dtype, the linear map of cells and the logits still in fp32; see the contract."""
        self.encoder.to(dtype)

    @torch.no_grad()
    def decode(self, ids_BPQ: Tensor) -> Tensor:
        """Return image_BCHW in [0, 1] drawn from ids_BPQ in [0, V)."""
        code_BPQD = F.embedding(ids_BPQ, self.codebook.codes)
        x_BCHW = self.draw(rearrange(code_BPQD, "B P Q D -> B D P Q"))[0] * self.pixel_std_C11 + self.pixel_mean_C11
        return unmap_pixels(x_BCHW.sigmoid()) if self.likelihood == "logit_laplace" else x_BCHW.clamp(0, 1)

    def loss(
        self, image_BCHW: Tensor, temperature: float, kl_weight: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics): the relaxed evidence bound, reconstruction + kl_weight * KL(q || uniform) / log V.

        Both terms are free of units, so weights keep their meaning on other data: reconstruction is the mean squared error
        in standardised pixels (1 is what the mean colour costs), or with logit-Laplace -log f in nats, the mean over values;
        KL / log V is 1 for a posterior that is certain everywhere. In training mode the codes' uses are counted. Noise comes from
        `generator`, or else from torch's own.
        """
        z_BDPQ = self.features(image_BCHW)
        code_MD, kl, ids_M = self._relaxed(_rows(z_BDPQ), temperature, generator)
        counts_V = self._count(ids_M)
        drawn = self.draw(rearrange(code_MD, "(B P Q) D -> B D P Q", B=len(z_BDPQ), P=z_BDPQ.shape[2]))
        reconstruction = self._reconstruction(image_BCHW, *drawn)
        used, perplexity = code_usage(counts_V)
        metrics = {"reconstruction": reconstruction, "kl": kl, "batch_codes_used": used, "batch_perplexity": perplexity}
        return reconstruction + kl_weight * kl / math.log(self.vocab_size), {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def seed_codebook(self, image_BCHW: Tensor, seed: int = 0) -> None:
        """Make this the k-means tokenizer of these images' cells: pixel statistics, linear maps, codes. Once, before training.

        Every rank must pass the same images. Cells beyond 16 V (or 32,768) are sampled down to that; the maps come from as many of
        them as 256 MB hold.

        Raises:
            SettingError: there are fewer cells than codes.
        """
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        x_BCHW = self._in_pixel_space(image_BCHW)
        self.pixel_mean_C11.copy_(x_BCHW.mean((0, 2, 3))[:, None, None])
        self.pixel_std_C11.copy_(x_BCHW.std((0, 2, 3)).clamp(min=1e-3)[:, None, None])
        cells_BPQCij = image_BCHW.unflatten(3, (-1, self.stride)).unflatten(2, (-1, self.stride)).permute(0, 2, 4, 1, 3, 5)
        images, rows, columns = cells_BPQCij.shape[:3]
        check_seeds(images, rows * columns, self.vocab_size)
        order_N = torch.randperm(images * rows * columns, generator=torch.Generator().manual_seed(seed))
        order_N = order_N[: max(SEEDS_PER_CODE * self.vocab_size, 1 << 15)].to(image_BCHW.device)
        parts = [torch.unravel_index(part, (images, rows, columns))
                 for part in order_N.split(max(1, HELD // cells_BPQCij[0, 0, 0].numel()))]  # fmt: skip
        first_NCij = self._standardised(cells_BPQCij[parts[0]])
        self._start_linear(first_NCij.flatten(1))
        z_ND = torch.cat([self.patch_in(self._standardised(cells_BPQCij[part])).flatten(1) for part in parts])
        self.codebook.seed(z_ND, seed)
        if self.likelihood == "logit_laplace":
            ids_N = nearest(z_ND[: len(first_NCij)], self.codebook.codes)[0]
            error_NCij = first_NCij - self.patch_out(self.codebook.codes[ids_N][..., None, None])
            self.log_b_C11.copy_((error_NCij.abs().mean((0, 2, 3))[:, None, None] * self.pixel_std_C11).clamp(min=1e-6).log())

    @torch.no_grad()
    def restart_dead_codes(self, image_BCHW: Tensor, seed: int) -> Tensor:
        """Move codes hardly used since the last call onto cells of these images; return how many: `Codebook.restart_dead`."""
        return self.codebook.restart_dead(_rows(self.features(image_BCHW)), seed)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Return features z_BDPQ of images in [0, 1]."""
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        x_BCHW = self._standardised(image_BCHW.float()).contiguous(memory_format=torch.channels_last)
        return self.patch_in(x_BCHW) + self.encoder(x_BCHW.to(next(self.encoder.parameters()).dtype))

    def draw(self, code_BDPQ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image_BCHW, in standardised pixels, that these code vectors stand for, and what is learned of ln b, if anything."""
        code_BDPQ = code_BDPQ.contiguous(memory_format=torch.channels_last)
        learned_BKHW = self.decoder(code_BDPQ)
        return self.patch_out(code_BDPQ) + learned_BKHW[:, : self.in_channels], learned_BKHW[:, self.in_channels :]

    def _reconstruction(self, image_BCHW: Tensor, drawn_BCHW: Tensor, learned_BCHW: Tensor) -> Tensor:
        if self.likelihood == "mse":
            return F.mse_loss(drawn_BCHW, self._standardised(image_BCHW))
        mu_BCHW = drawn_BCHW.float() * self.pixel_std_C11 + self.pixel_mean_C11
        log_b_BCHW = LEAST_LOG_B + F.softplus(learned_BCHW.float() + self.log_b_C11 - LEAST_LOG_B)  # b is added to the least one
        return negative_log_likelihood(map_pixels(image_BCHW.float()), mu_BCHW, log_b_BCHW).mean()

    def _relaxed(self, z_MD: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Relaxed codes_MD of features, their mean KL, and the likeliest ids_M.

        Where M x V logits are many, they are computed in parts and once more in the backward pass, which can repeat draws from
        torch's own generator only.
        """
        if len(z_MD) * self.vocab_size <= HELD or generator is not None:
            return self._relaxed_part(z_MD, temperature, generator)
        parts = z_MD.split(max(1, HELD // self.vocab_size))
        code, kl, ids = zip(*(checkpoint(self._relaxed_part, part, temperature, use_reentrant=False) for part in parts), strict=True)
        shares = [mean * (len(part) / len(z_MD)) for mean, part in zip(kl, parts, strict=True)]
        return torch.cat(code), torch.stack(shares).sum(), torch.cat(ids)

    def _relaxed_part(self, z_MD: Tensor, temperature: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits_MV = self.codebook.logits(z_MD)
        code_MD = gumbel_softmax(logits_MV, temperature, generator) @ self.codebook.codes
        return code_MD, kl_to_uniform(logits_MV), logits_MV.detach().argmax(1)

    def _in_pixel_space(self, image_BCHW: Tensor) -> Tensor:
        return map_pixels(image_BCHW.float()).logit() if self.likelihood == "logit_laplace" else image_BCHW

    def _standardised(self, image_BCHW: Tensor) -> Tensor:
        return (self._in_pixel_space(image_BCHW) - self.pixel_mean_C11) / self.pixel_std_C11

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


def check_seeds(images: int, cells: int, vocab_size: int, at_hand: int | None = None, *, settings: tuple[str, str] = SEEDING) -> None:
    """Raise SettingError unless images of so many cells each can seed the codes; `at_hand` images are all there are.

    `settings` name the numbers of images and of codes.
    """
    if images * cells >= vocab_size:
        return
    wanted = -(-vocab_size // cells)
    more = (f"set {settings[0]} to {wanted} or more" if at_hand is None or wanted <= at_hand
            else f"the data has {at_hand} images, where {wanted} are needed")  # fmt: skip
    raise SettingError(f"{images * cells} cells cannot seed {vocab_size} codes: {images} images have {cells} cells each; {more}, "
                       f"or {settings[1]} to {images * cells} or less")  # fmt: skip


def gumbel_softmax(logits_MV: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return relaxed one-hot samples_MV of Categorical(logits) (Jang et al., arXiv 1611.01144; Maddison et al., 1611.00712)."""
    uniform_MV = torch.rand(logits_MV.shape, generator=generator, device=logits_MV.device, dtype=logits_MV.dtype)
    gumbel_MV = -(-uniform_MV.log()).log()  # on CPUs twice as fast as drawing exponentials
    return ((logits_MV + gumbel_MV) / temperature).softmax(1)


def kl_to_uniform(logits_MV: Tensor) -> Tensor:
    """Return the mean over cells of KL(Categorical(logits) || uniform over V) in nats: log V less the entropy."""
    negative_entropy_M = (logits_MV.softmax(1) * logits_MV).sum(1) - logits_MV.logsumexp(1)
    return math.log(logits_MV.shape[1]) + negative_entropy_M.mean()


def _rows(z_BDPQ: Tensor) -> Tensor:
    return rearrange(z_BDPQ, "B D P Q -> (B P Q) D")
