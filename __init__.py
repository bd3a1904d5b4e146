"""mimetic: masked image modeling on your own images, from shards to an exported backbone.

The names below are the public surface; each is a door to the module that does the work, opened on the first call, so that
`import mimetic` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mimetic.backbones.contract import Backbone
    from mimetic.data.stream import ShardStream
    from mimetic.tokenizers.contract import ImageTokenizer

__version__ = "0.1.0"
__all__ = ["create_backbone", "list_backbones", "load_backbone", "open_shards", "open_tokenizer"]


def create_backbone(name: str, num_classes: int = 0, image_size: "int | Sequence[int] | None" = None, in_channels: int = 3,
                    **overrides: Any) -> "Backbone":  # fmt: skip
    """A backbone of the catalog with fresh weights; see `mimetic.backbones.catalog.create_backbone`."""
    from mimetic.backbones.catalog import create_backbone

    return create_backbone(name, num_classes, image_size, in_channels, **overrides)


def list_backbones() -> list[str]:
    """The names that `create_backbone` knows; they are timm's."""
    from mimetic.backbones.catalog import list_backbones

    return list_backbones()


def load_backbone(path: "str | Path", image_size: "int | Sequence[int] | None" = None, in_channels: int | None = None) -> "Backbone":
    """The backbone of an exported folder or a finished run, fitted to another image size or channels where asked.

    See `mimetic.backbones.files.load_backbone`.
    """
    from mimetic.backbones.files import load_backbone

    return load_backbone(path, image_size, in_channels)


def open_tokenizer(path_or_name: "str | Path", precision: str = "fp32") -> "ImageTokenizer":
    """A frozen image tokenizer from its folder or its run, or "dalle"; see `mimetic.tokenizers.files.open_tokenizer`."""
    from mimetic.tokenizers.files import open_tokenizer

    return open_tokenizer(path_or_name, precision)


def open_shards(index: "str | Path", batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0, seed: int = 0,
                epoch: int = 0, shuffle: bool = True, tail: str = "pad") -> "ShardStream":  # fmt: skip
    """Batches of decoded images (dicts with `image`, `label`, `keys`, `valid`); see `mimetic.data.stream.ShardStream`.

    `index` is an `index.json`, the folder that holds it, the address of either (http, https, s3, gs, hf), or a pattern of tars.
    """
    from mimetic.data.opening import open_set
    from mimetic.data.stream import ShardStream

    return ShardStream(open_set(index), batch_size, rank=rank, world=world, workers=workers, seed=seed, epoch=epoch,
                       shuffle=shuffle, tail=tail)  # fmt: skip
