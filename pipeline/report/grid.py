"""Grids of captioned pictures, as PNG."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure

from pipeline.common.files import atomic_write

# inches, all multiples of 0.02, so that cells begin at whole pixels and small pictures keep their hard edges
GAP, GROUP_GAP = 0.12, 0.16
TITLE, TITLE_LINE, HEADING, LINE, PADDING = 0.28, 0.18, 0.26, 0.14, 0.06
CHARACTER, TITLE_CHARACTER = 0.07, 0.1
"""Width of a digit of a caption and of a title, in inches."""


@dataclass(frozen=True)
class Cell:
    picture: np.ndarray
    """uint8 (height, width, 3)"""
    caption: str
    begins_group: bool = False
    """Whether a wider gap separates it from the cell to its left."""


@dataclass(frozen=True)
class Section:
    """Rows of cells below a title and column headings, either of which may be empty."""

    rows: list[list[Cell]]
    title: str = ""
    headings: Sequence[str] = ()


def draw_grid(path: Path, sections: list[Section], side: float, dpi: int = 100) -> None:
    """Draw sections one below the other; every picture fills a square of `side` inches. Captions are wrapped
    to it, and titles to the sheet."""
    pictures, texts = [], []  # with their places, in inches from the top left corner
    width = max(left for section in sections for row in section.rows for left in _lefts(row, side)) + side + GAP
    top = GAP
    for section in sections:
        top += GAP * bool(pictures)
        if section.title:
            title = wrap(section.title, width - 2 * GAP, TITLE_CHARACTER)
            texts.append((GAP, top, title, {"size": 10, "weight": "bold"}))
            top += TITLE + TITLE_LINE * title.count("\n")
        if section.headings:
            places = zip(_lefts(section.rows[0], side), section.headings, strict=True)
            texts += [(left, top, heading, {"size": 9, "color": "#5d6570"}) for left, heading in places]
            top += HEADING
        for row in section.rows:
            captions = [wrap(cell.caption, side) for cell in row]
            for left, cell, caption in zip(_lefts(row, side), row, captions, strict=True):
                pictures.append((left, top, cell.picture))
                texts.append((left, top + side + PADDING, caption, {"size": 8}))
            lines = max(caption.count("\n") for caption in captions) + 1
            top += side + LINE * lines + 3 * PADDING
    figure = Figure((width, top), dpi=dpi)
    for left, upper, picture in pictures:
        axes = figure.add_axes((left / width, 1 - (upper + side) / top, side / width, side / top))
        axes.imshow(_enlarged(picture, side * dpi))
        axes.set_axis_off()
    for left, upper, text, style in texts:
        figure.text(left / width, 1 - upper / top, text, va="top", parse_math=False, **style)
    save_figure(figure, path)


def wrap(text: str, width: float, character: float = CHARACTER) -> str:
    """A text with lines of at most `width` inches, if its characters are as wide as digits on average."""
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, int(width / character)) or [""])


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def save_figure(figure: Figure, target: Path | BinaryIO) -> None:
    """Write a PNG, atomically if it is a file on the disk; the same figure gives the same bytes."""
    options = {"format": "png", "facecolor": figure.get_facecolor(), "metadata": {"Software": None}}
    if not isinstance(target, Path):
        figure.savefig(target, **options)
        return
    with atomic_write(target) as temporary:
        figure.savefig(temporary, **options)


def _lefts(row: list[Cell], side: float) -> Iterator[float]:
    """The left edge of each cell."""
    left = GAP
    for cell in row:
        left += GROUP_GAP * cell.begins_group
        yield left
        left += side + GAP


def _enlarged(picture: np.ndarray, pixels: float) -> np.ndarray:
    """Repeat pixels until the picture is at least as large as its cell: matplotlib would blur small ones."""
    times = -(-round(pixels) // max(picture.shape[:2]))
    return picture.repeat(times, 0).repeat(times, 1)
