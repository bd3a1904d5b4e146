"""Training VQ-KD in the common loop (Peng et al., arXiv 2208.06366, section 2.1), and what is measured on held-out images.

Legend: B batch, C channels, H W pixels, P Q cells, M = B*P*Q, D code width, T teacher's width, V codebook size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mimetic.data.picture import in_unit_range
from mimetic.engine.objective import Objective, StepOutput, frozen
from mimetic.engine.pictures import contact_sheet
from mimetic.engine.run import Record
from mimetic.engine.runtime import add_up
from mimetic.tokenizers.components import principal_components
from mimetic.tokenizers.objective import only_valid
from mimetic.tokenizers.spherical import DECAY
from mimetic.tokenizers.teachers import Teacher
from mimetic.tokenizers.usage import blank_cells, code_usage, count_codes
from mimetic.tokenizers.vqkd import VQKD, FeatureDecoder, rows

SHOWN = 12


class VQKDObjective(Objective):
    """z = encoder(image); code, ids = nearest(z); loss = 1 - cos(decoder(code), teacher(image)) + commitment * |z - sg(code)|^2.

    The codes follow the features of a step, over all micro-batches and processes, when the next step begins: the sums are kept as
    buffers, which the loop puts back after a bad step, so nothing waits for the device. Dead codes are restarted after every
    `restart_every` steps of the first three quarters: the last ones need time to settle.
    """

    moves_weights = True
    counts_V: Tensor
    sums_VD: Tensor

    def __init__(self, vqkd: VQKD, decoder: FeatureDecoder, teacher: Teacher, device: torch.device, commitment: float = 1.0,
                 decay: float = DECAY, restart_every: int = 50) -> None:  # fmt: skip
        super().__init__()
        self.vqkd, self.decoder, self._teacher = vqkd, decoder, frozen(teacher, device)
        self.commitment, self.decay, self.restart_every = commitment, decay, restart_every
        self.register_buffer("counts_V", torch.zeros(vqkd.vocab_size))
        self.register_buffer("sums_VD", torch.zeros(vqkd.vocab_size, vqkd.code_width))
        self._restart_seed = 0
        self._seen: Tensor | None = None  # features that dead codes are restarted from

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._teacher[0]

    def begin_step(self, step: int, steps: int) -> None:
        """Moves the codes by what the last step saw."""
        self._move_codes()
        self._restart_seed = step if step % self.restart_every == 0 and step < 0.75 * steps else 0

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image` (B, C, H, W), uint8 or in [0, 1], `valid` bool (B,)."""
        image_BCHW = in_unit_range(only_valid(batch))
        z_BDPQ = self.vqkd.features(image_BCHW)
        z_MD = rows(z_BDPQ)
        code_MD, ids_M, commitment = self.vqkd.codebook.quantize(z_MD)
        told_BPQT = self.decoder(rearrange(code_MD, "(B P Q) D -> B D P Q", B=len(z_BDPQ), P=z_BDPQ.shape[2]))
        cosine = F.cosine_similarity(told_BPQT.float(), self.target(image_BCHW), dim=-1).mean()
        if self.training:
            self._collect(z_MD.detach(), ids_M)
        used, perplexity = code_usage(count_codes(ids_M, self.vqkd.vocab_size))
        metrics = {"teacher_cosine": cosine, "commitment": commitment, "batch_codes_used": used, "batch_perplexity": perplexity}
        return StepOutput(1 - cosine + self.commitment * commitment, {name: value.detach() for name, value in metrics.items()})

    def target(self, image_BCHW: Tensor) -> Tensor:
        """(B, P, Q, T): the teacher's features of images in [0, 1], resized to the cells where its grid is another."""
        map_BThw = self.teacher(image_BCHW)
        grid = self.vqkd.encoder.feature_grid
        if map_BThw.shape[-2:] != grid:
            map_BThw = F.interpolate(map_BThw, grid, mode="bilinear", antialias=True)
        return rearrange(map_BThw, "B T P Q -> B P Q T")

    def told(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_BPQ, told_BPQT): the tokens of images in [0, 1], and the features that the decoder tells from them."""
        ids_BPQ = self.vqkd.encode(image_BCHW)
        return ids_BPQ, self.decoder(rearrange(F.embedding(ids_BPQ, self.vqkd.codebook.codes_VD), "B P Q D -> B D P Q"))

    @torch.no_grad()
    def _collect(self, z_MD: Tensor, ids_M: Tensor) -> None:
        counts_V, sums_VD = self.vqkd.codebook.statistics(z_MD, ids_M)
        self.counts_V += add_up(counts_V)
        self.sums_VD += add_up(sums_VD)
        if self._restart_seed:
            self._seen = z_MD

    def _move_codes(self) -> None:
        self.vqkd.codebook.follow(self.counts_V, self.sums_VD, self.decay)
        self.counts_V.zero_()
        self.sums_VD.zero_()

    @property
    def wants_end_step(self) -> bool:
        """When it is time to restart codes."""
        return self._seen is not None

    def end_step(self, sound: bool) -> None:
        """Restarts dead codes."""
        if sound and self._seen is not None:
            self._move_codes()  # first, or they would pull at what they restart as
            self.vqkd.codebook.restart_dead(self._seen, self._restart_seed)
        self._seen = None

    def no_weight_decay_names(self) -> set[str]:
        """Tokens, positions and bias tables of both nets."""
        nets = {"vqkd.encoder": self.vqkd.encoder, "decoder.vit": self.decoder.vit}
        return {f"{owner}.{name}" for owner, net in nets.items() for name in net.no_weight_decay_names()}

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Rows: images, the teacher's features, and what is told of them from tokens; three principal components as colours."""
        image_BCHW = in_unit_range(batch["image"][:SHOWN])
        true_BPQT, told_BPQT = (F.normalize(x.float(), dim=-1) for x in (self.target(image_BCHW), self.told(image_BCHW)[1]))
        mean_T, axes_KT = principal_components(true_BPQT.flatten(0, 2), 3)
        colours = [(x - mean_T) @ axes_KT.T for x in (true_BPQT, told_BPQT)]
        widest = colours[0].abs().amax((0, 1, 2)).clamp(min=1e-6)
        return contact_sheet([image_BCHW, *(rearrange(0.5 + 0.5 * x / widest, "B P Q K -> B K P Q") for x in colours)])


def evaluate_vqkd(objective: VQKDObjective, batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[Record]:
    """Code usage and what tokens tell of the teacher's features, over held-out images, each counted once.

    Args:
        batches: with `image` (B, C, H, W), uint8 or in [0, 1], and `valid`, on the device.

    Returns:
        Records `codes_used` (share), `perplexity`, `perplexity_non_blank`, and `teacher_cosine`, the mean over cells.
    """
    vqkd = objective.vqkd
    counts, textured = torch.zeros(2, vqkd.vocab_size, dtype=torch.float64, device=device)
    cosine = torch.zeros(2, dtype=torch.float64, device=device)  # sum, cells
    images = torch.zeros(1, dtype=torch.float64, device=device)
    for batch in batches:
        image_BCHW = in_unit_range(batch["image"][batch["valid"]])
        ids_BPQ, told_BPQT = objective.told(image_BCHW)
        counts += count_codes(ids_BPQ, vqkd.vocab_size)
        textured += count_codes(ids_BPQ[~blank_cells(image_BCHW, vqkd.stride)], vqkd.vocab_size)
        cosine[0] += F.cosine_similarity(told_BPQT.float(), objective.target(image_BCHW), dim=-1).double().sum()
        cosine[1] += ids_BPQ.numel()
        images += len(image_BCHW)
    counts, textured, cosine, images = (add_up(value) for value in (counts, textured, cosine, images))
    used, perplexity = code_usage(counts)
    number = int(images)
    return [
        Record("codes_used", float(used), number, details={"vocab_size": vqkd.vocab_size, "counts": counts.int().tolist()}),
        Record("perplexity", float(perplexity), number),
        Record("perplexity_non_blank", float(code_usage(textured)[1]), number),
        Record("teacher_cosine", float(cosine[0] / cosine[1].clamp(min=1)), number),
    ]
