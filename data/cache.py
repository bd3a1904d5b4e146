"""Shards from elsewhere on this machine: a bounded folder that all processes of a node share.

Each file is fetched by whoever needs it first, under a lock, while the others wait. The least recently read give way to new ones.
A reader that has one of those open keeps it: on POSIX systems an unlinked file lives until it is closed.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mimetic.data.fetch import fetch, shown
from mimetic.engine.errors import DataError, SettingError, disk_is_full

LIMIT = 100 * 10**9  # bytes; `data.cache_gb` has the same default
OURS = re.compile(r"[0-9a-f]{40}\.(?:tar|(\d+)\.part)")  # whatever else is in the folder is somebody's


def cache_folder() -> Path:
    """Where fetched shards are kept unless `data.cache` says otherwise: $XDG_CACHE_HOME/mimetic/shards."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mimetic" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """Copies of files from elsewhere.

    Attributes:
        folder: of the copies; made when the first one is fetched.
        limit: bytes that they may have together.
    """

    folder: Path
    limit: int = LIMIT

    def file(self, address: str, sha256: str | None) -> Path:
        """Where the copy lies, or will lie: named by its content where that is known, so that no copy is ever out of date."""
        name = sha256 or hashlib.sha256(address.encode()).hexdigest()
        return self.folder / f"{name[:40]}.tar"

    def fetched(self, address: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The local copy of a file, fetched if it is not here.

        Args:
            address: as `mimetic.data.fetch.fetch` takes it.
            size: in bytes, where it is known.
            sha256: in hex, where it is known.

        Raises:
            DataError: it cannot be fetched, or the disk is full.
            SettingError: it is larger than the cache, or the folder cannot be written.
        """
        file = self.file(address, sha256)
        if size is not None and size > self.limit:
            raise SettingError(f"data.cache_gb is {self.limit / 1e9:g}, but {shown(address)} alone has {size / 1e9:.3g} GB; raise it")
        try:
            if not _touched(file):
                with self._part(file, size) as part:
                    if not _touched(file):
                        with self._room(part):
                            fetch(address, part, size, sha256)
                            with part.open("rb") as content:
                                os.fsync(content.fileno())
                            with self._counting():
                                part.rename(file)
        except OSError as error:
            if disk_is_full(error):
                raise DataError(f"{self.folder}: the disk is full; free some space, or give data.cache another folder") from None
            raise SettingError(f"{self.folder} cannot be written ({error.strerror or error}); give data.cache another folder") from None
        return file

    def name_by_content(self, address: str, sha256: str) -> None:
        """Names a copy by its content, once that is known: what lies at the address may change, and is then fetched anew."""
        with self._counting():
            os.replace(self.file(address, None), self.file(address, sha256))

    def holds(self, file: Path) -> bool:
        """Whether a file lies, or lay, here."""
        return file.parent == self.folder

    @contextmanager
    def _part(self, file: Path, size: int | None) -> Iterator[Path]:
        """The unfinished copy, locked. Its name tells how large it is going to be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{size or 0}.part")
        while True:
            with _locked(part) as held:
                if not _is_at(held, part):  # finished or cleared away while we waited
                    continue
                try:
                    yield part
                finally:
                    if _is_at(held, part) and not part.stat().st_size:
                        part.unlink()
                return

    @contextmanager
    def _room(self, part: Path) -> Iterator[None]:
        """Removes the copies that were read longest ago until all that is here and on its way fits.

        No more than what is to come takes the place of; where that is not enough, others are fetching, and what they finish can give
        way. One at a time, whoever takes the lock, goes ahead without waiting, so that all get on and the bound is passed by one file
        at most.
        """
        freed, goes_ahead = 0, False
        with ExitStack() as until_it_is_here:
            while True:
                with self._counting():
                    copies, under_way = self._contents()
                    excess = sum(entry.st_size for _, entry in copies) + sum(under_way.values()) - self.limit
                    for other in [other for other in under_way if other != part and excess > 0]:
                        excess -= _cleared(other) and under_way[other]
                    if excess > 0 and not goes_ahead:
                        with suppress(BlockingIOError):
                            until_it_is_here.enter_context(_locked(self.folder / "ahead", how=fcntl.LOCK_EX | fcntl.LOCK_NB))
                            goes_ahead = True
                    for file, entry in sorted(copies, key=lambda copy: copy[1].st_mtime_ns):
                        if excess > 0 and (goes_ahead or freed < under_way[part]):
                            file.unlink(missing_ok=True)
                            excess -= entry.st_size
                            freed += entry.st_size
                if excess <= 0 or goes_ahead:
                    break
                time.sleep(0.2)
            yield

    def _counting(self) -> AbstractContextManager[Any]:
        """While one process counts what is here, no copy changes its name: a listing may miss it under both."""
        return _locked(self.folder / "evicting")

    def _contents(self) -> tuple[list[tuple[Path, os.stat_result]], dict[Path, int]]:
        copies, under_way = [], {}
        for entry in os.scandir(self.folder):
            if name := OURS.fullmatch(entry.name):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if name[1] is None:
                    copies.append((Path(entry.path), status))
                else:
                    under_way[Path(entry.path)] = max(int(name[1]), status.st_size)
        return copies, under_way


@contextmanager
def _locked(path: Path, mode: str = "ab", how: int = fcntl.LOCK_EX) -> Iterator[Any]:
    """An open file that no other holds. It is unlocked by word: a worker that was forked meanwhile has it open too."""
    with path.open(mode) as held:
        fcntl.flock(held, how)
        try:
            yield held
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)


def _touched(file: Path) -> bool:
    """Whether the file is here; if so, it counts as read just now."""
    try:
        os.utime(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # somebody else's
        return os.access(file, os.R_OK)
    return True


def _is_at(held: BinaryIO, path: Path) -> bool:
    try:
        return os.fstat(held.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _cleared(part: Path) -> bool:
    """Removes an unfinished copy if the process that left it is gone."""
    try:
        with _locked(part, "rb+", fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
            if there := _is_at(held, part):
                part.unlink()
            return there
    except OSError:  # somebody holds it
        return False
