"""`mimetic models`: what our code counts beside what the papers print."""

import fnmatch
import itertools

import torch

from mimetic.backbones.catalog import CATALOG, Entry, create_backbone
from mimetic.backbones.counting import Count, count
from mimetic.engine.config import did_you_mean
from mimetic.engine.errors import SettingError

CLASSES = 1000
HEADER = f"{'':36}{'params, millions':^27}{'multiply-adds, billions':^29}{'top-1, %':>9}\n" + (
    f"{'name':36}{'counted':>9}{'paper':>9}{'differs':>9}{'counted':>11}{'paper':>9}{'differs':>9}{'paper':>9}"
)


def print_models(pattern: str = "*") -> None:
    """Prints the table line by line as it counts.

    Args:
        pattern: names to show, with * and ? as in a shell; a plain word shows what contains it.

    Raises:
        SettingError: nothing bears such a name.
    """
    names = [name for name in CATALOG if fnmatch.fnmatch(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")]
    if not names:
        raise SettingError(f"no backbone is called {pattern}{did_you_mean(pattern, CATALOG)}; `mimetic models` lists them all")
    print(f"{len(names)} backbones at {CLASSES} classes, counted from our code (about {0.3 * len(names):.0f} s); difference from the paper "
          "in percent, papers round\n" + HEADER, flush=True)  # fmt: skip
    for paper, members in itertools.groupby(names, lambda name: CATALOG[name].family.paper):
        print(f"\n{paper}", flush=True)
        for name in members:
            print(row(name, CATALOG[name], counted(name)), flush=True)
    print('\nnext: mimetic.create_backbone("NAME"), or backbone.name in a recipe; any other net of timm\'s is timm:NAME')


def counted(name: str) -> Count:
    """Parameters and multiply-adds of a backbone of the catalog with ImageNet's classes."""
    with torch.device("meta"):
        backbone = create_backbone(name, CLASSES)
    return count(backbone, backbone.image_size)


def row(name: str, entry: Entry, found: Count) -> str:
    """One line of the table."""
    millions, billions, published = found.parameters / 1e6, found.macs / 1e9, entry.published
    return (
        f"{name:36}{millions:9.2f}{_shown(published.params_m)}{_difference(millions, published.params_m)}"
        f"{billions:11.2f}{_shown(published.gmacs)}{_difference(billions, published.gmacs)}{_shown(published.top1)}"
    )


def _shown(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:g}':>9}"


def _difference(counted: float, published: float | None) -> str:
    return f"{'-' if published is None else f'{100 * (counted / published - 1):+.1f}':>9}"
