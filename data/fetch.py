"""One file from where it lives to this machine: retried, gone on with where it broke off, its hash checked.

http and https are read by Python itself, s3, gs and hf through fsspec (whose http reader takes a server's error 500 for "not found",
and a short answer for a whole one).
"""

import hashlib
import http.client
import os
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mimetic.engine.errors import DataError, disk_is_full

CHUNK = 1 << 20
STALL = 30.0  # seconds without a byte, after which a connection counts as lost
PATIENCE = 300.0  # seconds without a byte, over all tries, after which we give up
TELL = 5.0  # seconds without a byte, after which we say what we are waiting for
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries; the last one repeats
TRY_AGAIN = (408, 425, 429)  # of the 4xx answers, those that say "later"
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}


def is_address(name: str) -> bool:
    """Whether a name is an address rather than a path."""
    return "://" in name


def joined(address: str, name: str) -> str:
    """The address of a file below another address, whose query (a signature, say) it shares."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def parent(address: str) -> str:
    """The address of the folder that holds a file."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(path=parts.path.rpartition("/")[0]).geturl()


def shown(address: str) -> str:
    """An address without its query, which may be a secret."""
    return address.partition("?")[0] if is_address(address) else address


def fetch(address: str, part: Path, size: int | None = None, sha256: str | None = None, patience: float | None = None,
          progress: Callable[[int, int | None], None] = lambda *numbers: None) -> str:  # fmt: skip
    """Brings a file to `part`, going on with the bytes that are there.

    Args:
        address: http://, https://, s3://, gs://, hf:// or another that fsspec knows.
        part: where to; the caller renames it when all is well.
        size: in bytes, where it is known.
        sha256: in hex, where it is known. A file of another hash is fetched once more, then refused.
        patience: seconds without a byte after which it is given up; PATIENCE if left out.
        progress: called with the bytes that are here, and of how many (None where that is not known).

    Returns:
        The sha256 of the whole.

    Raises:
        DataError: it is not there, no byte came for so long, it is of another hash, or the disk is full.
    """
    for last in (False, True):
        try:
            found = _fetched(address, part, size, PATIENCE if patience is None else patience, progress)
        except OSError as error:
            if disk_is_full(error):
                os.truncate(part, 0)
                raise DataError(f"{part.parent}: the disk is full; free some space, or give data.cache another folder") from None
            raise
        if sha256 in (None, found):
            return found
        os.truncate(part, 0)  # not unlinked: whoever waits for it holds a lock on this very file
        if last:
            raise DataError(f"{shown(address)}: sha256 {found[:12]}..., the index says {str(sha256)[:12]}..., fetched twice; it has "
                            "changed or is damaged where it lies: index it again, or put the right file there")  # fmt: skip
    raise AssertionError


def _fetched(address: str, part: Path, size: int | None, patience: float, progress: Callable[[int, int | None], None]) -> str:
    digest = hashlib.sha256()
    with part.open("ab+") as file:
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        alive, tries, told, most = time.monotonic(), 0, False, file.tell()
        while size is None or file.tell() < size:
            began = file.tell()
            try:
                with _opened(address, began) as (stream, begin, total):
                    if begin != began:  # the server sends everything, whatever it was asked for
                        file.truncate(0)
                        file.seek(0)
                        digest = hashlib.sha256()
                    if None not in (size, total) and total != size:
                        raise DataError(f"{shown(address)} has {total:,} bytes, the index says {size:,}; index it again, or put the right "
                                        "file there")  # fmt: skip
                    while chunk := _read(stream):
                        file.write(chunk)
                        digest.update(chunk)
                        progress(file.tell(), size or total)
                        if size is not None and file.tell() > size:
                            raise DataError(f"{shown(address)} is longer than the {size:,} bytes that the index says; index it again")
                        if file.tell() > most:  # more than there was; what comes again proves nothing
                            alive, tries, told, most = time.monotonic(), 0, False, file.tell()
                file.flush()
                whole = total if size is None else size
                if whole is None or file.tell() >= whole:
                    break
                raise ConnectionError(f"it ended after {file.tell():,} of {whole:,} bytes")
            except _LostError as error:
                lost = error.args[0]
            except ConnectionError as error:
                lost = str(error)
            waited = time.monotonic() - alive
            if waited > patience:
                raise DataError(f"{shown(address)} cannot be fetched: no byte for {patience:.0f} s ({lost}); see to the address and the "
                                "network, and give the same command: what has come is kept")  # fmt: skip
            if waited > TELL and not told:
                print(f"waiting up to {patience:.0f} s for {shown(address)} ({lost})", flush=True)
                told = True
            time.sleep(WAITS[min(tries, len(WAITS) - 1)])
            tries += 1
        file.flush()
    return digest.hexdigest()


class _LostError(Exception):
    """A try failed in a way that may pass."""


def _read(stream: IO[bytes]) -> bytes:
    try:  # read1 gives what has come; read would wait for all of a chunk, and lose it with the connection
        return getattr(stream, "read1", stream.read)(CHUNK)
    except Exception as error:  # each file system has exceptions of its own
        raise _LostError(_words(error)) from None


@contextmanager
def _opened(address: str, begin: int) -> Iterator[tuple[IO[bytes], int, int | None]]:
    """The bytes from `begin` on; or, if they cannot be had, from 0 on; where it begins, and the size of the whole if it is told."""
    try:
        opened = _by_http(address, begin) if address.startswith(("http://", "https://")) else _by_fsspec(address, begin)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{shown(address)}: there is no such file; correct the address, or index the shards again") from None
    except PermissionError as error:
        raise DataError(f"{shown(address)}: access denied ({_words(error)}); see to your credentials") from None
    except Exception as error:
        raise _LostError(_words(error)) from None
    with opened[0]:
        yield opened


def _by_http(address: str, begin: int) -> tuple[Any, int, int | None]:
    try:
        headers = {"User-Agent": "mimetic"} | ({"Range": f"bytes={begin}-"} if begin else {})
        request = urllib.request.Request(_quoted(address), headers=headers)
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=STALL)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing after `begin`: what is here is not the beginning of what is there
            return _by_http(address, 0)
        if 400 <= error.code < 500 and error.code not in TRY_AGAIN:
            told = f"{shown(address)}: the answer is {error.code} {error.reason}"
            raise DataError(f"{told}; correct the address or see to your access") from None
        raise
    except (ValueError, http.client.InvalidURL) as error:
        raise DataError(f"{shown(address)} is no address ({_words(error)}); correct it") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError) or error.reason == "no host given":
            raise DataError(f"{shown(address)}: {_words(error)}; correct the address, or see to the certificate") from None
        raise
    left = answer.headers.get("Content-Length")
    if answer.status != 206:
        begin = 0
    return answer, begin, begin + int(left) if left and left.isdecimal() else None


def _quoted(address: str) -> str:
    """With spaces and letters beyond ASCII as an address may have them."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(path=urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~"),
                          query=urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")).geturl()  # fmt: skip


def _by_fsspec(address: str, begin: int) -> tuple[Any, int, int | None]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address, skip_instance_cache=True)  # kept ones do not survive a fork
    except (ImportError, ValueError) as error:
        scheme = address.partition("://")[0]
        cure = f"pip install {EXTRAS[scheme]}" if scheme in EXTRAS else f"known are http, https, {', '.join(EXTRAS)}"
        raise DataError(f"{shown(address)}: {scheme}:// cannot be read ({_words(error)}); {cure}") from None
    file = system.open(path, "rb")
    if begin:
        file.seek(begin)
    return file, begin, file.size


def spool(command: str, part: Path) -> None:
    """Writes what a shell command prints to `part`: webdataset's `pipe:`, for commands that the user has typed.

    Raises:
        DataError: the command failed; its last line is given.
    """
    with part.open("wb") as file, tempfile.TemporaryFile() as errors:
        code = subprocess.run(command, shell=True, stdout=file, stderr=errors, check=False).returncode
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines()
    if code:
        os.truncate(part, 0)
        raise DataError(f"pipe:{command} ended with code {code} ({said[-1] if said else 'it said nothing'})")


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split())[:120] or type(error).__name__
