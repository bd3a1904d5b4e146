"""VQ-KD's codebook: unit vectors that follow the features by running means (Peng et al., arXiv 2208.06366, section 2.1).

Legend: M cells of a batch, N cells to start from, D code width, V codebook size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimetic.tokenizers.clustering import kmeans
from mimetic.tokenizers.codebook import gather, new_places
from mimetic.tokenizers.usage import count_codes

DECAY = 0.99


class SphericalCodebook(nn.Module):
    """V points on the unit sphere of D dimensions; no gradient moves them.

    `usage_V` is the running mean of how often each code is used in a step. Both are buffers, the same on every process.
    """

    codes_VD: Tensor
    usage_V: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes_VD", F.normalize(torch.randn(vocab_size, width)))
        self.register_buffer("usage_V", torch.zeros(vocab_size))

    def nearest(self, z_MD: Tensor) -> Tensor:
        """ids_M, int64: the code of the largest cosine with each feature."""
        return (z_MD @ self.codes_VD.T).max(1).indices  # on a CPU argmax takes more than twice as long

    def quantize(self, z_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each feature's code, for training.

        Args:
            z_MD: of unit length.

        Returns:
            (code_MD, ids_M, commitment): the codes, whose gradient goes straight through to the features; the mean squared
            difference between features and codes, which pulls at the features only.
        """
        with torch.autocast(z_MD.device.type, enabled=False):  # as `VQKD.encode` does: bf16 knows cosines near 1 to 0.004 only
            ids_M = self.nearest(z_MD.detach())
            code_MD = F.embedding(ids_M, self.codes_VD)
            return z_MD + (code_MD - z_MD).detach(), ids_M, F.mse_loss(z_MD, code_MD)

    def statistics(self, z_MD: Tensor, ids_M: Tensor) -> tuple[Tensor, Tensor]:
        """(counts_V, sums_VD): how many features each code has, and their sum; of this process alone."""
        counts_V = count_codes(ids_M, len(self.codes_VD)).float()
        return counts_V, torch.zeros_like(self.codes_VD).index_add_(0, ids_M, z_MD)

    @torch.no_grad()
    def follow(self, counts_V: Tensor, sums_VD: Tensor, decay: float = DECAY) -> None:
        """One step towards the mean direction of each code's features; a code without any stays where it is.

        c <- normalize(decay * c + (1 - decay) * normalize(sum of its features)), as the authors' `NormEMAVectorQuantizer`.
        """
        moved_VD = F.normalize(self.codes_VD.lerp(F.normalize(sums_VD), 1 - decay))
        self.codes_VD.copy_(torch.where(counts_V[:, None] > 0, moved_VD, self.codes_VD))
        self.usage_V.lerp_(counts_V, 1 - decay)

    @torch.no_grad()
    def start(self, z_ND: Tensor, seed: int = 0) -> None:
        """Set the codes to the spherical k-means centres of these features of unit length."""
        self.codes_VD.copy_(kmeans(z_ND, len(self.codes_VD), seed=seed, spherical=True))
        self.usage_V.zero_()

    @torch.no_grad()
    def restart_dead(self, z_MD: Tensor, seed: int, dead_below: float = 0.05) -> Tensor:
        """Move each code used less than `dead_below` times the mean onto a badly served feature; return how many moved.

        `z_MD` are this process's features, equally many on each; see `new_places`. What moved counts as used like the mean until
        it has been tried. The authors' code has nothing like it: on ImageNet a k-means start keeps 97 to 100 % of the codes alive.
        """
        mean = self.usage_V.mean()
        moved_V, place_VD = new_places(self.usage_V < dead_below * mean, gather(z_MD.float()), self.codes_VD, seed)
        self.codes_VD.copy_(torch.where(moved_V[:, None], place_VD, self.codes_VD))
        self.usage_V.copy_(torch.where(moved_V, mean, self.usage_V))
        return moved_V.sum()
