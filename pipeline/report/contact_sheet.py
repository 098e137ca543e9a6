"""Look at the recipe: an image, its views with their parameters in words, and its group after mixing."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.batches.batch import Renderer, mixed
from pipeline.batches.plan import Item
from pipeline.common.errors import UsageError
from pipeline.common.files import atomic_write
from pipeline.config.policies import INCREASING_OPS, op_argument
from pipeline.config.schema import Recipe
from pipeline.shards.index import Index
from pipeline.views.draw import ViewParams, draw_groups, draw_mix, draw_view
from pipeline.views.ops import apply_op
from pipeline.views.render import center_view, render

COLUMNS = 4
LEVELS = (2.5, 5.0, 7.5, 10.0)

Cell = tuple[np.ndarray, str]
"""A picture, uint8 (height, width, 3), and its caption."""


def words(params: ViewParams) -> str:
    """A view's parameters as lines of text: crop, flip, every op with its argument, erased box."""
    left, top, width, height = params.crop
    lines = [f"crop {width} x {height} at {left}, {top}" + (", flipped" if params.flip else "")]
    lines += [words_of_op(name, argument) for name, argument in params.ops] or ["no op"]
    if params.erase:
        left, top, width, height = params.erase
        lines.append(f"erased {width} x {height} at {left}, {top}")
    return "\n".join(lines)


def words_of_op(name: str, argument: float | None) -> str:
    kind = name.removesuffix("Increasing").removesuffix("Original").removesuffix("Rel")
    match kind:
        case "Rotate":
            return f"Rotate {argument:+.1f} degrees"
        case "Posterize":
            return f"Posterize, {argument:.0f} of 8 bits"
        case "Solarize":
            return f"Solarize from {argument:.0f}"
        case "SolarizeAdd":
            return f"SolarizeAdd {argument:.0f}"
        case "TranslateX" | "TranslateY":
            return f"{kind} {argument:+.1%}"
        case "ShearX" | "ShearY":
            return f"{kind} {argument:+.3f}"
    return kind if argument is None else f"{kind} x {argument:.3f}"


def find_sample(index: Index, key: str) -> tuple[int, int]:
    """Shard and position of the sample with a key.

    Raises:
        UsageError: there is none.
    """
    for shard in range(len(index.names)):
        found = np.flatnonzero(index.rows(shard)["key"] == key.encode())
        if len(found):
            return shard, int(found[0])
    example = index.rows(0)["key"][0].decode()
    raise UsageError(
        f"--key {key}", expected=f"a sample's key in {index.path}, for example {example}", found="no such key"
    )


def sample_cells(index: Index, recipe: Recipe, shard: int, position: int, views: list[int]) -> list[Cell]:
    """The original, and each of its views with its parameters in words."""
    row, image = index.rows(shard)[position], index.image(shard, position)
    height, width = image.shape[:2]
    title = f"{_shortened(index.classes[row['label']])}, {width} x {height}\n(whole, its centre shown)"
    cells = [(center_view(image, recipe.size, 1.0).transpose(1, 2, 0), title)]
    for view in views:
        params = draw_view(recipe, row["key"].decode(), view, width, height)
        cells.append((render(image, params, recipe).transpose(1, 2, 0), f"view {view}: {words(params)}"))
    return cells


def group_cells(
    index: Index, recipe: Recipe, shard: int, position: int, view: int, count: int
) -> tuple[str, list[Cell]]:
    """The sample's group in one view, after mixing: a heading, and the first few members, it before all."""
    groups = draw_groups(recipe, index.names[shard], view // recipe.block, int(index.samples[shard]))
    number = next(n for n, members in enumerate(groups) if position in members)
    members = groups[number]
    mix = draw_mix(recipe, index.names[shard], number, view, len(members))
    rendered = Renderer(index, recipe).render([Item(shard, number, view)])
    pictures = mixed(rendered).round().byte().permute(0, 2, 3, 1).numpy()
    names = [_shortened(index.classes[label]) for label in rendered.labels[0, : len(members)]]
    first = int(np.flatnonzero(members == position)[0])
    slots = [first, *(slot for slot in range(len(members)) if slot != first)][:count]
    cells = []
    for slot in slots:
        partner = int(mix.partner[slot])
        caption = names[slot]
        if mix.method != "none" and partner != slot:
            caption = f"{mix.lam:.2f} {names[slot]}\n{1 - mix.lam:.2f} {names[partner]}"
        cells.append((pictures[slot], caption))
    how = "not mixed" if mix.method == "none" else f"{mix.method}, lambda {mix.lam:.3f}"
    if mix.method == "cutmix":
        how += f", box {mix.box[2]} x {mix.box[3]} at {mix.box[0]}, {mix.box[1]}"
    shown = f", {len(cells)} shown" if len(cells) < len(members) else ""
    return f"Group {number} of {index.names[shard]} in view {view}: {how}; {len(members)} members{shown}", cells


def op_cells(index: Index, recipe: Recipe, shard: int, position: int) -> list[Cell]:
    """The picture, and it under every op of RandAugment's increasing set: one that takes an argument at
    rising magnitudes, signs in turn."""
    picture = center_view(index.image(shard, position), recipe.size, 1.0).transpose(1, 2, 0).copy()
    red, green, blue = (round(255 * value) for value in recipe.mean)
    fill = (red, green, blue)
    cells = [(picture, "original")]
    for name in INCREASING_OPS:
        arguments = [op_argument(name, magnitude, turn % 2 == 1) for turn, magnitude in enumerate(LEVELS)]
        if arguments[0] is None:
            cells.append((apply_op(picture, name, None, fill), name))
            continue
        for magnitude, argument in zip(LEVELS, arguments, strict=True):
            caption = f"magnitude {magnitude:g}: {words_of_op(name, argument)}"
            cells.append((apply_op(picture, name, argument, fill), caption))
    return cells


def draw_sheet(path: Path, parts: list[tuple[str, list[Cell]]], zoom: float) -> None:
    """Headed rows of captioned pictures, `zoom` screen pixels a pixel (nearest), as a PNG."""
    side = max(picture.shape[0] for _, cells in parts for picture, _ in cells) * zoom / 100  # inches
    side, heading, gap = max(side, 1.6), 0.45, 0.15  # captions need room
    rows = [[cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)] for _, cells in parts]
    captions = [0.2 + 0.125 * max(text.count("\n") + 1 for _, text in cells) for _, cells in parts]
    width = COLUMNS * side + (COLUMNS + 1) * gap
    height = gap + sum(
        heading + len(lines) * (side + caption) for lines, caption in zip(rows, captions, strict=True)
    )
    figure = Figure((width, height), dpi=100)
    top = height
    for (title, _), lines, caption in zip(parts, rows, captions, strict=True):
        figure.text(gap / width, (top - 0.3) / height, title, fontsize=10, weight="bold")
        top -= heading
        for line in lines:
            for column, (picture, text) in enumerate(line):
                left, bottom = gap + column * (side + gap), top - side
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                axes.imshow(picture, interpolation="nearest", aspect="equal")
                axes.set_axis_off()
                figure.text(left / width, (bottom - 0.07) / height, text, fontsize=7.5, va="top")
            top -= side + caption
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white", metadata={"Software": None})


def _shortened(name: str, length: int = 24) -> str:
    name = name.replace("$", r"\$")  # no formula
    return name if len(name) <= length else name[: length - 1] + "…"
