"""Parquet files of images and labels, as on the Hugging Face Hub: columns image (bytes, path) and label."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError, UsageError, reason
from pipeline.common.files import StatSignature, stat_signature
from pipeline.config.schema import Data
from pipeline.shards.containers import Container
from pipeline.shards.listing import Listing, as_text, label_numbers, number_classes
from pipeline.shards.patterns import expand

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")
"""Names of columns; the first that a file has is used."""
BATCH = 64  # images that are decompressed at a time


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile.

    Raises:
        UsageError: pyarrow is not installed.
        PipelineError: the file cannot be read.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: a Parquet file", expected="pyarrow", found="it is not installed", do="install the extra `parquet`"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        raise _unreadable(path, error) from error


def list_parquet(data: Data) -> dict[str, Listing]:
    """List train and val, or train alone if data.val_fraction divides it.

    Raises:
        UsageError: no files, a file in both splits, or pyarrow is missing.
        PipelineError: a file cannot be read, columns or class names are missing or differ.
    """
    splits = {split: _files(data, split) for split in (("train",) if data.val_fraction else ("train", "val"))}
    if both := sorted(set(splits["train"]) & set(splits.get("val", []))):
        raise UsageError(
            f"data.val: {data.val}",
            expected="files other than those of data.train",
            found=f"{both[0]} in both",
            do="name other files for validation, or leave data.val empty and set data.val_fraction",
        )
    named = {file: _class_names(file) for files in splits.values() for file in files}
    first = splits["train"][0]
    for file, names in named.items():
        if names != named[first]:
            raise PipelineError(
                f"{file}: class names",
                expected=f"those of {first}: {str(named[first])[:200]}",
                found=str(names)[:200],
                do="name files of one data set in data.train and data.val",
            )
    labels = {file: _labels(file) for file in named}
    train = [label for file in splits["train"] for label in labels[file]]
    classes = named[first]
    numbers = {str(n): n for n in range(len(classes))} if classes else number_classes(data.train, train)
    return {split: _listing(files, labels, numbers, classes or [*numbers]) for split, files in splits.items()}


def _files(data: Data, split: str) -> list[Path]:
    pattern = getattr(data, split)
    paths = sorted(set(expand(f"data.{split}", pattern))) if pattern and "://" not in pattern else []
    if not paths or not all(Path(path).is_file() for path in paths):
        missing = next((path for path in paths if not Path(path).is_file()), "")
        raise UsageError(
            f"data.{split}: {pattern!r}",
            expected="Parquet files on this machine, for example data/train-*.parquet",
            found=f"no file {missing}" if missing else "a URL" if pattern else "an empty key",
            do=f"set data.{split} in params.yaml" + ", or data.val_fraction" * (split == "val"),
        )
    return [Path(os.path.abspath(path)) for path in paths]


def _listing(files: list[Path], labels: dict[Path, list[str]], numbers: dict[str, int], classes: list[str]) -> Listing:
    root = Path(os.path.commonpath([file.parent for file in files]))
    signatures = {file: stat_signature(os.stat(file)) for file in files}
    counts = {file: len(labels[file]) for file in files}
    container = ParquetImages(root, sum(at[0] for at in signatures.values()), sum(counts.values()), files)
    names = [_name(root, file, row) for file in files for row in range(counts[file])]
    if not names:
        raise PipelineError(f"{', '.join(map(str, files[:5]))}: no rows", expected="images", found="none", do="name other files")
    if len(set(names)) < len(names):
        raise PipelineError(
            f"{root}: Parquet files",
            expected="names that differ in letters, digits, _ and -",
            found=", ".join(str(file) for file in files[:5]),
            do="rename one of them",
        )
    of_rows = [label for file in files for label in label_numbers(str(file), labels[file], numbers)]
    at: list[StatSignature] = [signatures[file] for file in files for _ in range(counts[file])]
    return Listing(classes, names, of_rows, at, [], root, container=container)


def _name(root: Path, file: Path, row: int) -> str:
    stem = str(file.relative_to(root).with_suffix(""))
    return f"{re.sub(r'[^A-Za-z0-9_/-]', '_', stem)}/{row:06d}"


@dataclass(frozen=True)
class ParquetImages(Container):
    """The images of Parquet files."""

    files: list[Path]

    def images(self) -> Iterator[tuple[str, bytes]]:
        for file in self.files:
            for row, value in enumerate(_column(file, IMAGES)):
                encoded = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(encoded, bytes):
                    raise PipelineError(
                        f"{file}: row {row}",
                        expected="the bytes of an image",
                        found=str(value)[:100],
                        do="write the file again with embedded images, or use data.source=table for paths",
                    )
                yield _name(self.root, file, row), encoded


def _labels(file: Path) -> list[str]:
    labels = [as_text(value) for value in _column(file, LABELS)]
    if "" in labels:
        raise PipelineError(
            f"{file}: row {labels.index('')}",
            expected="a label: a name or a whole number",
            found="none, or another type",
            do="leave out images without labels",
        )
    return labels


def _column(file: Path, names: tuple[str, ...]) -> Iterator[Any]:
    """Yield the values of the first of these columns that a file has."""
    parquet = open_parquet(file)
    name = _column_name(file, parquet, names)
    try:
        for batch in parquet.iter_batches(batch_size=BATCH if names == IMAGES else 65_536, columns=[name]):
            yield from batch.column(0).to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _column_name(file: Path, parquet: Any, names: tuple[str, ...]) -> str:
    columns = parquet.schema_arrow.names
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise PipelineError(
            f"{file}: columns",
            expected=f"one of {', '.join(names)}",
            found=", ".join(columns),
            do="rename the column; a file of paths and labels is a table: data.source=table",
        )
    return found


def _class_names(file: Path) -> list[str]:
    """The names of the classes by number, from the metadata that Hugging Face's datasets writes; empty if there is none."""
    parquet = open_parquet(file)
    label = _column_name(file, parquet, LABELS)
    try:
        metadata = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata.get("info", {}).get("features", {}).get(label, {}).get("names", [])
    except (ValueError, AttributeError, RecursionError):
        return []
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return names if valid else []


def _unreadable(path: Path, error: Exception) -> PipelineError:
    return PipelineError(
        f"{path}: the file cannot be read", expected="a Parquet file", found=reason(error), do="restore it"
    )
