"""Lists of images: .csv, .tsv and .jsonl, with a path and perhaps a label and a key for each."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimetic.data.packing.items import Item, as_text, file_item, key_maker
from mimetic.data.packing.labels import number_labels
from mimetic.engine.errors import DataError

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson")
PATH_NAMES = ("path", "image", "file", "filename")


def manifest_items(manifest: Path) -> tuple[list[Item], list[str]]:
    """The images that a list names, in its order, and the class names; paths are relative to the list's folder.

    A line that names no file, or one that is not there, is an item with a fault: it is rejected, and counted.

    Raises:
        DataError: no column of paths, or the list itself cannot be read.
    """
    items, labels = [], []
    new_key, asked = key_maker(), set()
    for number, row in _rows(manifest):
        where, path = f"{manifest}:{number}", next((row[name] for name in PATH_NAMES if row.get(name)), None)
        labels.append(str(row["label"]) if row.get("label") not in (None, "") else None)
        if not isinstance(path, str):
            items.append(Item("", "", where, "", fault=row.get("fault") or f"no {PATH_NAMES[0]} in this line"))
            continue
        key = str(row["key"]) if row.get("key") not in (None, "") else ""
        item = file_item(new_key(key or os.path.splitext(path)[0]), os.path.join(manifest.parent, path), as_text(path))
        if key and key in asked:
            item = replace(item, fault=item.fault or f"the key {key} comes again")
        asked.add(key)
        items.append(item)
    numbers, classes = number_labels(labels, str(manifest))
    return [replace(item, label=number) for item, number in zip(items, numbers.tolist(), strict=True)], classes


def _rows(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines, and what they hold."""
    kind = manifest.suffix.lower()
    try:
        with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _json_rows(manifest, file) if kind in (".jsonl", ".ndjson") else _table_rows(manifest, file, kind)
    except OSError as error:
        raise DataError(f"{manifest}: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"{manifest} is no table: {error}") from None


def _table_rows(manifest: Path, file: Any, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    table = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
    _refuse_without_path(manifest, [name.strip() for name in table.fieldnames or []])
    table.fieldnames = [name.strip() for name in table.fieldnames or []]
    for row in table:
        yield table.line_num, {name: text.strip() for name, text in row.items() if isinstance(text, str)}


def _json_rows(manifest: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    first = True
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fault = "" if isinstance(row, dict) else "no JSON object"
        except (ValueError, RecursionError) as error:
            fault = f"no JSON ({error})"
        if not fault and first:
            _refuse_without_path(manifest, list(row))
            first = False
        yield number, {"fault": fault} if fault else row


def _refuse_without_path(manifest: Path, names: list[str]) -> None:
    if not set(names) & set(PATH_NAMES):
        told = ", ".join(as_text(name) for name in names[:8]) or "nothing"
        raise DataError(f"{manifest} has no column of paths: found {told[:200]}; name it {' or '.join(PATH_NAMES)}")
