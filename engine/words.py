"""Numbers as a person says them."""


def duration(number: float) -> str:
    """ "3 min 20 s", of seconds; the two largest units."""
    rest, words = round(number), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        words += [f"{count} {unit}"] if count else []
    return " ".join(words[:2]) or "0 s"


def count(number: float) -> str:
    """ "1.7 G", "310 M": three digits and a prefix, to be followed by a unit."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {prefix}"
    return f"{number:.3g} "


def memory(number: float) -> str:
    """ "1.2 GiB", "310 MiB", of bytes."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
