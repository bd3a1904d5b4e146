"""The folder that `pack` writes: whole or not at all, nothing of anybody else's in it, and by one process at a time."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mimetic.engine.errors import DataError, SettingError, disk_is_full

OURS = ("index.json", "samples.npy", "keys.txt", "rejected.tsv", "shard-*.tar")
SIDES = ("train", "val")


@contextmanager
def working_folder(work: Path, out: Path) -> Iterator[None]:
    """The hidden folder beside `out`, for this process alone. Only an interruption leaves it, with the shards that are finished."""
    parents = [folder for folder in out.parents if not folder.exists()]
    keep = False
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                keep = True
                raise SettingError(f"{out} is being packed by another process; wait for it or end it, or give another folder") from None
            try:
                yield
            except KeyboardInterrupt:
                keep = any((work / "done").glob("*.json"))
                raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
            for folder in parents:
                with suppress(OSError):  # not empty: it holds `out`
                    folder.rmdir()


@contextmanager
def in_one_line(out: Path) -> Iterator[None]:
    """Makes one line of what the system says when `out` cannot be written.

    Raises:
        DataError: the disk is full.
        SettingError: anything else.
    """
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise DataError(f"{out}: the disk is full; nothing was left behind: free some space and pack again") from None
        raise SettingError(f"{out} cannot be written ({error.strerror}); give another folder") from None


def put_back(replaced: Path, out: Path) -> None:
    """Undoes the first of two renames when the second did not come."""
    with suppress(OSError):  # whatever the names
        if replaced.exists() and not out.exists():
            replaced.rename(out)


def refuse_to_overwrite(out: Path) -> None:
    """Refuses a folder that holds anything but shards of ours.

    Raises:
        SettingError: the line names what is in the way.
    """
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise SettingError(f"{out} cannot be a folder, {nearest} is a file; give a new folder")
    split = {path for path in (out / side for side in SIDES) if (path / "index.json").exists()}
    foreign = sorted(path.relative_to(out) for folder in (out, *split) for path in folder.glob("*")
                     if path not in split and not any(path.match(name) for name in OURS))  # fmt: skip
    if foreign:
        raise SettingError(f"{out} holds {foreign[0]}, which is no shard: give a new folder, so that nothing of yours is overwritten")
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists() and not split:
        raise SettingError(f"{out} exists and holds no index.json: give a new folder, so that nothing of yours is overwritten")
