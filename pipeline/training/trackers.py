"""Experiment trackers that a run's log.jsonl is copied to: TensorBoard, W&B and others with its interface.

A tracker gets every line of the log once, however often the run is resumed. None is imported unless it is configured,
and none can stop a training run: one that fails is reported and disabled.
"""

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.common.errors import UsageError
from pipeline.common.progress import print_line
from pipeline.config.paths import tensorboard_folder
from pipeline.config.schema import Config, Logging
from pipeline.config.validation import fingerprint, flatten
from pipeline.training.identity import run_summary

Line = dict[str, Any]
"""A line of log.jsonl."""


class Tracker(Protocol):
    """Receives the lines of a log, in order; after a resumption those before it are repeated."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in a folder of their own, which are written again when a run is resumed."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard.writer import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # an open TensorBoard drops what it has read of the old files
        self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=30)

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"], walltime=line.get("time"))

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A module with the functions init, log and finish of wandb, such as trackio.

    What was sent cannot be taken back, so the position in the log is recorded next to it.
    """

    def __init__(self, module: str, project: str, folder: Path, **about: Any):
        """`about` holds additional arguments of init; those that it does not take are left out."""
        self.module = importlib.import_module(module)
        self.sent_path = folder / f"sent-{fingerprint([module, project])[:8]}"
        self.sent = self._read_sent()
        arguments = {"project": project, "resume": "allow", **about}
        known = inspect.signature(self.module.init).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
            arguments = {key: value for key, value in arguments.items() if key in known}
        self.module.init(**arguments)

    def write(self, line: Line) -> None:
        position = _position(line)
        if position <= self.sent:
            return
        self.sent = position
        with open(self.sent_path, "a") as file:  # before it is sent: a kill in between loses a line, and repeats none
            file.write("{} {}\n".format(*position))
        self.module.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self.module.finish()

    def _read_sent(self) -> tuple[int, int]:
        lines = self.sent_path.read_text().split("\n")[:-1] if self.sent_path.exists() else []
        positions = [line.split() for line in lines]
        return max([(int(step), int(kind)) for step, kind in positions], default=(-1, 0))


def _position(line: Line) -> tuple[int, int]:
    """Where a line is in the log: an epoch's step is the first of the next epoch, whose line follows."""
    return line["step"], int(line["kind"] == "step")


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line by name: step/loss, epoch/val_top1_class, epoch/speed/samples_per_s, ..."""
    return {
        f"{line['kind']}/{key.replace('.', '/')}": value
        for key, value in flatten(line).items()
        if isinstance(value, int | float) and key not in ("step", "time")
    }


Trackers = dict[str, Callable[[], Tracker]]
"""What opens each tracker, by its configuration key."""


def configured_trackers(config: Config, name: str, identity: dict[str, Any], state: Path) -> Trackers:
    """The trackers of a run; each opens when it is called.

    Args:
        name: the run's.
        state: its state folder.
    """
    logging, run_id = config.logging, fingerprint(identity)
    found: Trackers = {}
    label = f"{name.replace(' ', '-')}-{run_id[:8]}"
    if logging.tensorboard:
        found["logging.tensorboard"] = lambda: TensorBoardTracker(tensorboard_folder(config, label))
    if project := logging.wandb:
        about = {"name": label, "id": run_id, "group": config.name, "config": run_summary(identity)}
        found["logging.wandb"] = lambda: WandbTracker(logging.module, project, state, **about)
    return found


class OpenTrackers:
    """The trackers of a run while it is trained."""

    def __init__(self, trackers: Trackers, lines: Sequence[Line]):
        """Open them and write the lines that the log has so far."""
        self.open: dict[str, Tracker] = {}
        for key, create in trackers.items():
            with self._drop_if_it_fails(key):
                self.open[key] = tracker = create()
                for line in lines:
                    tracker.write(line)

    def write(self, line: Line) -> None:
        for key, tracker in list(self.open.items()):
            with self._drop_if_it_fails(key):
                tracker.write(line)

    def close(self) -> None:
        for key, tracker in list(self.open.items()):
            with self._drop_if_it_fails(key):
                tracker.close()
        self.open.clear()

    @contextlib.contextmanager
    def _drop_if_it_fails(self, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # trackers may raise anything
            self.open.pop(key, None)
            print_line(f"warning: {key} failed and has been disabled: {type(error).__name__}: {error}")


def check_trackers(logging: Logging) -> None:
    """Check that the packages of the configured trackers are installed, without importing them.

    Raises:
        UsageError: one is not.
    """
    wanted = {"logging.tensorboard": "tensorboard"} if logging.tensorboard else {}
    wanted |= {"logging.wandb": logging.module.partition(".")[0]} if logging.wandb else {}
    for key, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                key, expected=f"the package {package}", found="it is not installed",
                do=f"pip install {package}, or remove {key} from params.yaml",
            )  # fmt: skip
