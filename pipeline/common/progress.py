"""Progress of long loops: a bar on a terminal, one line per minute elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from pipeline.common.wording import three_digits


class LogProgress:
    """Progress for a log: a line per minute and one at the end, with speed, time left and a note."""

    EVERY = 60.0  # seconds

    def __init__(self, total: int, initial: int, desc: str, unit: str, clock: Callable[[], float] = time.monotonic):
        self.total, self.done, self.desc, self.unit, self.clock = total, initial, desc, unit, clock
        self.first, self.start, self.printed, self.note = initial, clock(), clock(), ""

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.clock() - self.printed >= self.EVERY:
            self._print()

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        """Set the note of the next line; `refresh` is tqdm's and ignored."""
        self.note = note

    def _print(self) -> None:
        self.printed = self.clock()
        rate = (self.done - self.first) / max(self.printed - self.start, 1e-9)
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        parts = [f"{self.done:,} of {self.total:,} {self.unit}s", f"{three_digits(rate)} {self.unit}s/s", f"{left} left"]
        print(f"{self.desc}: " + ", ".join(filter(None, [*parts, self.note])), file=sys.stderr, flush=True)

    def __enter__(self) -> "LogProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.done > self.first:
            self._print()


def progress(total: int, desc: str, unit: str, initial: int = 0, enabled: bool = True) -> LogProgress | tqdm:
    """A context manager with `update(count)` and `set_postfix_str(note, refresh=False)`."""
    if enabled and not sys.stderr.isatty():
        return LogProgress(total, initial, desc, unit)
    options = {"unit_scale": True, "mininterval": 1, "disable": not enabled}
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, **options)


def print_line(line: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)
