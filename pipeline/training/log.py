"""A run's log as JSON lines, and its epochs as CSV; every line has a checksum."""

import csv
import io
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError, unwritable
from pipeline.common.files import atomic_write, write_text
from pipeline.config.validation import short_repr

CHECK = "check"  # a line's last key, and a curve's last column


class Log:
    """JSON lines, one per logged step and per epoch; a resumed run removes those that it will write again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append a line, with the time; returns its values."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        try:
            with open(self.path, "a") as file:
                file.write(_line(line))
        except OSError as error:
            raise unwritable(f"{self.path}:", error) from error
        return line

    def sync(self) -> None:
        """Flush to disk; called before a checkpoint is written, so that no run resumes after epochs that were lost."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Keep the steps before `step`, and the epochs that had ended by then.

        Raises:
            PipelineError: a line is damaged.
        """
        lines = read_log(self.path)
        kept = [x for x in lines if x["step"] < step or (x["kind"] == "epoch" and x["step"] == step)]
        write_text(self.path, "".join(map(_line, kept)))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values | {CHECK: _crc(json.dumps(values))}) + "\n"


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without a last line that a kill cut short.

    Raises:
        PipelineError: another line is damaged.
    """
    lines = []
    *complete, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, text in enumerate(complete, 1):
        values = parse_line(text)
        if values is None:
            raise PipelineError(
                f"{path}: line {number} is damaged",
                expected="a line with its checksum, as it was written",
                found=short_repr(text),
                do="delete that line, or the file: curves then lack its values",
            )
        lines.append(values)
    last = parse_line(rest)
    return lines if last is None else [*lines, last]


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line of a log; None if it is damaged."""
    try:
        values = json.loads(text)
        check = values.pop(CHECK)
        return values if check == _crc(json.dumps(values)) else None
    # the last four: JSON that is not an object, or has no checksum
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError, IndexError):
        return None


def write_curve(path: Path, log: Path | None = None, last: dict[str, Any] | None = None) -> None:
    """Write a log's epochs as CSV, for `dvc plots` and the report; validation columns are empty where there was none.

    Args:
        log: None for a model that the pipeline did not train: the curve then has no epochs.
        last: metrics of the last epoch, as published; validation on other images is left out.

    Raises:
        PipelineError: the log is damaged.
    """
    epochs: list[dict[str, Any]] = []
    if log and last:
        logged = [line for line in read_log(log) if line["kind"] == "epoch" and line["epoch"] < last["epoch"]]
        epochs = [*(_validated_as(last, line) for line in logged), last]
    header = list(dict.fromkeys(key for line in epochs for key in line if key not in LOG_ONLY_KEYS)) or EMPTY_HEADER
    rows = [["" if line.get(key) is None else str(line[key]) for key in header] for line in epochs]
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, CHECK])
        writer.writerows([*row, check] for row, check in zip(rows, _chained_checksums(header, rows), strict=True))


def _validated_as(last: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    same = line.get("validation") == last["validation"]
    return line if same else {key: value for key, value in line.items() if "val_" not in key}


LOG_ONLY_KEYS = ("kind", "step", "time", "speed", "validation")
EMPTY_HEADER = ["epoch", "loss"]  # columns of a curve without epochs


def _chained_checksums(header: list[str], rows: list[list[str]]) -> list[str]:
    """A checksum per row, over all rows up to it; that of the last row marks it as the last."""
    checks, previous = [], _crc("\x1f".join(header))
    for number, row in enumerate(rows, 1):
        previous = _crc("\x1f".join([previous, *row, "last" if number == len(rows) else ""]))
        checks.append(previous)
    return checks


def read_curve(path: Path) -> list[dict[str, str]]:
    """The epochs that `write_curve` wrote, each a dict from column to text, which is empty where there is no value.

    Raises:
        PipelineError: the file is damaged.
    """
    try:
        table = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline=""), strict=True))
        (*header, mark), rows = table[0], [row[:-1] for row in table[1:]]
        valid = mark == CHECK and all(len(row) == len(header) for row in rows) and (rows or header == EMPTY_HEADER)
        if not valid or [row[-1] for row in table[1:]] != _chained_checksums(header, rows):
            raise ValueError("it has a different checksum")
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise PipelineError(
            f"{path}: the curve is damaged",
            expected="rows with their checksums, as they were written",
            found=str(error),
            do="run its stage again, by its command or by dvc repro: nothing is trained again",
        ) from error
    return [dict(zip(header, row, strict=True)) for row in rows]
