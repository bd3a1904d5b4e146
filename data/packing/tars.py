"""What is in a tar that somebody wrote for webdataset: samples, where their images lie, and everything that is wrong.

Members are grouped as webdataset does: the key of a member is its path up to the first dot of the base name, and consecutive
members of one key are a sample. Nothing is ever extracted, so names lead nowhere.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.fetch import is_address
from mimetic.data.packing.items import EXTENSIONS, LARGEST
from mimetic.data.packing.workers import Tally
from mimetic.engine.errors import DataError

PACKED = {b"\x1f\x8b": ("gzip", "gunzip"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"), b"BZh": ("bzip2", "bunzip2"),
          b"\xfd7zXZ": ("xz", "unxz")}  # fmt: skip
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as in webdataset 1.0
_META = re.compile(r"__[^/]*__($|/)")
_LABEL_BYTES = 1 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a tar: key, its image member's name, extension, offset and size, and the label as it is written."""

    key: str
    image: str
    extension: str
    offset: int
    size: int
    label: str | None


@dataclass
class Scan:
    """A tar that was looked through.

    Attributes:
        samples: in their order.
        rejected: names of members or keys, and why they are no samples.
        others: members that belong to no sample: folders, links, names without an extension.
        bytes: of the whole file.
        sha256: of the whole file, in hex; empty unless asked for.
        damage: where and how the tar breaks, or nothing.
        lost: how many samples lie behind the damage, judged by the bytes.
    """

    samples: list[Sample] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    others: int = 0
    bytes: int = 0
    sha256: str = ""
    damage: str = ""
    lost: int = 0


def is_packed_tar(path: Path) -> bool:
    """Whether a file's name says that it is a compressed tar."""
    return bool(re.search(r"\.(tar\.(gz|bz2|zst|xz)|tgz)$", path.name.lower()))


def local_file(place: str, size: int | None = None, sha256: str | None = None) -> Path:
    """A shard's file; one at an address is fetched into the cache.

    Raises:
        DataError: it cannot be fetched.
    """
    return ShardCache(cache_folder()).fetched(place, size, sha256) if is_address(place) else Path(place)


def scan(path: Path, name: str, tally: Tally, *, hashed: bool = True) -> Scan:
    """Looks through a tar once.

    Args:
        path: the local file.
        name: what the file is called to people.
        tally: told of each sample.
        hashed: whether the whole file is read for its sha256.

    Raises:
        DataError: the file cannot be opened, or it is compressed.
    """
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from None
    with file:
        first = os.pread(file.fileno(), 8, 0)
        for magic, (kind, cure) in PACKED.items():
            if first.startswith(magic):
                raise DataError(f"{name} is compressed ({kind}), so that no sample in it can be sought; unpack it: {cure} {name}")
        return _Scanner(file, tally, hashed).run()


class _Scanner:
    def __init__(self, file: io.FileIO, tally: Tally, hashed: bool) -> None:
        self.file, self.tally = file, tally
        self.hash = hashlib.sha256() if hashed else None
        self.hash_end = 0
        self.found = Scan(bytes=os.fstat(file.fileno()).st_size)
        self.key: str | None = None
        self.group: dict[str, tuple[str, int, int]] = {}
        self.twice = ""
        self.keys: set[str] = set()

    def run(self) -> Scan:
        for member in self._members():
            match = _NAME.match(member.name)
            if member.issparse():
                self.found.rejected.append((member.name, "a sparse member, its bytes lie in pieces; write the tar without --sparse"))
                continue
            if not member.isreg() or match is None or _META.match(member.name):
                self.found.others += 1
                continue
            if match[1] != self.key:
                self._end_sample()
                self.key = match[1]
            suffix = match[2].lower()
            if suffix in self.group:
                self.twice = member.name
            self.group.setdefault(suffix, (member.name, member.offset_data, member.size))
        if self.found.damage and self.key is not None and not self.found.damage.endswith(_NO_END):
            self.found.rejected.append((self.key, f"cut off: the tar {self.found.damage}"))
        else:
            self._end_sample()
        if self.found.damage:
            whole = max(1, self.where)
            self.found.lost = max(1, round(len(self.found.samples) * (self.found.bytes - whole) / whole))
        self._hash_to(self.found.bytes)
        self.found.sha256 = self.hash.hexdigest() if self.hash else ""
        return self.found

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Members up to the end mark, or to where the tar breaks."""
        self.where = 0
        try:
            tar = tarfile.TarFile(fileobj=self.file, encoding="utf-8", errors="surrogateescape")
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # else a long tar fills the memory
                if tar.offset <= self.where or member.size < 0:
                    raise tarfile.ReadError("a member of negative size")  # tarfile would go round in circles
                if member.offset_data + member.size > self.found.bytes and not member.issparse():
                    raise tarfile.ReadError(f"{member.name!a} is cut off")
                yield member
                self.where = tar.offset
                self._hash_to(self.where)
            self.where = tar.offset
            self._look_behind()
        except Exception as error:  # whatever tarfile stumbles over
            self._break(" ".join(str(error).split()) or type(error).__name__)

    def _look_behind(self) -> None:
        block = os.pread(self.file.fileno(), tarfile.BLOCKSIZE, self.where)
        if not block:
            self._break(_NO_END)
        elif len(block) < tarfile.BLOCKSIZE or any(block):
            self._break("no tar header there")
        else:
            place = self.where
            while chunk := os.pread(self.file.fileno(), _CHUNK, place):
                if any(chunk.lstrip(b"\0")[:1]):
                    self.where = place + len(chunk) - len(chunk.lstrip(b"\0"))
                    self._break("the tar has ended before, and what follows is read by nobody; were several tars put together?")
                    return
                place += len(chunk)

    def _break(self, how: str) -> None:
        self.found.damage = f"breaks at byte {min(self.where, self.found.bytes):,} of {self.found.bytes:,}: {how}"

    def _end_sample(self) -> None:
        key, group, twice = self.key, self.group, self.twice
        self.key, self.group, self.twice = None, {}, ""
        if key is None:
            return
        kinds = [suffix for suffix in group if f".{suffix}" in EXTENSIONS] or [
            suffix for suffix in group if f".{suffix.rpartition('.')[2]}" in EXTENSIONS]  # fmt: skip
        name, offset, size = group[kinds[0]] if kinds else ("", 0, 0)
        fault = (f"{twice!a} comes twice in it" if twice else f"the key {key!a} comes again" if key in self.keys else
                 f"no image among its members ({' '.join(sorted(group))[:100]})" if not kinds else
                 "the image is empty" if not size else f"{size:,} bytes; the most is {LARGEST:,}" if size > LARGEST else "")  # fmt: skip
        self.keys.add(key)
        if fault:
            self.found.rejected.append((name or key, fault))
        else:
            self.found.samples.append(Sample(key, name, kinds[0].rpartition(".")[2], offset, size, self._label(group)))
        self.tally.add(1, sum(size for _, _, size in group.values()))

    def _label(self, group: dict[str, tuple[str, int, int]]) -> str | None:
        for suffix in ("cls", "json"):
            _, offset, size = group.get(suffix, ("", 0, 0))
            if 0 < size <= _LABEL_BYTES:
                text = os.pread(self.file.fileno(), size, offset).decode("utf-8", "replace").strip()
                if suffix == "cls":
                    return text
                with contextlib.suppress(ValueError, RecursionError):
                    content = json.loads(text)
                    label = content.get("label") if isinstance(content, dict) else None
                    return str(label) if isinstance(label, (str, int)) and not isinstance(label, bool) else None
        return None

    def _hash_to(self, end: int) -> None:
        """Reads on, so that the file goes through memory once."""
        while self.hash and self.hash_end < end:
            chunk = os.pread(self.file.fileno(), min(_CHUNK, end - self.hash_end), self.hash_end)
            if not chunk:
                break
            self.hash.update(chunk)
            self.hash_end += len(chunk)


_NO_END = "it ends there without an end mark"
