"""One shard from its items: the tar, and an account of it that a later start can go on from."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimetic.data.decode import decode, silence_pillow, whole
from mimetic.data.index import ROW, UNLABELLED
from mimetic.data.packing.items import Item, as_line
from mimetic.data.packing.moments import Moments, pixels_to_measure
from mimetic.data.packing.reencode import Encoding
from mimetic.data.packing.structure import is_whole
from mimetic.data.packing.workers import Tally
from mimetic.data.packing.writing import Part
from mimetic.data.pixelrange import Range
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Shard:
    """What goes into a shard.

    Attributes:
        tar: the file to write.
        account: the file that says, when the tar is whole, what is in it.
        items: in their order.
        measured: places of the items whose pixels count for means and deviations.
        channels: of every image.
        encoding: of images.
        allowed: so many images of the whole set may be bad.
        range: the pixel values that become 0 and 1; then every image is decoded and measured.
    """

    tar: Path
    account: Path
    items: list[Item]
    measured: frozenset[int]
    channels: int
    encoding: Encoding
    allowed: int
    range: Range | None = None


_BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def tar_header(name: str, size: int) -> bytes:
    """tarfile's own header; of plain names, which are nearly all, in a tenth of the time."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii():
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    header = bytearray(_BLANK)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


class TarWriter:
    """A plain tar, hashed as it is written; `offset` is its length so far, `hash` its sha256."""

    def __init__(self, path: Path) -> None:
        self.file = io.BufferedWriter(io.FileIO(path, "w"), _BUFFER)
        self.hash = hashlib.sha256()
        self.offset = 0

    def add(self, name: str, content: bytes) -> int:
        """Writes a member; returns where its content begins."""
        self._write(tar_header(name, len(content)))
        begin = self.offset
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return begin

    def close(self) -> None:
        """Writes the end mark; the file is on the disk when this returns."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.offset % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.hash.update(content)
        self.offset += len(content)


def write_shard(shard: Shard, tally: Tally) -> None:
    """Writes a shard's tar and then its account; without an image in it, the account alone.

    Raises:
        DataError: more bad images than allowed, by the account of all processes.
        OSError: the disk is full, or cannot be written.
    """
    silence_pillow()
    writer = TarWriter(shard.tar)
    rows, keys, rejected, moments = [], [], [], Moments(shard.channels)
    try:
        for place, item in enumerate(shard.items):
            try:
                content, extension = _read(item, shard, moments if place in shard.measured else None)
            except (OSError, ValueError) as error:
                reason = " ".join((getattr(error, "strerror", None) or str(error) or "unreadable").split())
                rejected.append((as_line(item.path), as_line(reason)))
                bad = tally.add_bad(item.size, shard.allowed)
                if bad > shard.allowed:
                    raise too_many(bad, shard.allowed, *rejected[-1]) from None
                continue
            rows.append((writer.add(f"{item.key}.{extension}", content), len(content), item.label))
            keys.append(item.key)
            if item.label != UNLABELLED:
                writer.add(f"{item.key}.cls", str(item.label).encode())
            tally.add(1, item.size)
        writer.close()
    except BaseException:
        writer.file.raw.close()  # what is buffered would fail again on a full disk
        raise
    if not rows:
        shard.tar.unlink()
    write_atomically(shard.account, json.dumps({
        "bytes": writer.offset, "sha256": writer.hash.hexdigest(), "rows": rows, "keys": keys, "rejected": rejected,
        "moments": dataclasses.asdict(moments)}))  # fmt: skip


def too_many(bad: int, allowed: int, path: str, reason: str) -> DataError:
    """What to say of more unreadable images than are tolerated, of which this is the last."""
    return DataError(f"{bad} unreadable images, {allowed} are tolerated; the last: {path} ({reason}); mend them or raise --max-bad")


def _read(item: Item, shard: Shard, moments: Moments | None) -> tuple[bytes, str]:
    """An image's bytes, as they are packed, and their extension; whole, as far as its structure tells, else decoded."""
    content, extension = item.read(), item.extension
    channels = shard.channels
    if not content:
        raise ValueError("an empty file")
    if shard.encoding.changes:
        content, extension = shard.encoding.apply(content, extension, channels)
    if moments is not None and shard.range is not None:
        moments.add_deep(whole(content, channels, deep=True), shard.range)
    elif moments is not None and item.pixels_HW is not None and channels == 1:
        moments.add(item.pixels_HW[None])
    elif moments is not None:
        moments.add(pixels_to_measure(content, channels))
    elif channels not in (1, 3) or not is_whole(content):
        decode(content, channels)
    return content, extension


def read_account(shard: Shard) -> dict[str, Any] | None:
    """The account of a shard that is finished; None if it is not."""
    try:
        account = json.loads(shard.account.read_bytes())
        return account if not account["rows"] or shard.tar.stat().st_size == account["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def part_of(shard: Shard, account: dict[str, Any]) -> Part:
    """A finished shard's share of the index."""
    return make_part(shard.tar.name, account["bytes"], account["sha256"], account["rows"], [key.encode() for key in account["keys"]])


def make_part(name: str, size: int, sha256: str, rows: list[tuple[int, int, int]], keys: list[bytes]) -> Part:
    """A share of an index from (offset, size, label) and the key of each sample."""
    begins = np.cumsum([0, *(len(key) + 1 for key in keys)])[:-1].tolist()
    table = np.array([(*row, begin) for row, begin in zip(rows, begins, strict=True)], ROW)
    return Part(name, size, sha256, table, b"".join(key + b"\n" for key in keys))
