"""Tables of images with the columns path (or file_name), label and perhaps split; COCO annotations are read as one."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.errors import PipelineError, UsageError, reason
from pipeline.common.files import StatSignature, stat_signature
from pipeline.config.schema import Data
from pipeline.shards.coco import coco_rows
from pipeline.shards.listing import TRAIN_NAMES, VAL_NAMES, Listing, as_text, label_numbers, number_classes
from pipeline.shards.parquet import open_parquet

PATHS = ("path", "file_name")
"""Columns that may hold the path; the second is that of Hugging Face's metadata.csv and metadata.jsonl."""
TABLES = ("csv", "tsv", "jsonl", "parquet", "json")


class Row(NamedTuple):
    """An image as a table names it."""

    path: str
    """Absolute."""
    label: str
    split: str
    """Lower case; empty in a table without such a column."""


def list_tables(data: Data) -> dict[str, Listing]:
    """List train and val, or train alone if data.val_fraction divides it.

    With a split column, only rows of the split's names count, so one table may serve for both.

    Raises:
        UsageError: no table, no pyarrow for a Parquet file, or no validation images.
        PipelineError: a table or an image file cannot be read, a column or value is missing, an image occurs twice, a
            class occurs in validation only.
    """
    tables = {"train": _table(data, "train")}
    if not data.val_fraction:
        tables["val"] = _table(data, "val") if data.val else tables["train"]
    rows = {table: _read(table) for table in {*tables.values()}}
    used = {split: _split_names(data, split, rows[table]) for split, table in tables.items()}
    kept = {split: [row for row in rows[table] if row.split in used[split]] for split, table in tables.items()}
    for split, table in tables.items():
        _check_any(table, split, rows[table], kept[split])
    _check_unique(tables, kept)
    numbers = number_classes(str(tables["train"]), [row.label for row in kept["train"]])
    listings = {}
    for split, table in tables.items():
        of_table = set().union(*(used[each] for each in tables if tables[each] == table))
        left_out = _left_out(rows.pop(table, []), of_table, table)  # a table for both splits says it once
        listings[split] = _listing(table, kept[split], numbers, left_out)
    return listings


def is_table(path: Path) -> bool:
    """Whether a file has rows, with the columns that a table of images needs.

    Raises:
        UsageError: a Parquet file, and no pyarrow.
        PipelineError: a Parquet file is damaged.
    """
    try:
        first = next(_records(path), {})
    except (OSError, ValueError, csv.Error, RecursionError):
        return False
    return "label" in first and any(name in first for name in PATHS)


def has_validation_rows(table: Path) -> bool:
    """Whether rows of a table are for validation, by its column split.

    Raises:
        UsageError, PipelineError: see `list_tables`.
    """
    return any(row.split in VAL_NAMES for row in _read(table))


def _table(data: Data, split: str) -> Path:
    path = Path(getattr(data, split)).expanduser()
    if not getattr(data, split) or not path.is_file() or path.suffix[1:].lower() not in TABLES:
        raise UsageError(
            f"data.{split}: {getattr(data, split)!r}",
            expected=f"a table of images: a file of the types {', '.join(TABLES)}",
            found="another type" if path.is_file() else "no such file" if getattr(data, split) else "an empty key",
            do=f"set data.{split} in params.yaml, or --set data.{split}=FILE",
        )
    return path


def _split_names(data: Data, split: str, rows: list[Row]) -> set[str]:
    """The names in a table's column `split` of the rows that a split has."""
    if split == "train":
        return {*TRAIN_NAMES, ""}
    present = {row.split for row in rows}
    first = {name for name in VAL_NAMES if name in present}
    return {min(first, key=VAL_NAMES.index)} if first else ({""} if data.val else set())


def _check_any(table: Path, split: str, rows: list[Row], kept: list[Row]) -> None:
    if kept:
        return
    counts = Counter(row.split for row in rows)
    found = [f"{count:,} of split {name}" if name else f"{count:,} without a split" for name, count in counts.items()]
    raise UsageError(
        f"{table}: no images for {'training' if split == 'train' else 'validation'}",
        expected=f"rows whose split is one of {', '.join(TRAIN_NAMES if split == 'train' else VAL_NAMES)}",
        found=f"rows: {', '.join(found) or 'none'}",
        do="name a table in data.val, set data.val_fraction, or add the column split" if split == "val" else "add some",
    )


def _left_out(rows: list[Row], used: set[str], table: Path) -> list[str]:
    """What no split uses of a table, for messages."""
    counts = Counter(row.split for row in rows if row.split not in used)
    return [f"{count:,} rows of split {name} in {table}" for name, count in counts.items()]


def _check_unique(tables: dict[str, Path], kept: dict[str, list[Row]]) -> None:
    counts = Counter(row.path for rows in kept.values() for row in rows)
    if twice := sorted(path for path, count in counts.items() if count > 1):
        raise PipelineError(
            f"{' and '.join(sorted({str(table) for table in tables.values()}))}: images",
            expected="every image once: in one row, of training or of validation",
            found=f"{len(twice):,} in several rows, for example {twice[0]}",
            do="remove the other rows",
        )


def _listing(table: Path, rows: list[Row], numbers: dict[str, int], left_out: list[str]) -> Listing:
    root = os.path.abspath(table.parent)
    if not all(row.path.startswith(os.path.join(root, "")) for row in rows):
        root = os.path.commonpath([os.path.dirname(row.path) for row in rows])
    named = sorted((tuple(os.path.relpath(row.path, root).split("/")), row) for row in rows)
    names = ["/".join(parts) for parts, _ in named]
    labels = label_numbers(str(table), [row.label for _, row in named], numbers)
    signatures = [_signature(table, row.path) for _, row in named]
    return Listing([*numbers], names, labels, signatures, [], Path(root), tuple(left_out))


def _signature(table: Path, path: str) -> StatSignature:
    try:
        if os.path.isfile(path):
            return stat_signature(os.stat(path))
        found = "no such file"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        found = str(error)
    raise PipelineError(
        f"{table}: image {path}",
        expected="an image file; a path in a table is relative to the table's folder",
        found=found,
        do="correct the path, or remove the row",
    )


def _read(table: Path) -> list[Row]:
    """The rows of a table."""
    root, rows = os.path.abspath(table.parent), []
    try:
        for number, row in enumerate(_records(table), 1):
            path = next((row[name] for name in PATHS if name in row), None)
            split = row.get("split")
            values = {"path": path, "label": row.get("label")} | ({"split": split} if "split" in row else {})
            texts = {name: as_text(value) for name, value in values.items()}
            if missing := [name for name, text in texts.items() if not text]:
                raise PipelineError(
                    f"{table}: row {number}",
                    expected="columns path (or file_name) and label, and a column split that is filled in every row or"
                    " absent; a label is a name or a whole number",
                    found=f"{missing[0]}: {values[missing[0]]!r}; columns: {', '.join(map(str, row))}",
                    do="correct the table",
                )
            texts["split"] = _split_name(table, number, texts.get("split", ""))
            rows.append(Row(os.path.normpath(os.path.join(root, texts["path"])), texts["label"], texts["split"]))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise PipelineError(
            f"{table}: the table cannot be read",
            expected=f"a table of the type {table.suffix[1:].lower()}, in UTF-8 if it is text",
            found=reason(error),
            do="correct or restore it",
        ) from error
    if len({bool(row.split) for row in rows}) > 1:
        raise PipelineError(
            f"{table}: column split",
            expected="a value in every row, or in none",
            found="rows with and without one",
            do="fill it in everywhere, or remove it",
        )
    return rows


def _split_name(table: Path, number: int, name: str) -> str:
    if name and name.lower() not in (*TRAIN_NAMES, *VAL_NAMES):
        raise PipelineError(
            f"{table}: row {number}",
            expected=f"a split of {', '.join((*TRAIN_NAMES, *VAL_NAMES))}",
            found=repr(name),
            do="correct the split, or remove the row",
        )
    return name.lower()


def _records(table: Path) -> Iterator[dict[str, Any]]:
    """Yield each row of a table by column."""
    kind = table.suffix[1:].lower()
    if kind == "parquet":
        yield from _parquet_records(table)
        return
    if kind == "json":
        yield from coco_rows(table)
        return
    with open(table, encoding="utf-8-sig", newline="") as file:
        if kind == "jsonl":
            for line in filter(str.strip, file):
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"a line that is not a JSON object: {line[:80]!r}")
                yield record
        else:
            delimiter = "\t" if kind == "tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            if repeated := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1 and name]:
                raise ValueError(f"column {repeated[0]!r} twice")
            for row in reader:
                if any(row.get(None) or ()):  # csv puts there what has no column; a separator at the end is harmless
                    more = "more values than columns; one that contains the separator must be in double quotes"
                    raise ValueError(f"line {reader.line_num}: {more}")
                yield row


def _parquet_records(table: Path) -> Iterator[dict[str, Any]]:
    file = open_parquet(table)
    columns = [name for name in (*PATHS, "label", "split") if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()
