"""Wording of messages."""

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


def count_of(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless there is one: 1 shard, 1,280 shards."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def three_digits(number: float) -> str:
    """Three significant digits, never with an exponent for large numbers: 0.959, 12.3, 5,247."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """A duration in a suitable unit: 12 s, 5 min, 3.2 h, 4.1 d, 11,574 d."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 99.5 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86_400
    return f"{days:.1f} d" if days < 99.5 else f"{days:,.0f} d"


def size_of(number: float) -> str:
    """A number of bytes with three digits in decimal units: 884 B, 8.84 kB, 13 MB, 1,200 GB."""
    unit = next((unit for unit, factor in UNITS.items() if number >= 0.9995 * factor), "B")
    scaled = number / UNITS[unit]
    return f"{scaled:,.0f} {unit}" if unit == "B" else f"{three_digits(scaled)} {unit}"
