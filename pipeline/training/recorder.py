"""The record of a run: log.jsonl, experiment trackers, and what is printed."""

from typing import Any

from pipeline.common.cores import resolve_workers
from pipeline.common.progress import print_line
from pipeline.training.log import Log, read_log
from pipeline.training.meters import loader_warning
from pipeline.training.monitoring import accuracy_warning, describe_epoch
from pipeline.training.run import Run
from pipeline.training.trackers import OpenTrackers


class Recorder:
    """Records a run's progress, on rank 0; on other ranks it does nothing."""

    def __init__(self, run: Run, rank: int):
        self.run = run
        self.log = Log(run.folder / "log.jsonl") if rank == 0 else None
        self.trackers = OpenTrackers({}, [])
        self.warned: set[str] = set()

    def start(self, step: int) -> None:
        """Remove the lines that an earlier attempt logged after `step`, where the run resumes, and open the trackers."""
        if not self.log:
            return
        self.log.truncate(step)
        if step:
            print(f"{self.run.name}: resumes at step {step} of {self.run.steps}")
        self.trackers = OpenTrackers(self.run.trackers, read_log(self.log.path) if self.run.trackers else [])

    def write_step(self, step: int, values: dict[str, float]) -> None:
        self._write("step", step, epoch=self.run.plan.epoch(step), **values)

    def write_epoch(self, step: int, metrics: dict[str, Any], speed: dict[str, float]) -> None:
        """Log an epoch that ended before `step`; print its metrics, if it was validated, and warnings."""
        if not self.log:
            return
        self._write("epoch", step, **metrics, speed=speed)
        if "validation" in metrics:
            print_line(describe_epoch(self.run, metrics))
        workers = resolve_workers(self.run.settings.workers, self.run.device.type == "cuda")
        self._warn("loader", loader_warning(speed, workers))
        self._warn("accuracy", accuracy_warning(self.run, metrics))

    def sync(self) -> None:
        """Flush the log to disk."""
        if self.log:
            self.log.sync()

    def close(self) -> None:
        """Close the trackers."""
        self.trackers.close()

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if self.log:
            self.trackers.write(self.log.write(kind, step, **values))

    def _warn(self, kind: str, text: str) -> None:
        """Print a warning, if there is one, the first time that it occurs."""
        if text and kind not in self.warned:
            self.warned.add(kind)
            print_line(f"warning: {text}")
