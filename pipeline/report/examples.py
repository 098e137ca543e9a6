"""Training images with some of their views, and the mixed pictures that the teacher saw, as one picture."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batches.batch import Batch, Renderer, mixed
from pipeline.batches.plan import Item
from pipeline.config.schema import Config, Recipe
from pipeline.report.grid import Cell, Section, draw_grid, shorten
from pipeline.shards.index import Index
from pipeline.store.encoding import decode_logits
from pipeline.store.reader import Store
from pipeline.training.teachers import read_predictions
from pipeline.views.draw import draw_mix, group_count

EXAMPLES, VIEWS = 4, 3
SHORT = 8
"""Letters of a class name next to which a probability fits on the same line."""


@dataclass(frozen=True)
class ExampleView:
    """One view of a training image, before and after mixing."""

    number: int
    picture: np.ndarray
    """uint8 (P, P, 3), before mixing."""
    mixed: np.ndarray
    """uint8 (P, P, 3)"""
    method: str
    """none, mixup or cutmix"""
    lam: float
    """Weight of the image's own label."""
    partner: str
    """Label of the image that it was mixed with."""
    prediction: str
    """The teacher's class for the mixed picture; empty without a teacher."""
    probability: float | None
    """The teacher's probability of that class; None if the store holds the class alone."""


@dataclass(frozen=True)
class Example:
    """A training image and some of its views."""

    label: str
    original: np.ndarray
    """uint8 (height, width, 3)"""
    views: list[ExampleView]


def training_examples(
    config: Config, index: Index, store: Store | None = None, manifest: dict[str, Any] | None = None
) -> list[Example]:
    """Members of one group, of different classes if there are any, in views that are mixed differently.

    Args:
        store: where the teacher's predictions are; None without a teacher.
        manifest: the store's.
    """
    renderer, shard = Renderer(index, config.recipe), int(np.flatnonzero(index.samples)[0])
    labels, members = index.rows(shard)["label"], renderer.members(Item(shard, 0, 0))
    positions = shown_positions(members.tolist(), labels[members].tolist())
    examples = {p: Example(index.class_name(labels[p]), index.image(shard, p), []) for p in positions}
    views = manifest["views"] if manifest else config.teacher_logits.views
    for view in shown_views(config.recipe, index.names[shard], len(members), views):
        # groups change from block to block, so these samples may be spread over several
        for group in range(group_count(int(index.samples[shard]), config.recipe.group_size)):
            item = Item(shard, group, view)
            slots = {slot: int(p) for slot, p in enumerate(renderer.members(item)) if int(p) in examples}
            if slots:
                batch = renderer.render([item])
                predictions = [("", None)] * config.recipe.group_size
                if store and manifest:
                    predictions = _read_predictions(store, manifest["kind"], batch)
                for slot, shown in zip(slots, _views(index, batch, slots, predictions), strict=True):
                    examples[slots[slot]].views.append(shown)
    return list(examples.values())


def shown_positions(members: Sequence[int], labels: Sequence[int]) -> list[int]:
    """EXAMPLES members of a group: the first of each class, then others; in the group's order, as are `labels`."""
    order = sorted(range(len(members)), key=lambda slot: labels[slot] in labels[:slot])
    return [members[slot] for slot in sorted(order[:EXAMPLES])]


def shown_views(recipe: Recipe, shard: str, members: int, views: int) -> list[int]:
    """VIEWS views: of the first block, the first ones in which the first group is unmixed, mixed by Mixup and by CutMix."""
    methods = [draw_mix(recipe, shard, 0, view, members).method for view in range(min(views, recipe.block))]
    first = {methods.index(method) for method in {*methods}}
    return sorted(sorted(range(views), key=lambda view: view not in first)[:VIEWS])


def mixed_pictures(batch: Batch) -> np.ndarray:
    """Every slot's picture after mixing, rounded to uint8 (G * S, P, P, 3)."""
    return mixed(batch).round().byte().permute(0, 2, 3, 1).numpy()


def _views(
    index: Index, batch: Batch, slots: Iterable[int], predictions: Sequence[tuple[str, float | None]]
) -> Iterator[ExampleView]:
    """The views in some slots of one group."""
    pictures, lam = mixed_pictures(batch), float(batch.lam[0])
    cutmix = bool(batch.box[0, 2] > batch.box[0, 0])
    for slot in slots:
        partner = int(batch.partner[0, slot])
        alone = partner == slot or lam == 1
        prediction, probability = predictions[slot]
        yield ExampleView(
            number=batch.items[0].view,
            picture=batch.images[0, slot].permute(1, 2, 0).numpy(),
            mixed=pictures[slot],
            method="none" if alone else "cutmix" if cutmix else "mixup",
            lam=1.0 if alone else lam,
            partner=index.class_name(int(batch.labels[0, partner])),
            prediction=prediction,
            probability=probability,
        )


def _read_predictions(store: Store, kind: str, batch: Batch) -> Sequence[tuple[str, float | None]]:
    """The teacher's class for each slot of one group, and its probability if the store holds logits."""
    argmax, payload = read_predictions(store, batch, kind)
    names = [store.index.classes[number] for number in argmax]
    if payload is None or kind == "sampled":
        return [(name, None) for name in names]
    probabilities = decode_logits(kind, payload, store.classes).softmax(1).gather(1, argmax[:, None])[:, 0]
    return list(zip(names, probabilities.tolist(), strict=True))


def draw_examples(path: Path, examples: list[Example]) -> None:
    """Draw a PNG of `example_section`."""
    draw_grid(path, [example_section(examples)], side=1.4, dpi=150)


def example_section(examples: list[Example]) -> Section:
    """A row per image: the original, then each view before and after mixing."""
    views = max((example.views for example in examples), key=len)
    headings = ["original"]
    for view in views:
        headings += [f"view {view.number}", f"view {view.number}, mixed"]
    return Section([_cells(example) for example in examples], headings=headings)


def _cells(example: Example) -> list[Cell]:
    label = shorten(example.label, 20)
    cells = [Cell(example.original, label)]
    for view in example.views:
        how = "not mixed" if view.method == "none" else f"{view.method}, λ {view.lam:.2f}\nwith {shorten(view.partner, 16)}"
        caption = [how]
        if view.prediction:
            probability = "" if view.probability is None else f"{100 * view.probability:.0f} %"
            separator = "" if not probability else ", " if len(view.prediction) <= SHORT else ",\n"
            caption.append(f"teacher: {shorten(view.prediction, 13)}{separator}{probability}")
        cells += [Cell(view.picture, label, begins_group=True), Cell(view.mixed, "\n".join(caption))]
    return cells
