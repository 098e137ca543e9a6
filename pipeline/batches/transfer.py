"""Asynchronous copies between host and device."""

from collections.abc import Iterable, Iterator

import torch

from pipeline.batches.batch import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield each batch on the device; a GPU copies it on a separate stream while it computes the previous step."""
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        computing.wait_stream(copying)
        for tensor in moved.tensors().values():
            tensor.record_stream(computing)
        yield moved


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device without waiting for the work queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class DeviceToHostCopy:
    """A copy of small tensors from the device, which meanwhile continues with the work queued after it."""

    def __init__(self, *tensors: torch.Tensor):
        self.host, self.arrived = tensors, None
        if tensors[0].device.type == "cuda":
            self.host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
            for host, tensor in zip(self.host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.Event(blocking=True)  # sleep while waiting: the workers need the cores
            self.arrived.record()

    def get(self) -> list[torch.Tensor]:
        """The tensors on the CPU; waits for the work queued before the copy, not for work queued since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return list(self.host)
