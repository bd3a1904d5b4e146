"""Training a dVAE in the common loop: annealing, dead codes, pictures, and what is measured on held-out images."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from mimetic.data.picture import in_unit_range
from mimetic.engine.objective import Objective, StepOutput
from mimetic.engine.pictures import contact_sheet
from mimetic.engine.run import Record
from mimetic.engine.runtime import add_up
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.usage import blank_cells, code_usage, count_codes

SHOWN = 12


class DVAEObjective(Objective):
    """The relaxed evidence bound; the temperature falls exponentially over four fifths, the KL's weight rises over the first half.

    Dead codes are restarted after every `restart_every` steps of the first three quarters: the last codes need time to settle.
    """

    moves_weights = True

    def __init__(self, dvae: DVAE, temperature: float, final_temperature: float, kl_weight: float, restart_every: int) -> None:
        super().__init__()
        self.dvae = dvae
        self.temperatures, self.kl_weight, self.restart_every = (temperature, final_temperature), kl_weight, restart_every
        self._temperature, self._kl_weight, self._restart_seed = temperature, 0.0, 0
        self._seen: torch.Tensor | None = None  # images that dead codes are restarted from

    def begin_step(self, step: int, steps: int) -> None:
        """Anneals by the share of steps done."""
        progress = step / steps
        high, low = self.temperatures
        self._temperature = high * (low / high) ** min(1.0, progress / 0.8)  # the last fifth settles at the lowest
        self._kl_weight = self.kl_weight * min(1.0, 2 * progress)
        self._restart_seed = step if step % self.restart_every == 0 and progress < 0.75 else 0

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image` (B, C, H, W), uint8 or in [0, 1], `valid` bool (B,)."""
        image_BCHW = in_unit_range(only_valid(batch))
        if self.training and self._restart_seed:
            self._seen = image_BCHW
        loss, metrics = self.dvae.loss(image_BCHW, self._temperature, self._kl_weight)
        return StepOutput(loss, metrics)

    @property
    def wants_end_step(self) -> bool:
        """When it is time to restart codes."""
        return self._seen is not None

    @torch.no_grad()
    def end_step(self, sound: bool) -> None:
        """Restarts dead codes."""
        if sound and self._seen is not None:
            self.dvae.restart_dead_codes(self._seen, self._restart_seed)
        self._seen = None

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Rows: images, and what their tokens decode to."""
        image_BCHW = in_unit_range(batch["image"][:SHOWN])
        return contact_sheet([image_BCHW, self.dvae.decode(self.dvae.encode(image_BCHW))])


def only_valid(batch: Mapping[str, Any]) -> torch.Tensor:
    """`image` with the batch's first valid one in place of each that is not: a shape known without a look at the device."""
    valid_B = batch["valid"]
    places_B = torch.arange(len(valid_B), device=valid_B.device)
    return batch["image"][torch.where(valid_B, places_B, valid_B.int().argmax())]


def evaluate_tokenizer(dvae: DVAE, batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[Record]:
    """Code usage and reconstruction over held-out images, each counted once.

    Args:
        batches: with `image` (B, C, H, W), uint8 or in [0, 1], and `valid`, on the device.

    Returns:
        Records `codes_used` (share), `perplexity`, `perplexity_non_blank`, and `reconstruction_psnr` in dB.
    """
    counts, textured = torch.zeros(2, dvae.vocab_size, dtype=torch.float64, device=device)
    error = torch.zeros(2, dtype=torch.float64, device=device)  # sum of squares, pixels
    images = torch.zeros(1, dtype=torch.float64, device=device)
    for batch in batches:
        valid_B = batch["valid"]
        image_BCHW = in_unit_range(batch["image"][valid_B])
        ids_BPQ = dvae.encode(image_BCHW)
        counts += count_codes(ids_BPQ, dvae.vocab_size)
        textured += count_codes(ids_BPQ[~blank_cells(image_BCHW, dvae.stride)], dvae.vocab_size)
        error[0] += (dvae.decode(ids_BPQ) - image_BCHW).double().square().sum()
        error[1] += image_BCHW.numel()
        images += valid_B.sum()
    counts, textured, error, images = (add_up(value) for value in (counts, textured, error, images))
    used, perplexity = code_usage(counts)
    number = int(images)
    return [
        Record("codes_used", float(used), number, details={"vocab_size": dvae.vocab_size, "counts": counts.int().tolist()}),
        Record("perplexity", float(perplexity), number),
        Record("perplexity_non_blank", float(code_usage(textured)[1]), number),
        Record("reconstruction_psnr", -10 * math.log10(max(float(error[0] / error[1]), 1e-12)), number),
    ]
