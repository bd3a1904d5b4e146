"""Photographs to measure with: the JPEGs of two Debian packages, fetched without installing them, and shards made from them.

They are kept in $XDG_CACHE_HOME/mimetic/wallpapers. Without a Debian mirror, scikit-learn's two photographs have to do.
"""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ("plasma-workspace-wallpapers", "mate-backgrounds")
PATIENCE = 300  # seconds for one command
MEGAPIXELS = (1.8, 5.2)
SMALL, SMALL_BYTES = (500, 375), 48_000


def photographs() -> tuple[list[bytes], str]:
    """JPEG files of 2 to 5 megapixels, and a line that says where they are from."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mimetic" / "wallpapers"
    try:
        if not folder.is_dir():
            _fetch(folder)
        found = [path.read_bytes() for path in sorted(folder.rglob("*.jpg")) if not path.is_symlink()]  # links are other sizes' names
        photos = [content for content in found if MEGAPIXELS[0] < np.prod(Image.open(io.BytesIO(content)).size) / 1e6 < MEGAPIXELS[1]]
        return photos, f"{len(photos)} wallpapers of Debian's {' and '.join(PACKAGES)}"
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no Debian mirror ({' '.join(str(error).split())[:100]})", file=sys.stderr)
        from sklearn.datasets import load_sample_images

        enlarged = [Image.fromarray(image).resize((2560, 1708), Image.Resampling.LANCZOS) for image in load_sample_images().images]
        return [_jpeg(image, 90) for image in enlarged], "scikit-learn's 2 photographs, enlarged: NOT the wallpapers that the goals are for"


def small_ones(photos: list[bytes], count: int) -> list[bytes]:
    """Random large crops at 500x375, at the quality that brings their mean nearest to 48 KB: as ImageNet's are."""
    random, crops = np.random.default_rng(0), []
    for i in range(count):
        photo = Image.open(io.BytesIO(photos[i % len(photos)])).convert("RGB")
        width = min(photo.width, photo.height * SMALL[0] / SMALL[1]) * random.uniform(0.5, 1)
        height = width * SMALL[1] / SMALL[0]
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        crops.append(photo.resize(SMALL, Image.Resampling.LANCZOS, box=box))
    tried = ([_jpeg(crop, quality) for crop in crops] for quality in range(70, 100))
    return min(tried, key=lambda files: abs(np.mean([len(content) for content in files]) - SMALL_BYTES))


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def _fetch(folder: Path) -> None:
    """apt with lists and cache of its own: works without root and changes nothing of the system."""
    print(f"fetching wallpapers (140 MB) into {folder}", flush=True)
    temporary = folder.with_name(".wallpapers.fetching")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in ("lists/partial", "archives/partial"):
        (temporary / name).mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={temporary / 'lists'}", "-o", f"Dir::Cache={temporary}", "-o", "APT::Sandbox::User="]
    for command in (["apt-get", *own, "-q", "update"], ["apt-get", *own, "-q", "download", *PACKAGES]):
        subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=PATIENCE)
    for package in temporary.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(temporary / "unpacked")], check=True, capture_output=True, timeout=PATIENCE)
    (temporary / "unpacked").rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
