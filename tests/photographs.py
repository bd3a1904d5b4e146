"""Real images that a test needs no network for: crops of scikit-learn's two photographs."""

from pathlib import Path

import numpy as np
import torch
from imagesets import encoded, folder_of
from sklearn.datasets import load_sample_images

from mimetic.data.pack import pack
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.files import save_tokenizer


def crops(count: int, size: int) -> np.ndarray:
    """uint8 (count, size, size, 3), from random places of both photographs."""
    random, photos = np.random.default_rng(0), load_sample_images().images
    found = []
    for i in range(count):
        photo = photos[i % 2]
        top, left = (int(random.integers(side - size)) for side in photo.shape[:2])
        found.append(photo[top : top + size, left : left + size])
    return np.stack(found)


def photo_world(folder: Path, count: int = 64, size: int = 128) -> Path:
    """`photos` (shards of crops) and `tokenizer` (64 codes of cells of 8 pixels, k-means of the crops)."""
    images = crops(count, size)
    pack(folder_of(folder / "files", {f"{i:04d}.png": encoded(image) for i, image in enumerate(images)}), folder / "photos")
    torch.manual_seed(0)
    dvae = DVAE(64, 8, 3, width=16, code_width=8)
    dvae.seed_codebook(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    save_tokenizer(dvae, folder / "tokenizer")
    return folder
