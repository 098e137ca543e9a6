"""What a run tells of itself: results fetched without holding up the device, and its speed."""

import time
from collections.abc import Callable

import torch


class Speed:
    """Samples, waiting and decodings since `snapshot` was called last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._begin()

    def _begin(self) -> None:
        self.start, self.samples, self.waited, self.views, self.decodes = self.clock(), 0, 0.0, 0, 0

    def rendered(self, views: int, decodes: int, waited: float) -> None:
        """This rank's views of a slice, the images decoded for them, and seconds that it waited for them."""
        self.views, self.decodes, self.waited = self.views + views, self.decodes + decodes, self.waited + waited

    def stepped(self, samples: int) -> None:
        """A step over so many samples, of all ranks."""
        self.samples += samples

    def snapshot(self) -> dict[str, float]:
        """Samples a second of all ranks; of this rank, seconds of it all and of waiting, views a decoding.

        On a GPU the peak of its memory since `reset_peak_memory` too, in MiB. Counting begins anew.
        """
        seconds = max(self.clock() - self.start, 1e-9)
        told = {"samples_per_s": self.samples / seconds, "seconds": seconds, "wait_s": self.waited}
        if self.decodes:
            told["views_per_decode"] = self.views / self.decodes
        if torch.cuda.is_initialized():
            told["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self._begin()
        return {name: round(value, 3) for name, value in told.items()}


def reset_peak_memory() -> None:
    """Let the peak of a GPU's memory be from now on, where one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def is_loader_bound(told: dict[str, float]) -> bool:
    """Whether a tenth of the time or more went into waiting for views; half a minute at least is needed to tell."""
    return told["seconds"] >= 30 and told["wait_s"] >= 0.1 * told["seconds"]
