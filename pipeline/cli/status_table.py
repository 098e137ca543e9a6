"""The table of `pipeline status`: what a stage's files say becomes a row, rows become text. All of it is pure."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cli.scan import number
from pipeline.common.wording import duration

RECENT = 600.0  # seconds: a stage whose files changed within them is running; also the span that a rate is taken over
DONE, OUTDATED, RUNNING, STOPPED, NOT_BEGUN = "done", "outdated", "running", "stopped", "not begun"
FAILED = "failed"


@dataclass(frozen=True)
class StageFacts:
    """What a stage's files say; times in seconds since 1970."""

    stage: str
    """Its name in dvc.yaml."""
    unit: str
    """What is counted: shards, steps, units or models."""
    done: int = 0
    total: int | None = None
    kept: int | None = None
    """How much of `done` the same command resumes from; None: all of it."""
    begun: bool = False
    """There is a state folder, a store or a shard, complete or not."""
    published: bool = False
    foreign: bool = False
    """What is published belongs to another configuration."""
    writers: int | None = None
    """Locks or leases held; None where that is unknown, so that a recent change means that it runs."""
    modified: float | None = None
    """When its newest file was written."""
    rate: float | None = None
    """Units per second."""
    images_per_unit: float | None = None
    loss: float | None = None
    top1: float | None = None
    note: str = ""
    failure: str = ""
    """The error of its last command, if no file is newer."""


@dataclass(frozen=True)
class Row:
    """A stage as it is shown; None: unknown."""

    stage: str
    state: str
    """`done`, `outdated`, `running`, `stopped`, `failed` or `not begun`."""
    unit: str
    done: int
    total: int | None
    percent: float | None
    images_per_second: float | None
    """Views of a store, samples of a training run."""
    seconds_left: float | None
    updated_seconds_ago: float | None
    loss: float | None
    top1: float | None
    note: str


def state_of(facts: StageFacts, now: float) -> str:
    """Unfinished work takes precedence over earlier published results."""
    state = OUTDATED if facts.foreign else DONE if facts.published else NOT_BEGUN
    complete = facts.total is not None and facts.done >= facts.total
    if facts.begun and not (facts.published and complete):
        recent = facts.modified is not None and now - facts.modified < RECENT
        state = RUNNING if (recent if facts.writers is None else facts.writers > 0) else STOPPED
    return FAILED if facts.failure and state != RUNNING else state


def row_of(facts: StageFacts, now: float) -> Row:
    state, done, total, note = state_of(facts, now), facts.done, facts.total, facts.note
    if state in (STOPPED, FAILED) and facts.kept is not None:
        done = facts.kept
    seconds_left = images = None
    if state in (RUNNING, STOPPED, FAILED) and total is not None and facts.rate:
        seconds_left = max(0, total - done) / facts.rate
    if state == RUNNING and facts.rate and facts.images_per_unit:
        images = facts.rate * facts.images_per_unit
    if state == STOPPED and total is not None and done >= total:
        note = "complete, not published"
    return Row(
        stage=facts.stage,
        state=state,
        unit=facts.unit,
        done=done,
        total=total,
        percent=1000 * done // total / 10 if total else None,
        images_per_second=_tenths(images),
        seconds_left=_tenths(seconds_left),
        updated_seconds_ago=_tenths(None if facts.modified is None else max(0.0, now - facts.modified)),
        loss=facts.loss,
        top1=facts.top1,
        note=facts.failure if state == FAILED else note,
    )


def _tenths(number: float | None) -> float | None:
    return None if number is None else round(number, 1)


def write_rate(times: list[float]) -> float | None:
    """Files written per second, over the last RECENT seconds before the newest."""
    recent = [time for time in times if max(times) - time < RECENT]
    span = max(recent) - min(recent) if recent else 0.0
    return (len(recent) - 1) / span if span > 0 else None


def log_summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """From a run's log: `done` steps, the last `loss` and `top1`, and recent `samples` per second."""
    summary: dict[str, Any] = {"done": 0, "loss": None, "top1": None, "samples": None}
    for line in lines:
        summary["done"] = line["step"] + (line["kind"] == "step")
        summary["loss"], summary["top1"] = line["loss"], headline_top1(line, summary["top1"])
    timed = [line for line in lines if line["kind"] == "step"][-10:]
    if seconds := sum(line.get("seconds", 0) for line in timed):
        summary["samples"] = sum(line["samples_per_s"] * line["seconds"] for line in timed if line.get("seconds")) / seconds
    return summary


def headline_top1(metrics: dict[str, Any], default: float | None = None) -> float | None:
    """The top-1 accuracy to quote: of both heads together where there are two."""
    return next((metrics[key] for key in ("val_top1_mean", "val_top1_class", "top1") if key in metrics), default)


def best_top1(evaluated: Iterable[Any]) -> float | None:
    """The highest top-1 accuracy of models' entries in the evaluation's metrics.json; None if none has one."""
    heads = [entry.get("mean") or entry.get("class") for entry in evaluated if isinstance(entry, dict)]
    found = [number(head.get("top1")) for head in heads if isinstance(head, dict)]
    return max((top1 for top1 in found if top1 is not None), default=None)


# as text

COLUMNS = {
    "stage": "left", "state": "left", "%": "right", "done": "left", "img/s": "right", "left": "right", "updated": "right",
    "loss, top-1": "left",
}  # fmt: skip


def show(rows: list[Row], name: str, json: bool) -> str:
    """The rows as JSON, or as a table below the experiment's name."""
    return as_json(rows) if json else f"{name}\n\n{table(rows)}"


def table(rows: list[Row]) -> str:
    """The rows in columns, about 100 characters wide."""
    from tabulate import tabulate

    lines = [list(COLUMNS), *(_cells(row) for row in rows)]  # as headers, tabulate would pad them
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=list(COLUMNS.values()))


def as_json(rows: list[Row]) -> str:
    """A JSON array, with one object per line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]"


def _cells(row: Row) -> list[str]:
    remarks = [f"{row.loss:.3g}"] if row.loss is not None and row.state in (RUNNING, STOPPED) else []
    remarks += [f"{100 * row.top1:.1f} %"] if row.top1 is not None else []
    remarks += ["of another configuration"] if row.state == OUTDATED else []
    remarks += [row.note] if row.note else []
    count = short(row.done)
    if row.total is not None and row.done < row.total:
        count += f"/{short(row.total)}"
    return [
        row.stage,
        row.state,
        "" if row.percent is None else str(int(row.percent)),
        f"{count} {row.unit.removesuffix('s') if count == '1' else row.unit}" if row.done or row.total is not None else "",
        "" if row.images_per_second is None else short(row.images_per_second),
        "" if row.seconds_left is None else duration(row.seconds_left),
        "" if row.updated_seconds_ago is None else f"{duration(row.updated_seconds_ago)} ago",
        ", ".join(remarks),
    ]


def short(number: float) -> str:
    """At most about four digits: 0.25, 9,999, 12.3k, 1.28M."""
    if number < 10:
        return f"{number:.2g}"
    if number < 10_000:
        return f"{number:,.0f}"
    return f"{number / 1e3:.3g}k" if number < 999_500 else f"{number / 1e6:.3g}M"
