"""Errors that a user can cause and cure.

Each carries one line that names the file or setting, both numbers where there are two, and the cure. Entry points print
that line without a traceback and exit with code 2; everything else is a bug and keeps its traceback.
"""

import errno
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MimeticError(Exception):
    """Base of every error that the user can mend.

    Args:
        line: what is said.
        together: every process of the run raises it at the same moment, so that one of them speaks for all.
    """

    def __init__(self, line: str, *, together: bool = False) -> None:
        super().__init__(line)
        self.together = together


class SettingError(MimeticError):
    """A setting is unknown, misspelt, or contradicts another one."""


class DataError(MimeticError):
    """A file or folder of images, shards or an index is missing, empty or damaged."""


class CheckpointError(MimeticError):
    """A checkpoint, tokenizer or exported backbone is missing, damaged, or made by something else."""


class LaunchError(MimeticError):
    """The processes that were started do not agree with each other or with the launcher."""


def disk_is_full(error: Exception) -> bool:
    """Whether a write failed for want of space; torch, safetensors and numpy raise kinds of their own for that."""
    words = str(error).lower()
    known = ("no space left", "storagefull", "code: 28", "disk quota", "file too large", "failed writing file", "unexpected pos")
    short_write = re.fullmatch(r"\d+ requested and \d+ written", words)  # numpy's, without a number
    return getattr(error, "errno", None) in DISK_FULL or any(word in words for word in known) or bool(short_write)
