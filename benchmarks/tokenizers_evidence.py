"""Do dVAEs of other strides, channels and pixel ranges keep their codes alive? Three sets, three seeds each, by the real entry script.

`python benchmarks/tokenizers_evidence.py` packs Fashion-MNIST (28x28 grey), tiles of Debian's wallpapers (96x96 colour), and 13 bands
made of such tiles (12 bits in uint16 arrays, packed with --range), trains the recipes of launch/recipes on them, each run about a
minute on two cores, and prints a table from the runs' records. Where there is an accelerator it is used. Finished runs are reused.

    python benchmarks/tokenizers_evidence.py --out runs/tokenizers --seeds 3 [--loss logit_laplace]
"""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from wallpapers import photographs

from mimetic.data.fashion_mnist import find_fashion_mnist

ROOT = Path(__file__).resolve().parent.parent
USED, PERPLEXITY = 0.80, 0.35  # wanted at least: share of the codes, perplexity over cells that are not blank as a share of V
TILE, REDUCED = 96, 3  # pixels of a tile; how many pixels become one, a side
PARTS = {"train": (0, 0.75), "val": (0.75, 1)}  # of each photograph, along its longer side: what is measured on was not seen
TILES = {"train": 1200, "val": 240}
RANGE = ("0", "4095")
SAMPLES = {"demo_tokenizer": 19200, "dvae_photographs_small": 9600, "dvae_thirteen_channels": 6400}  # a third of the recipes'


def main() -> None:
    """Packs, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--loss", choices=("mse", "logit_laplace"), default="mse", help="(default: %(default)s)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shards_of = {"demo_tokenizer": _fashion(out), "dvae_photographs_small": _tiles(out, "colour"),
                 "dvae_thirteen_channels": _tiles(out, "bands")}  # fmt: skip
    rows = []
    for recipe, shards in shards_of.items():
        for seed in range(arguments.seeds):
            run = out / f"{recipe}-{arguments.loss}-{seed}"
            _run(sys.executable, "tokenizers/train_dvae.py", "--config", f"launch/recipes/{recipe}.yaml", "--out", run,
                 "--data.index", shards / "train", "--evaluate_on", shards / "val", "--seed", seed, "--dvae.loss", arguments.loss,
                 "--train.samples", SAMPLES[recipe])  # fmt: skip
            rows.append(_row(recipe, seed, run))
            print(rows[-1], flush=True)
    print("\n| recipe | seed | V | codes used | perplexity, not blank | of V | PSNR, dB | holds |\n" + "|---" * 8 + "|")
    print("\n".join(rows))


def _row(recipe: str, seed: int, run: Path) -> str:
    """From the last records of a run."""
    records = {record["metric"]: record for record in map(json.loads, (run / "records.jsonl").read_text().splitlines())}
    used, perplexity, psnr = (records[name]["value"] for name in ("codes_used", "perplexity_non_blank", "reconstruction_psnr"))
    size = records["codes_used"]["details"]["vocab_size"]
    holds = "yes" if used >= USED and perplexity >= PERPLEXITY * size else "NO"
    return f"| {recipe} | {seed} | {size} | {used:.3f} | {perplexity:.0f} | {perplexity / size:.2f} | {psnr:.2f} | {holds} |"


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


def _pack(source: Path, out: Path, *more: str) -> None:
    if not (out / "index.json").exists():
        _run(sys.executable, "-m", "mimetic.cli", "pack", source, out, *more)


def _fashion(out: Path) -> Path:
    source, shards = find_fashion_mnist(), out / "fashion"
    for name, file in (("train", "train-images-idx3-ubyte.gz"), ("val", "t10k-images-idx3-ubyte.gz")):
        _pack(source / file, shards / name)
    return shards


def _tiles(out: Path, kind: str) -> Path:
    """Shards of tiles: of three quarters of each photograph to train on, of the last to measure on."""
    shards = out / kind
    if not all((shards / name / "index.json").exists() for name in TILES):
        photos, told = photographs()
        print(f"tiles of {told}", flush=True)
        for name, part in PARTS.items():
            folder = out / f"{kind}-source" / name
            folder.mkdir(parents=True, exist_ok=True)
            for number, tile_HWC in enumerate(cut(photos, part, TILES[name])):
                if kind == "colour":
                    Image.fromarray(tile_HWC.round().astype(np.uint8)).save(folder / f"{number:05d}.png")
                else:
                    np.save(folder / f"{number:05d}.npy", bands(tile_HWC))
            _pack(folder, shards / name, *(() if kind == "colour" else ("--range", *RANGE)))
    return shards


def cut(photos: list[bytes], part: tuple[float, float], count: int) -> Iterator[NDArray[np.float64]]:
    """Tiles (TILE, TILE, 3) of 0 to 255 at random places: means of REDUCED x REDUCED pixels, so they have more than 8 bits."""
    random = np.random.default_rng(0)
    for number, content in enumerate(photos):
        photo = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)
        longer = int(np.argmax(photo.shape[:2]))
        begin, end = (round(share * photo.shape[longer]) for share in part)
        photo = photo.take(range(begin, end), longer)
        side = TILE * REDUCED
        for _ in range(len(range(number, count, len(photos)))):
            top, left = (random.integers(0, length - side + 1) for length in photo.shape[:2])
            yield photo[top : top + side, left : left + side].reshape(TILE, REDUCED, TILE, REDUCED, 3).mean((1, 3))


def bands(tile_HWC: NDArray[np.float64]) -> NDArray[np.uint16]:
    """(H, W, 13) of 12 bits, as a satellite's: colours, brightness, edges, blurs, local contrast, differences and ratios of colours."""
    red, green, blue = np.moveaxis(tile_HWC / 255, -1, 0)
    grey = (red + green + blue) / 3
    down, across = (ndimage.sobel(grey, axis) / 4 for axis in (0, 1))
    blurs = [ndimage.gaussian_filter(grey, sigma) for sigma in (1, 3)]
    contrast = np.sqrt(np.maximum(ndimage.uniform_filter(grey**2, 5) - ndimage.uniform_filter(grey, 5) ** 2, 0))
    total = red + green + blue + 0.05
    planes = [red, green, blue, grey, 0.5 + down / 2, 0.5 + across / 2, np.hypot(down, across), *blurs, 2 * contrast,
              0.5 + (red - green) / 2, 0.5 + (blue - green) / 2, red / total]  # fmt: skip
    return (np.stack(planes, -1) * 4095).round().clip(0, 4095).astype(np.uint16)


if __name__ == "__main__":
    main()
