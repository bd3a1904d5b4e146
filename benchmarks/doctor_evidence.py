"""What does the doctor say of tokenizers and images that its limits were not fitted to?

`python benchmarks/doctor_evidence.py` trains three dVAEs on glyphs of matplotlib's fonts (28x28 grey), on tiles of Debian's wallpapers
(colour) and on the same in grey at another stride, codebook and loss; lets three others of the same shapes start from random weights and
learn without seeds and restarts; and asks the doctor about all of them on held-out images of their own kind, about the first three on
other kinds, and about untrained weights. What the word should be was written down before: `expected`. About five minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tokenizers_evidence import PARTS, TILES, cut
from wallpapers import photographs

from mimetic.data.fashion_mnist import find_fashion_mnist
from mimetic.data.opening import open_set
from mimetic.data.picture import in_unit_range
from mimetic.data.stream import ShardStream
from mimetic.data.views import ClassifyViews
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.files import save_tokenizer
from mimetic.tokenizers.verdict import BLIND, COLLAPSED, HEALTHY

ROOT = Path(__file__).resolve().parent.parent
NAIVE_STEPS, RATE, KL_WEIGHT = 250, 2e-3, 0.001
LAST_TEMPERATURE = 0.1


class Shape(NamedTuple):
    """A tokenizer to be, and the images that it takes."""

    images: str
    size: int
    vocab_size: int
    stride: int
    channels: int
    likelihood: str
    samples: int


SHAPES = {
    "glyphs": Shape("glyphs", 28, 128, 4, 1, "mse", 19200),
    "colours": Shape("colour tiles", 64, 256, 8, 3, "mse", 6400),
    "greys": Shape("grey tiles", 48, 512, 8, 1, "logit_laplace", 9600),
}
OTHERS = {"glyphs": ("Fashion-MNIST", "grey tiles"), "colours": ("glyphs in colour",), "greys": ("glyphs", "Fashion-MNIST")}


def main() -> None:
    """Packs, trains, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is trained or drawn, but the images (default: %(default)s)")
    arguments = parser.parse_args()
    shards, out = _pack_all(arguments.out.resolve() / "shards"), arguments.out.resolve() / str(arguments.seed)
    rows = []
    for name, shape in SHAPES.items():
        own, held_out = shards[shape.images], shards[shape.images] / "val"
        trained = out / name
        _run(sys.executable, "tokenizers/train_dvae.py", "--config", "launch/recipes/demo_tokenizer.yaml", "--out", trained,
             "--data.index", own / "train", "--evaluate_on", held_out, "--data.batch_size", 64, "--train.samples", shape.samples,
             "--views.image_size", shape.size, "--dvae.vocab_size", shape.vocab_size, "--dvae.stride", shape.stride,
             "--dvae.loss", shape.likelihood, "--seed", arguments.seed)  # fmt: skip
        rows.append(_row(f"dVAE of {shape.images}", trained, shape.images, held_out, shape, HEALTHY))
        for other in OTHERS[name]:
            rows.append(_row(f"dVAE of {shape.images}", trained, other, shards[other] / "val", shape, BLIND))
        naive = _naive(out / f"{name}-naive", shape, own / "train", arguments.seed)
        rows.append(_row(f"the same without seeds and restarts, {NAIVE_STEPS} steps", naive, shape.images, held_out, shape, COLLAPSED))
        for seed in (2 * arguments.seed, 2 * arguments.seed + 1):
            untrained = out / f"{name}-random-{seed}"
            save_tokenizer(_random(shape, seed), untrained)
            rows.append(_row(f"the same with random weights, seed {seed}", untrained, shape.images, held_out, shape, COLLAPSED))
    print("\n| tokenizer | V | images | codes | perplexity, not blank | verdict | expected |\n" + "|---" * 7 + "|")
    print("\n".join(rows))


def _row(title: str, tokenizer: Path, images: str, shards: Path, shape: Shape, expected: str) -> str:
    told = tokenizer.with_name(f"{tokenizer.name} on {images}.json")
    _run(sys.executable, "-m", "mimetic.cli", "doctor", tokenizer, shards, "--image-size", shape.size, "--json", told)
    found = json.loads(told.read_text())
    figures = found["figures"]
    return (f"| {title} | {shape.vocab_size} | {images} | {figures['codes_used']} | {figures['perplexity_non_blank']:.3g} | "
            f"{found['verdict']['word']} | {expected} |")  # fmt: skip


def _random(shape: Shape, seed: int) -> DVAE:
    torch.manual_seed(seed)
    return DVAE(shape.vocab_size, shape.stride, shape.channels, likelihood=shape.likelihood)


def _naive(folder: Path, shape: Shape, shards: Path, seed: int) -> Path:
    """As such a dVAE is first written: Gumbel-softmax from random weights, a falling temperature, and nothing else."""
    if not folder.exists():
        dvae = _random(shape, seed).train()
        optimizer = torch.optim.AdamW([weight for weight in dvae.parameters() if weight.requires_grad], RATE)
        stream = ShardStream(open_set(str(shards)), 64, seed=seed, tail="drop", transform=ClassifyViews(shape.size, None))
        for step, batch in enumerate(stream.run(NAIVE_STEPS)):
            loss, _ = dvae.loss(in_unit_range(batch["image"]), LAST_TEMPERATURE ** (step / NAIVE_STEPS), KL_WEIGHT)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(dvae.parameters(), 1.0)
            optimizer.step()
        save_tokenizer(dvae.eval(), folder)
    return folder


def _pack_all(out: Path) -> dict[str, Path]:
    """Folders of shards, each with `train` and `val`."""
    fashion = find_fashion_mnist()
    for part, name in (("train", "train"), ("val", "t10k")):
        _pack(out / "fashion" / part, fashion / f"{name}-images-idx3-ubyte.gz")
    photos, told = photographs()
    print(f"tiles of {told}", flush=True)
    for part, of_photo in PARTS.items():
        _pack_pictures(out / "tiles" / part, (tile.round().astype(np.uint8) for tile in cut(photos, of_photo, TILES[part])))
        _pack(out / "greys" / part, out / "tiles" / f"{part}-source", "--channels", "1")
    glyphs = list(_glyphs())
    for part, held_out in (("train", False), ("val", True)):
        _pack_pictures(out / "glyphs" / part, (glyph for number, glyph in enumerate(glyphs) if (number % 5 == 0) == held_out))
        _pack(out / "glyphs-colour" / part, out / "glyphs" / f"{part}-source", "--channels", "3")
    named = {"Fashion-MNIST": "fashion", "colour tiles": "tiles", "grey tiles": "greys", "glyphs": "glyphs",
             "glyphs in colour": "glyphs-colour"}  # fmt: skip
    return {name: out / folder for name, folder in named.items()}


def _glyphs(side: int = 28) -> Iterator[NDArray[np.uint8]]:
    """White letters on black, each of a font's once, in random order."""
    found = []
    for file in sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVu*.ttf")):
        font = ImageFont.truetype(str(file), 22)
        for code in FT2Font(str(file)).get_charmap():
            if chr(code).isalpha():
                picture = Image.new("L", (side, side))
                ImageDraw.Draw(picture).text((side / 2, side / 2), chr(code), fill=255, font=font, anchor="mm")
                found.append(np.asarray(picture))
    order = np.random.default_rng(0).permutation(len(found))[:12_000]
    return (found[number] for number in order)


def _pack_pictures(out: Path, pictures: Iterator[NDArray[np.uint8]]) -> None:
    source = out.with_name(f"{out.name}-source")
    if not source.exists():
        source.mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(source / f"{number:05d}.png")
    _pack(out, source)


def _pack(out: Path, source: Path, *more: str) -> None:
    if not (out / "index.json").exists():
        _run(sys.executable, "-m", "mimetic.cli", "pack", source, out, *more)


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
