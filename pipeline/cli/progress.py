"""How far a configuration's stages are: facts to rows, rows to a table.

All of it is pure. pipeline/cli/status.py gathers the facts.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Recipe
from pipeline.views.draw import recipe_fingerprint

RECENT = 600.0  # seconds: what moved so lately is running; also what a rate is taken over

def is_store_of(recipe: Recipe, index: str | None, attributes: dict[str, Any]) -> bool:
    """Whether a store with these attributes is of a recipe and an index."""
    return attributes.get("index") == index and attributes.get("recipe") == recipe_fingerprint(recipe)


# how far it is


@dataclass(frozen=True)
class Facts:
    """What a stage's files tell."""

    stage: str
    """Its name in dvc.yaml."""
    unit: str
    """What is counted: shards, steps, units, models."""
    done: int = 0
    total: int | None = None
    kept: int | None = None
    """Of `done`, what the same command goes on from; None: all of it."""
    begun: bool = False
    """There is something of its work, beside what is published."""
    published: bool = False
    foreign: bool = False
    """What is published is another configuration's."""
    writers: int | None = None
    """Locks or leases held; None where there are none, and a late movement tells that it runs."""
    moved: float | None = None
    """When its newest file was written, in seconds since 1970."""
    rate: float | None = None
    """Units a second."""
    pictures: float | None = None
    """Of one unit."""
    loss: float | None = None
    top1: float | None = None
    note: str = ""
    failure: str = ""
    """What its last command failed over, if that was after its newest file."""


@dataclass(frozen=True)
class Row:
    """A stage as it is shown; None where nothing tells."""

    stage: str
    state: str
    """`done`, `done, of another configuration`, `running`, `stopped`, `failed` or `not begun`."""
    unit: str
    done: int
    total: int | None
    percent: float | None
    images_per_second: float | None
    """Views of a store, samples of a training."""
    seconds_left: float | None
    moved_seconds_ago: float | None
    loss: float | None
    top1: float | None
    note: str


DONE, FOREIGN, RUNNING, STOPPED, NOT_BEGUN = "done", "done, of another configuration", "running", "stopped", "not begun"
FAILED = "failed"


def state_of(facts: Facts, now: float) -> str:
    """Work that is under way counts before what was published earlier."""
    state = _state_of_files(facts, now)
    return FAILED if facts.failure and state != RUNNING else state


def _state_of_files(facts: Facts, now: float) -> str:
    complete = facts.total is not None and facts.done >= facts.total
    if facts.begun and not (facts.published and complete):
        recent = facts.moved is not None and now - facts.moved < RECENT
        running = recent if facts.writers is None else facts.writers > 0
        return RUNNING if running else STOPPED
    if facts.published:
        return FOREIGN if facts.foreign else DONE
    return NOT_BEGUN


def row_of(facts: Facts, now: float) -> Row:
    state, done, total = state_of(facts, now), facts.done, facts.total
    if state in (STOPPED, FAILED) and facts.kept is not None:
        done = facts.kept
    left = None
    if state in (RUNNING, STOPPED, FAILED) and total is not None and facts.rate:
        left = max(0, total - done) / facts.rate
    images = None
    if state == RUNNING and facts.rate and facts.pictures:
        images = facts.rate * facts.pictures
    note = facts.note
    if state == STOPPED and total is not None and done >= total:
        note = "complete, not published"
    if state == FAILED:
        note = facts.failure
    return Row(
        stage=facts.stage,
        state=state,
        unit=facts.unit,
        done=done,
        total=total,
        percent=1000 * done // total / 10 if total else None,
        images_per_second=_tenths(images),
        seconds_left=_tenths(left),
        moved_seconds_ago=_tenths(None if facts.moved is None else max(0.0, now - facts.moved)),
        loss=facts.loss,
        top1=facts.top1,
        note=note,
    )


def _tenths(number: float | None) -> float | None:
    return None if number is None else round(number, 1)


def rate_of(times: list[float]) -> float | None:
    """How many were written a second, in the last minutes before the newest."""
    newest = max(times, default=0.0)
    late = [time for time in times if newest - time < RECENT]
    span = newest - min(late, default=newest)
    return (len(late) - 1) / span if span > 0 else None


def told_by_log(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a training's log: `done` steps, `loss` and `top1` as last told, `samples` a second of late."""
    steps = [line for line in lines if line["kind"] == "step"]
    timed = [line for line in steps[-10:] if line.get("seconds")]
    told: dict[str, Any] = {"done": 0, "loss": None, "top1": None, "samples": None}
    for line in lines:
        told["done"] = line["step"] + (line["kind"] == "step")
        told["loss"] = line["loss"]
        told["top1"] = top1_of(line, told["top1"])
    if timed:
        seconds = sum(line["seconds"] for line in timed)
        told["samples"] = sum(line["samples_per_s"] * line["seconds"] for line in timed) / seconds
    return told


def top1_of(metrics: dict[str, Any], otherwise: float | None = None) -> float | None:
    """The top-1 that is quoted: of both heads where there are two."""
    for key in ("val_top1_mean", "val_top1_class", "top1"):
        if key in metrics:
            return metrics[key]
    return otherwise


# as text

HEADINGS = ("stage", "state", "%", "done", "img/s", "left", "moved", "loss, top-1")
RIGHT = {"%", "img/s", "left", "moved"}


def table(rows: list[Row]) -> str:
    """The rows in columns, about 100 characters wide."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if heading in RIGHT else cell.ljust(width)
            for heading, cell, width in zip(HEADINGS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    figures = [f"{row.loss:.3g}"] if row.loss is not None and row.state in (RUNNING, STOPPED) else []
    figures += [f"{row.top1:.1%}".replace("%", " %")] if row.top1 is not None else []
    figures += ["of another configuration"] if row.state == FOREIGN else []
    figures += [row.note] if row.note else []
    return (
        row.stage,
        "done" if row.state == FOREIGN else row.state,
        "" if row.percent is None else str(int(row.percent)),
        _count(row),
        "" if row.images_per_second is None else short(row.images_per_second),
        "" if row.seconds_left is None else duration(row.seconds_left),
        "" if row.moved_seconds_ago is None else f"{duration(row.moved_seconds_ago)} ago",
        ", ".join(figures),
    )


def _count(row: Row) -> str:
    if row.total is None:
        return f"{short(row.done)} {row.unit}" if row.done else ""
    of = f"/{short(row.total)}" if row.done < row.total else ""
    return f"{short(row.done)}{of} {row.unit}"


def short(number: float) -> str:
    """9,999 in full, 12.3k and 1.28M beyond; 0.25 below ten."""
    if number < 10:
        return f"{number:.2g}"
    if number < 10_000:
        return f"{number:,.0f}"
    return f"{number / 1e3:.3g}k" if number < 999_500 else f"{number / 1e6:.3g}M"


def duration(seconds: float) -> str:
    """In the unit that suits: 12 s, 5 min, 3.2 h, 4.1 d."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"
