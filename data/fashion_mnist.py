"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 1708.07747; MIT licence): 60,000 + 10,000 grey images of 28x28, ten classes.

Looked for in this order: the folder of Debian's package `dataset-fashion-mnist`, the cache, torchvision's downloader, and
Debian's package again, downloaded and unpacked into the cache. No system package is installed.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
from pathlib import Path

from mimetic.engine.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PATIENCE = 120  # seconds for one attempt


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/mimetic/fashion-mnist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mimetic" / "fashion-mnist"


def find_fashion_mnist() -> Path:
    """The folder that holds the four idx files, fetched if need be.

    Raises:
        DataError: nothing worked; the line names the folder to fill.
    """
    cache = cache_folder()
    for folder in (DEBIAN, cache):
        if _complete(folder):
            return folder
    print(f"Fashion-MNIST is not on this machine; fetching it (31 MB) into {cache}", flush=True)
    failures = []
    for fetch in (_by_torchvision, _by_debian):
        temporary = cache.with_name(".fashion-mnist.fetching")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            found = fetch(temporary)
            shutil.rmtree(cache, ignore_errors=True)
            found.rename(cache)
            return cache
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"{fetch.__name__.removeprefix('_by_')}: {' '.join(str(error).split())[:80]}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise DataError(f"Fashion-MNIST cannot be fetched ({'; '.join(failures)}); put {', '.join(FILES)} into {cache}")


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _by_torchvision(folder: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE / 4)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            FashionMNIST(str(folder), download=True)
    finally:
        socket.setdefaulttimeout(patience)
    return _checked(folder / "FashionMNIST" / "raw")


def _by_debian(folder: Path) -> Path:
    """apt with lists and cache of its own inside `folder`: works without root and changes nothing of the system."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}", "-o", "APT::Sandbox::User="]
    for command in (["apt-get", *own, "-q", "update"], ["apt-get", *own, "-q", "download", "dataset-fashion-mnist"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
    package = next(folder.glob("*.deb"), None)
    if package is None:
        raise OSError("apt-get download left no package")
    subprocess.run(["dpkg", "-x", str(package), str(folder / "unpacked")], check=True, capture_output=True, timeout=PATIENCE)
    return _checked(folder / "unpacked" / DEBIAN.relative_to("/"))


def _checked(folder: Path) -> Path:
    if not _complete(folder):
        raise OSError(f"{folder} lacks one of {', '.join(FILES)}")
    return folder
