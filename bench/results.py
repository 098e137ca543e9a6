"""What the benchmarks share in measuring and printing: turns, ratios, tables, goals. It needs no torch."""

import statistics
from collections.abc import Sequence
from typing import TypeVar

Name = TypeVar("Name")


def rotated(names: Sequence[Name], turn: int) -> list[Name]:
    """The competitors in the order of a turn: each goes first in its turn."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios within each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median and, in brackets, minimum and maximum; a single value stands alone."""
    median = f"{statistics.median(values):.4g}"
    return f"{median} ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else median


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*cells: str) -> None:
    """The first two lines of a table."""
    row(*cells)
    row("---", *["---:"] * (len(cells) - 1))


def print_goals(goals: Sequence[tuple[str, str, float, float]]) -> None:
    """A table of (what, `at least` or `at most`, the bound, the measured value)."""
    if not goals:
        return
    print()
    head("goal", "", "measured", "")
    for what, side, bound, found in goals:
        met = found >= bound if side == "at least" else found <= bound
        row(what, f"{side} {bound:g}", f"{found:.4g}", "met" if met else "**not met**")
