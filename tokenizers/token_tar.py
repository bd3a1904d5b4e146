"""The bytes of a token shard: a tar with a member KEY.tokens.npy for each image, all of them equally long.

A member is an array (views,) of `row_type`. Keys differ in length and arrays do not, so a record is made of whole blocks whose number
the longest key of the tar settles; a key beyond 100 bytes puts a GNU long name before every member. Then the record of the n-th image
is one read at n times the size of a record. What is read bears its key, and each view a CRC-32: damage is met where it is, without
reading whole files first.

Legend: N images of a tar.
"""

import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimetic.engine.errors import DataError

MEMBER = b".tokens.npy"
BLOCK = 512  # of a tar
AGAIN = "give the same `mimetic tokens` again: it writes what is missing or damaged"

Row = np.dtype[Any]


def row_type(grid: tuple[int, int]) -> Row:
    """One view of one image: box (top, left, height, width), flip, the seed of shift and colours, ids, and the CRC-32 of all that."""
    return np.dtype([("box", "<i4", (4,)), ("flip", "?"), ("seed", "<u8"), ("ids", "<u2", grid), ("crc", "<u4")])


class Layout(NamedTuple):
    """Where things lie in a tar.

    Attributes:
        header: bytes before a member's content.
        data: bytes from an image's header to its first view.
        record: bytes from one image's header to the next one's.
    """

    header: int
    data: int
    record: int


def layout_of(keys_N: NDArray[np.bytes_], views: int, row: Row) -> Layout:
    """The layout of a tar of these images."""
    longest = keys_N.dtype.itemsize + len(MEMBER)
    header = BLOCK if longest <= tarfile.LENGTH_NAME else 2 * BLOCK + _in_blocks(longest + 1)
    size = len(_npy_header(views, row))
    return Layout(header, header + size, header + _in_blocks(size + views * row.itemsize))


def tar_of(keys_N: NDArray[np.bytes_], rows_NV: NDArray[Any], layout: Layout) -> bytes:
    """The whole tar; the rows get their CRC-32."""
    npy, itemsize = _npy_header(rows_NV.shape[1], rows_NV.dtype), rows_NV.dtype.itemsize
    bytes_MR = rows_NV.view(np.uint8).reshape(rows_NV.size, itemsize)
    rows_NV["crc"] = np.array([zlib.crc32(row[:-4].data) for row in bytes_MR], np.uint32).reshape(rows_NV.shape)
    size = len(npy) + rows_NV.shape[1] * itemsize
    members = [(_tar_header(key + MEMBER, size, layout.header) + npy + rows_V.tobytes()).ljust(layout.record, b"\0")
               for key, rows_V in zip(keys_N.tolist(), rows_NV, strict=True)]  # fmt: skip
    return b"".join([*members, bytes(2 * BLOCK)])


def read_rows(path: Path, row: Row, data: int, record: int, places: list[int], keys: list[bytes], views: list[int]) -> NDArray[Any]:
    """A row for each image and view, by the image's place in the tar and the view's in the array.

    Raises:
        DataError: the file is gone, or what lies there is damaged or another image's.
    """
    rows, name_at = np.empty(len(places), row), 0 if data < 2 * BLOCK else BLOCK
    try:
        with path.open("rb", buffering=0) as opened:
            for number, (place, key, view) in enumerate(zip(places, keys, views, strict=True)):
                found = os.pread(opened.fileno(), record, place * record)
                content = found[data + view * row.itemsize :][: row.itemsize]
                if not found.startswith(key + MEMBER, name_at) or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
                    raise DataError(f"{path}: the tokens of {key.decode('utf-8', 'replace')} are damaged; {AGAIN}")
                rows[number] = np.frombuffer(content, row)[0]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {AGAIN}") from None
    return rows


def _npy_header(views: int, row: Row) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (views,)})
    return buffer.getvalue()


def _tar_header(name: bytes, size: int, length: int) -> bytes:
    """A member's header of exactly `length` bytes: one block, or a GNU long name filled up with zeros and then the block."""
    member = tarfile.TarInfo(name[: tarfile.LENGTH_NAME].decode("utf-8", "surrogateescape"))
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    if length == BLOCK:
        return header
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, length - 2 * BLOCK
    return long_name.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + name.ljust(length - 2 * BLOCK, b"\0") + header


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
