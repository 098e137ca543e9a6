"""A run's log: JSON lines, one a logged step or an epoch, and the epochs as CSV."""

import csv
import json
from pathlib import Path
from typing import Any

from pipeline.errors import unwritable
from pipeline.files import replacing


class Log:
    """JSON lines, one a logged step or an epoch; a resumed run drops what it will do again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, step: int, **values: Any) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise unwritable(f"{self.path}:", error) from error

    def rewind(self, step: int) -> None:
        """Keep the steps before `step`, and the epochs that had ended by then."""
        lines = read_log(self.path)
        kept = [x for x in lines if x["step"] < step or (x["kind"] == "epoch" and x["step"] == step)]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def write_curve(path: Path, log: Path) -> None:
    """A log's epochs as CSV, for `dvc plots` and the report; validation only where there was one."""
    epochs = [line for line in read_log(log) if line["kind"] == "epoch"]
    columns = list(dict.fromkeys(key for line in epochs for key in line if key not in ("kind", "step", "speed")))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(epochs)
