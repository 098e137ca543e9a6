"""Measurements of a run's speed, and the warning that follows from them."""

import time
from collections.abc import Callable

import torch


class Throughput:
    """Counts samples, waiting and decodes since the last snapshot."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._reset()

    def _reset(self) -> None:
        self.start, self.samples, self.waited, self.views, self.decodes = self.clock(), 0, 0.0, 0, 0

    def add_batch(self, views: int, decodes: int, waited: float) -> None:
        """Count this rank's views, the images decoded for them, and the seconds that it waited for them."""
        self.views, self.decodes, self.waited = self.views + views, self.decodes + decodes, self.waited + waited

    def add_step(self, samples: int) -> None:
        """Count a step's samples, those of all ranks."""
        self.samples += samples

    def snapshot(self) -> dict[str, float]:
        """What was counted since the last snapshot; counting then starts again from zero.

        Returns:
            `samples_per_s` of all ranks; `seconds` in total and `wait_s` of them, `views_per_decode`, and the peak
            memory of a GPU in use, `gpu_mib`, since `reset_peak_memory`: of this rank.
        """
        seconds = max(self.clock() - self.start, 1e-9)
        values = {"samples_per_s": self.samples / seconds, "seconds": seconds, "wait_s": self.waited}
        if self.decodes:
            values["views_per_decode"] = self.views / self.decodes
        if torch.cuda.is_initialized():
            values["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self._reset()
        return {name: round(value, 3) for name, value in values.items()}

    def state_dict(self) -> dict[str, float]:
        """What was counted since the last snapshot, for a checkpoint."""
        counts = {"samples": self.samples, "waited": self.waited, "views": self.views, "decodes": self.decodes}
        return {"seconds": self.clock() - self.start, **counts}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting from what `state_dict` returned."""
        self.start = self.clock() - state["seconds"]
        self.samples, self.waited = int(state["samples"]), state["waited"]
        self.views, self.decodes = int(state["views"]), int(state["decodes"])


class Meters:
    """Throughput since the last logged step, and since the start of the epoch."""

    def __init__(self):
        self.steps, self.epoch = Throughput(), Throughput()

    def add_batch(self, views: int, decodes: int, waited: float) -> None:
        """See `Throughput.add_batch`."""
        self.steps.add_batch(views, decodes, waited)
        self.epoch.add_batch(views, decodes, waited)

    def add_step(self, samples: int) -> None:
        """See `Throughput.add_step`."""
        self.steps.add_step(samples)
        self.epoch.add_step(samples)

    def restart(self) -> None:
        """Count from zero: the time since the last snapshot belongs to no step."""
        self.steps.snapshot()
        self.epoch.snapshot()


def reset_peak_memory() -> None:
    """Measure the peak of a GPU's memory from now on, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def loader_warning(speed: dict[str, float], workers: int) -> str:
    """A warning if a tenth of an epoch or more was spent waiting for views; otherwise, or below 30 s, empty.

    Args:
        speed: a snapshot.
        workers: of the loader, per rank.
    """
    waited = speed["wait_s"] / speed["seconds"]
    if speed["seconds"] < 30 or waited < 0.1:
        return ""
    sharing = f", {speed['views_per_decode']:.2f} views per decode" if "views_per_decode" in speed else ""
    return (
        f"{waited:.0%} of the epoch was spent waiting for views ({workers} workers{sharing}). Where cores are idle, more"
        " workers help; so do fewer accumulation steps, in whose larger slices more views share a decoded image"
    )
