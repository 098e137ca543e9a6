"""A contact sheet of a recipe: an image, its views with their parameters, and its group after mixing."""

import numpy as np

from pipeline.batches.batch import Renderer
from pipeline.batches.plan import Item
from pipeline.common.errors import UsageError
from pipeline.config.policies import INCREASING_OPS, op_argument
from pipeline.config.schema import Recipe
from pipeline.report.examples import mixed_pictures
from pipeline.report.grid import Cell, Section, shorten
from pipeline.shards.index import Index
from pipeline.views.draw import Mix, ViewParams, draw_groups, draw_mix, draw_view
from pipeline.views.ops import apply_op
from pipeline.views.render import center_view, fill_colour, render

COLUMNS = 4
MAGNITUDES = (2.5, 5.0, 7.5, 10.0)
MIN_SIDE = 1.6
"""Smallest side of a cell in inches; narrower captions would have many lines."""


def describe_view(params: ViewParams) -> str:
    """A view's parameters, a line each: crop and flip, every op with its argument, erased box."""
    left, top, width, height = params.crop
    lines = [f"crop {width} x {height} at {left}, {top}" + (", flipped" if params.flip else "")]
    lines += [describe_op(name, argument) for name, argument in params.ops] or ["no op"]
    if params.erase:
        left, top, width, height = params.erase
        lines.append(f"erased {width} x {height} at {left}, {top}")
    return "\n".join(lines)


def describe_op(name: str, argument: float | None) -> str:
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


def random_sample(index: Index, seed: int) -> tuple[int, int]:
    """Shard and position of a sample chosen by a seed."""
    return index.locate(int(np.random.default_rng(seed).integers(len(index))))


def sample_section(index: Index, recipe: Recipe, shard: int, position: int, views: range) -> Section:
    """The original, and each of its views with its parameters."""
    row, image = index.rows(shard)[position], index.image(shard, position)
    key, (height, width) = row["key"].decode(), image.shape[:2]
    label = shorten(index.class_name(row["label"]), 24)
    cells = [Cell(center_view(image, recipe.size, 1.0).transpose(1, 2, 0), f"{label}, {width} x {height}\n(centre crop)")]
    for view in views:
        params = draw_view(recipe, key, view, width, height)
        cells.append(Cell(render(image, params, recipe).transpose(1, 2, 0), f"view {view}: {describe_view(params)}"))
    return _section(f"{key} in {index.names[shard]}, recipe of {recipe.size} px", cells)


def mixed_view(index: Index, recipe: Recipe, shard: int, position: int, views: range) -> int:
    """The first of the views in which the sample's group is mixed, or the first if there is none."""
    for view in views:
        number, members = _group(index, recipe, shard, position, view)
        if draw_mix(recipe, index.names[shard], number, view, len(members)).method != "none":
            return view
    return views[0]


def _group(index: Index, recipe: Recipe, shard: int, position: int, view: int) -> tuple[int, np.ndarray]:
    """The number and the members of a sample's group in a view."""
    groups = draw_groups(recipe, index.names[shard], view // recipe.block, int(index.samples[shard]))
    return next((number, members) for number, members in enumerate(groups) if position in members)


def group_section(index: Index, recipe: Recipe, shard: int, position: int, view: int, count: int) -> Section:
    """The sample's group in one view, after mixing: the sample, then other members, `count` at most."""
    number, members = _group(index, recipe, shard, position, view)
    mix = draw_mix(recipe, index.names[shard], number, view, len(members))
    rendered = Renderer(index, recipe).render([Item(shard, number, view)])
    pictures = mixed_pictures(rendered)
    names = [shorten(index.class_name(int(label)), 24) for label in rendered.labels[0, : len(members)]]
    first = int(np.flatnonzero(members == position)[0])
    slots = [first, *(slot for slot in range(len(members)) if slot != first)][:count]
    cells = []
    for slot in slots:
        partner, caption = int(mix.partner[slot]), names[slot]
        if mix.method != "none" and partner != slot:
            caption = f"{mix.lam:.2f} {names[slot]}\n{1 - mix.lam:.2f} {names[partner]}"
        cells.append(Cell(pictures[slot], caption))
    shown = f", {len(cells)} shown" if len(cells) < len(members) else ""
    title = f"Group {number} of {index.names[shard]} in view {view}: {_describe_mix(mix)}; {len(members)} members{shown}"
    return _section(title, cells)


def op_section(index: Index, recipe: Recipe, shard: int, position: int) -> Section:
    """The image under every op of RandAugment's increasing set; at rising magnitudes where the op has one, and
    with alternating signs."""
    key = index.rows(shard)["key"][position].decode()
    picture = center_view(index.image(shard, position), recipe.size, 1.0).transpose(1, 2, 0).copy()
    fill = fill_colour(recipe.mean)
    cells = [Cell(picture, "original")]
    for name in INCREASING_OPS:
        arguments = [op_argument(name, magnitude, turn % 2 == 1) for turn, magnitude in enumerate(MAGNITUDES)]
        if arguments[0] is None:
            cells.append(Cell(apply_op(picture, name, None, fill), name))
            continue
        for magnitude, argument in zip(MAGNITUDES, arguments, strict=True):
            caption = f"{describe_op(name, argument)}\nmagnitude {magnitude:g}"
            cells.append(Cell(apply_op(picture, name, argument, fill), caption))
    return _section(f"{key} in {index.names[shard]}, recipe of {recipe.size} px: every op", cells)


def _section(title: str, cells: list[Cell]) -> Section:
    return Section([cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)], title)


def _describe_mix(mix: Mix) -> str:
    if mix.method == "none":
        return "not mixed"
    left, top, width, height = mix.box
    box = f", box {width} x {height} at {left}, {top}" if mix.method == "cutmix" else ""
    return f"{mix.method}, lambda {mix.lam:.3f}{box}"
