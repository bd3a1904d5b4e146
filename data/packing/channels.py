"""How many channels the images of a set have, by their headers."""

from collections import Counter
from collections.abc import Sequence

from mimetic.data.decode import channels_of
from mimetic.data.packing.items import Item

LOOK = 256  # images that are asked whether they are pictures or arrays of more channels


def channels_of_most(items: Sequence[Item]) -> int:
    """What most of a few have, if that is an array's own number; else the most that any picture has.

    One coloured picture makes a grey set coloured, wherever it comes; so only grey sets are looked at to their end.
    """
    looked = Counter(channels if channels != 1 else 3 for item in items[:LOOK] if (channels := channels_of_item(item)))
    most = max(looked, key=lambda channels: (looked[channels], channels == 3), default=3)
    return most if most != 3 or any(channels_of_item(item) == 3 for item in items) else 1


def channels_of_item(item: Item) -> int:
    """1 or 3 for a picture, an array's own number, 0 where neither can be read."""
    if item.pixels_HW is not None:
        return 1
    try:
        with item.open() as file:
            return channels_of(file)
    except (OSError, ValueError):
        return 0
