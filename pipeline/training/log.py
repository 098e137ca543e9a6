"""A run's log: JSON lines, one a logged step or an epoch, and the epochs as CSV; each line under a checksum."""

import csv
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError, unwritable
from pipeline.common.files import atomic_write
from pipeline.config.validation import short_repr

CHECK = "check"  # a line's last key, and a curve's last column


class Log:
    """JSON lines, one a logged step or an epoch; a resumed run drops what it will do again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, step: int, **values: Any) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(_line({"kind": kind, "step": step, **values}))
        except OSError as error:
            raise unwritable(f"{self.path}:", error) from error

    def sync(self) -> None:
        """Onto the disk; before a checkpoint is, so that no run goes on from a step whose epochs are lost."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Keep the steps before `step`, and the epochs that had ended by then.

        Raises:
            PipelineError: a line is damaged.
        """
        lines = read_log(self.path)
        kept = [x for x in lines if x["step"] < step or (x["kind"] == "epoch" and x["step"] == step)]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(map(_line, kept)))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values | {CHECK: _crc(json.dumps(values))}) + "\n"


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out.

    Raises:
        PipelineError: another line is not as it was written.
    """
    lines = []
    *whole, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, text in enumerate(whole, 1):
        values = parse_line(text)
        if values is None:
            raise PipelineError(
                f"{path}: line {number} is damaged",
                expected="a line under its checksum, as it was written",
                found=short_repr(text),
                do="delete that line, or the whole file: curves then lack what it told",
            )
        lines.append(values)
    last = parse_line(rest)
    return lines if last is None else [*lines, last]


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line of a log; None where it is not as it was written."""
    try:
        values = json.loads(text)
        check = values.pop(CHECK)
        return values if check == _crc(json.dumps(values)) else None
    # of the last three, JSON that is no object, or is one without a checksum
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError, IndexError):
        return None


def write_curve(path: Path, log: Path | None = None, last: dict[str, Any] | None = None) -> None:
    """A log's epochs as CSV, for `dvc plots` and the report; validation only where there was one.

    Args:
        last: what the last epoch came to, as it is published: what was validated on other images than that is left
            out. Without it and a log, of a model that was not trained here: a curve without epochs.

    Raises:
        PipelineError: the log is damaged.
    """
    epochs: list[dict[str, Any]] = []
    if log and last:
        logged = [line for line in read_log(log) if line["kind"] == "epoch" and line["epoch"] < last["epoch"]]
        epochs = [*(_validated_as(last, line) for line in logged), last]
    told = dict.fromkeys(key for line in epochs for key in line if key not in NOT_IN_CURVE)
    header = list(told) or EMPTY
    rows = [["" if line.get(key) is None else str(line[key]) for key in header] for line in epochs]
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, CHECK])
        writer.writerows([*row, check] for row, check in zip(rows, _chain(header, rows), strict=True))


def _validated_as(last: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    same = line.get("validation") == last["validation"]
    return line if same else {key: value for key, value in line.items() if "val_" not in key}


NOT_IN_CURVE = ("kind", "step", "speed", "validation")
EMPTY = ["epoch", "loss"]  # columns of a curve without epochs


def _chain(header: list[str], rows: list[list[str]]) -> list[str]:
    """A checksum a row, of all up to it; the last row's says that it is the last."""
    checks, before = [], _crc("\x1f".join(header))
    for number, row in enumerate(rows, 1):
        before = _crc("\x1f".join([before, *row, "last" if number == len(rows) else ""]))
        checks.append(before)
    return checks


def read_curve(path: Path) -> list[dict[str, str]]:
    """The epochs that `write_curve` wrote: of each, a text by column; empty where it tells nothing.

    Raises:
        PipelineError: it is not as it was written.
    """
    try:
        table = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline=""), strict=True))
        (*header, mark), rows = table[0], [row[:-1] for row in table[1:]]
        sound = mark == CHECK and all(len(row) == len(header) for row in rows) and (rows or header == EMPTY)
        if not sound or [row[-1] for row in table[1:]] != _chain(header, rows):
            raise ValueError("it has another checksum")
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise PipelineError(
            f"{path}: the curve is damaged",
            expected="rows under their checksums, as they were written",
            found=str(error),
            do="run the stage that makes it again, by its command or by dvc repro: it trains nothing anew",
        ) from error
    return [dict(zip(header, row, strict=True)) for row in rows]
