"""Tokenizers that have a name: fetched once from where they were published, imported, and kept in the user's own folder."""

import fcntl
import os
import time
from pathlib import Path

from mimetic.data.cache import cache_folder
from mimetic.data.fetch import fetch, joined
from mimetic.engine.errors import CheckpointError, DataError, SettingError
from mimetic.engine.words import duration

DALLE = "dalle"
ADDRESS = "https://cdn.openai.com/dall-e"
FILES: dict[str, str | None] = {  # and their sha256, as others measured it: OpenAI published none
    # by a full download on 10 August 2026, with 215,185,363 bytes: github.com/gatheluck/10YearVisualSSL, methods/24_beit/provenance.json
    "encoder.pkl": "96b0f478c2e8d912f745f1bdde186efaac4265d38568a52f33bd40d3a15935d4",
    "decoder.pkl": None,  # draws pictures, and makes no target: what was fetched is told and kept in tokenizer.json
}
PATIENCE = 20.0  # seconds without a byte
TELL = 5.0  # seconds between two lines on how far it is


def tokenizers_folder() -> Path:
    """Where tokenizers with a name are kept: $MIMETIC_HOME/tokenizers, or `tokenizers` beside the cache of shards."""
    home = os.environ.get("MIMETIC_HOME")
    return (Path(home).expanduser() if home else cache_folder().parent) / "tokenizers"


def published_tokenizer(name: str) -> Path:
    """The folder of a tokenizer with a name; what is not there yet is fetched. Processes that ask at the same time wait for the first.

    Raises:
        CheckpointError: it cannot be fetched, or is not what was published; the line says what to put where.
        SettingError: the user's folder cannot be written.
    """
    folder = tokenizers_folder() / name
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{name}.lock").open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not folder.exists():
                _fetch_dalle(folder)
    except OSError as error:
        raise SettingError(f"{folder.parent} cannot be written ({error.strerror or error}); set MIMETIC_HOME to another folder") from None
    return folder


def _fetch_dalle(folder: Path) -> None:
    from mimetic.tokenizers.importing import import_tokenizer  # here, since it needs `files`, which needs this module

    fetched = {name: folder.with_name(f"{folder.name}-{name}") for name in FILES}
    cure = f"download {' and '.join(FILES)} from {ADDRESS} elsewhere, and give `mimetic tokenizer import encoder.pkl {folder}`"
    for name, file in fetched.items():
        if not file.exists():
            _fetch(name, file, cure)
    import_tokenizer(fetched["encoder.pkl"], folder, fetched["decoder.pkl"])
    for file in fetched.values():
        file.unlink()


def _fetch(name: str, file: Path, cure: str) -> None:
    part, wanted, address = file.with_suffix(".part"), FILES[name], joined(ADDRESS, name)
    print(f"fetching {address} (once, into {file.parent})", flush=True)
    try:
        found = fetch(address, part, patience=PATIENCE, progress=_Teller(name))
    except DataError as error:
        raise CheckpointError(f"the tokenizer {DALLE} is not here yet: {error}; or {cure}") from None
    if wanted not in (None, found):
        part.unlink()
        raise CheckpointError(f"{address} has sha256 {found[:12]}..., {wanted[:12]}... was expected: it is not what was published, and "
                              f"was removed. If you trust a copy of your own, {cure}")  # fmt: skip
    print(f"{name}: sha256 {found}{', as expected' if wanted else ', with no published one to compare'}", flush=True)
    part.rename(file)


class _Teller:
    """Says every few seconds how far it is."""

    def __init__(self, name: str) -> None:
        self.name, self.started, self.told, self.first = name, time.monotonic(), time.monotonic(), -1

    def __call__(self, size: int, whole: int | None) -> None:
        now = time.monotonic()
        self.first = size if self.first < 0 else self.first
        if now - self.told < TELL:
            return
        self.told = now
        left = f", {duration((whole - size) * (now - self.started) / max(1, size - self.first))} left" if whole else ""
        print(f"{self.name}: {size / 1e6:.0f} MB{f' of {whole / 1e6:.0f}' if whole else ''}{left}", flush=True)
