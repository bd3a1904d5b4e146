"""How fast photographs become shards: `mimetic pack` beside the disk's own rate and beside webdataset's writer in one process.

Run: python benchmarks/pack.py [IMAGES [FOLDER]]     12,000 JPEGs of about 48 KB, in a folder of the disk that is to be measured
"""

import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

ROUNDS = 3
COPIES = 4  # of each picture, with a comment of its own


def make_source(folder: Path, count: int) -> int:
    """JPEGs of 500x375 pixels: two photographs, cut here and there, with noise. Returns their bytes."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    size = 0
    for i in range(count):
        left, top = i % 60, i % 40
        picture = photographs[i % 2].resize((500, 375), box=(left, top, left + 560, top + 380))
        noisy = np.asarray(picture).astype(np.int16) + random.integers(-8, 9, (375, 500, 3), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=84)
        (folder / f"class-{i % 10}").mkdir(parents=True, exist_ok=True)
        for copy in range(COPIES):
            comment = b"\xff\xfe\x00\x03" + bytes([copy])
            file = folder / f"class-{i % 10}/{i:06d}-{copy}.jpg"
            size += file.write_bytes(b"\xff\xd8" + comment + buffer.getvalue()[2:])
    return size


def by_disk(size: int, out: Path) -> None:
    """As many bytes, written and synced."""
    block = os.urandom(1 << 20)
    with out.open("wb", 0) as file:
        for _ in range(size >> 20):
            file.write(block)
        os.fsync(file.fileno())


def by_mimetic(source: Path, out: Path, workers: int) -> None:
    words = [sys.executable, "-m", "mimetic.cli", "pack", source, out, "--workers", workers, "--samples-per-shard", 500]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)


def by_webdataset(source: Path, out: Path) -> None:
    """Files into shards and nothing else: no check, no index, no statistics."""
    out.mkdir()
    files = sorted(source.rglob("*.jpg"))
    with webdataset.ShardWriter(f"{out}/shard-%05d.tar", maxcount=500, verbose=0) as writer:
        for file in files:
            writer.write({"__key__": f"{file.parent.name}/{file.stem}", "jpg": file.read_bytes(), "cls": file.parent.name[-1]})


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of all processors together: the second does not depend on who else uses them."""
    os.sync()
    started, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - started, sum(os.times()[:4]) - before


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 12_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        size = make_source(folder / "source", count // COPIES)
        print(f"{count:,} JPEGs, {size / 1e6:,.0f} MB, {size / count / 1e3:.0f} KB each, in the system's cache; {os.cpu_count()} CPUs")
        ways: dict[str, Callable[[Path], None]] = {
            "disk: write and sync": lambda out: by_disk(size, out),
            "mimetic pack, 2 processes": lambda out: by_mimetic(folder / "source", out, 2),
            "mimetic pack, 1 process": lambda out: by_mimetic(folder / "source", out, 1),
            "webdataset.ShardWriter": lambda out: by_webdataset(folder / "source", out),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        loads: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, work in ways.items():
                out = folder / "out"
                clock, processors = seconds(lambda work=work, out=out: work(out))  # type: ignore[misc]
                rates[way].append(size / 1e6 / clock)
                loads[way].append(size / 1e6 / max(processors, 0.01))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        for way, values in rates.items():
            rate, load = statistics.median(values), statistics.median(loads[way])
            print(f"{way:28} {rate:7.0f} MB/s {rate * 1e6 / (size / count):8.0f} images/s  {load:7.0f} MB per CPU second")
        ours, theirs = rates["mimetic pack, 2 processes"], rates["webdataset.ShardWriter"]
        print(f"ratio to webdataset, median of {ROUNDS} rounds: {statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}")


if __name__ == "__main__":
    main()
