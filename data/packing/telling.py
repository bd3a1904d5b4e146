"""What `mimetic pack`, `mimetic index` and `mimetic check` say on the console."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimetic.data.checking import check_shards
from mimetic.data.indexing import index_tars
from mimetic.data.pack import pack
from mimetic.data.packing.items import counted
from mimetic.data.packing.sources import left_out
from mimetic.data.packing.workers import Teller
from mimetic.data.pixelrange import as_typed, pixel_range
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

FEW = 20  # faults that are printed


class PackTeller(Teller):
    """Says at the first call what will happen."""

    def __call__(self, images: int, size: int, all_images: int, all_bytes: int) -> None:
        """See `Teller`."""
        if self.started is None:
            there = f"; {images:,} are there already" if images else ""
            print(f"{all_images:,} inputs, {all_bytes / 1e6:,.1f} MB{there}", flush=True)
        super().__call__(images, size, all_images, all_bytes)


def pack_and_tell(source: Path, out: Path, samples_per_shard: int | None = None, max_bad: float = 0.01, channels: int | None = None,
                  workers: int = 1, **options: Any) -> None:  # fmt: skip
    """`mimetic pack`: says what will happen, how far it is, where the result is, and what to do with it."""
    shards = f"shards of {samples_per_shard:,} images" if samples_per_shard else "shards"
    print(f"packing {source} into {shards} in {out}, {workers} process{'es' if workers > 1 else ''}", flush=True)
    content = pack(source, out, samples_per_shard=samples_per_shard, max_bad=max_bad, channels=channels, workers=workers,
                   progress=PackTeller(), told=_tell, **options)  # fmt: skip
    beside = _why(content["beside"])
    if "val" in content:
        print(_summary(content, out / "train", beside, ""))
        print(_summary(content["val"], out / "val", beside, left_out(content["others"])))
        print(f"check them with `mimetic check {out}/train`, train on --data.index {out}/train")
    else:
        print(f"check them with `mimetic check {out}`, train on --data.index {out}")
        print(_summary(content, out, beside, left_out(content["others"])))


def _tell(line: str) -> None:
    print(line, flush=True)


def _summary(content: dict[str, Any], out: Path, beside: str, others: str) -> str:
    rejected = f", {content['rejected']} unreadable ones listed in {out}/rejected.tsv" if content["rejected"] else ""
    duplicates = f", {content['duplicates']} duplicates left out (see {out}/rejected.tsv)" if content["duplicates"] else ""
    classes = f"{len(content['classes'])} classes" if content["classes"] else f"no labels{beside}"
    shards = counted(len(content["shards"]), "shard")
    return f"{content['samples']:,} images, {classes}, {shards}{rejected}{duplicates}{others}{_clamped(content)}: {out}/index.json"


def _clamped(content: dict[str, Any]) -> str:
    image = content["image"]
    if "range" not in image:
        return ""
    return f", {100 * image['outside']:.3g} % of pixel values outside --range {as_typed(image['range'])} clamped"


def _why(beside: list[str]) -> str:
    if not beside:
        return ""
    one = len(beside) == 1
    who = f"{beside[0]} lies" if one else f"{beside[0]} and {len(beside) - 1:,} more lie"
    return f" ({who} beside the sub-folders; move {'it' if one else 'them'} into one to have classes)"


def index_and_tell(shards: Sequence[str], out: Path | None, workers: int, max_bad: float, channels: int | None,
                   range: Sequence[float] | None) -> None:  # fmt: skip
    """`mimetic index`: the same for tars that exist."""
    print(f"indexing {shards[0]}{f' and {len(shards) - 1} more' if len(shards) > 1 else ''}", flush=True)
    content = index_tars(shards, out, workers=workers, max_bad=max_bad, channels=channels, range=pixel_range(range), progress=Teller(),
                         told=_tell)  # fmt: skip
    folder = content["folder"]
    rejected = f", {content['rejected']} unusable ones listed in {folder}/rejected.tsv" if content["rejected"] else ""
    others = left_out(Counter({"members of no sample": content["others"]})) if content["others"] else ""
    classes = f"{len(content['classes'])} classes" if content["classes"] else "no labels"
    print(f"check them with `mimetic check {folder}`, train on --data.index {folder}")
    found = counted(len(content["shards"]), "shard")
    print(f"{content['samples']:,} images, {classes}, {found}{rejected}{others}{_clamped(content)}: {folder}/index.json")


def check_and_tell(path: str | Path, workers: int, out: Path | None) -> None:
    """`mimetic check`: prints faults, one a line, and whether the shards are sound.

    Raises:
        DataError: they are not.
    """
    print(f"checking {path}: every byte, every row, and every image decoded", flush=True)
    index, faults = check_shards(path, workers=workers, progress=Teller())
    lines = ["\t".join(fault) for fault in faults]
    for line in lines[:FEW]:
        print(line)
    if out:
        try:
            write_atomically(out, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise SettingError(f"--out {out} cannot be written ({error.strerror})") from None
    if faults:
        bad = len({(shard, key) for shard, key, _ in faults if key})
        rest = f"; {FEW} are told, `--out FILE` keeps all" if len(faults) > FEW and not out else f"; all are in {out}" if out else ""
        shards = f"{len({shard for shard, _, _ in faults}):,} of {counted(len(index.shards), 'shard')}"
        raise DataError(f"{path}: {len(faults):,} fault{'s' * (len(faults) > 1)}, in {bad:,} of {len(index):,} images and {shards}{rest}; "
                        "pack or fetch those shards again")  # fmt: skip
    print(f"{path}: sound, {len(index):,} images in {counted(len(index.shards), 'shard')}")
