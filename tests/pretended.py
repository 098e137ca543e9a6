"""A GPU that is only pretended: tensors with shapes, types and devices but no values, and a diary of what was asked.

Under torch's FakeTensorMode, told that a CUDA device exists, operands of two devices raise a RuntimeError, and so does
whatever would make the host wait for a value (.item(), bool(), .tolist(), .numpy(), nonzero). Streams, events, pinned
memory and copies are noted. Kernels, autograd's engine and the driver are not there: a backward pass fills gradients.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@dataclass
class Diary:
    """What was asked of the device, in order."""

    notes: list[tuple] = field(default_factory=list)
    streams: list["Stream"] = field(default_factory=list)
    """The current one is last."""
    parameters: Callable[[], Iterator[torch.nn.Parameter]] = lambda: iter(())
    """Whose gradients a backward pass fills."""

    def note(self, *what) -> None:
        self.notes.append(what)

    def of(self, kind: str) -> list[tuple]:
        """The notes of a kind, less its name."""
        return [note[1:] for note in self.notes if note[0] == kind]


class Stream:
    def __init__(self, diary: Diary, name: str):
        self.diary, self.name = diary, name

    def wait_stream(self, other: "Stream") -> None:
        self.diary.note("stream waits", self.name, other.name)

    def synchronize(self) -> None:
        self.diary.note("host waits", self.name)


def event_class(diary: Diary) -> type:
    class Event:
        def __init__(self, blocking: bool = False, **_):
            self.blocking = blocking

        def record(self, *_) -> None:
            diary.note("event", diary.streams[-1].name)

        def synchronize(self) -> None:
            diary.note("host waits", "event, asleep" if self.blocking else "event, busy")

    return Event


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Diary]:
    diary = Diary()
    diary.streams.append(Stream(diary, "computing"))

    @contextlib.contextmanager
    def stream(chosen: Stream):
        diary.streams.append(chosen)
        yield
        diary.streams.pop()

    def pin(tensor: torch.Tensor, *_) -> torch.Tensor:
        assert tensor.device.type == "cpu"
        pinned = tensor.clone()
        pinned.in_pinned_memory = True
        return pinned

    move, copy, empty, module_to = torch.Tensor.to, torch.Tensor.copy_, torch.empty, torch.nn.Module.to

    def place(tensor: torch.Tensor) -> str:
        if tensor.device.type == "cuda":
            return "device"
        return "pinned" if getattr(tensor, "in_pinned_memory", False) else "pageable"

    def noted(source: torch.Tensor, target: torch.Tensor, waits: bool) -> None:
        if (source.device.type == "cuda") != (target.device.type == "cuda"):
            how = "waiting" if waits else "passing by"
            diary.note("copy", place(source), place(target), how, diary.streams[-1].name)

    def to(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        moved = move(tensor, *args, **kwargs)
        noted(tensor, moved, not kwargs.get("non_blocking", False))
        return moved

    def copy_(tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        noted(source, tensor, not non_blocking)
        return copy(tensor, source, non_blocking)

    def pinned_empty(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        made = empty(*args, **kwargs)
        if pin_memory:
            made.in_pinned_memory = True
        return made

    def keep_format(module: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
        fake = any(isinstance(parameter, FakeTensor) for parameter in module.parameters())
        # fake weights cannot be exchanged for others of another layout
        return module if fake and set(kwargs) == {"memory_format"} else module_to(module, *args, **kwargs)

    def backward(loss: torch.Tensor, *_, **__) -> None:
        assert loss.requires_grad and loss.device.type == "cuda"
        for parameter in diary.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    answers = {
        "is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0, "manual_seed": None,
        "manual_seed_all": None, "get_device_capability": (9, 0),
    }  # fmt: skip
    changes = [
        *(mock.patch.object(torch.cuda, name, lambda *_, found=found, **__: found) for name, found in answers.items()),
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        mock.patch("torch.cuda.Stream", lambda *_, **__: Stream(diary, "copying")),
        mock.patch("torch.cuda.current_stream", lambda *_: diary.streams[-1]),
        mock.patch("torch.cuda.stream", stream),
        mock.patch("torch.cuda.Event", event_class(diary)),
        mock.patch("torch.cuda.synchronize", lambda *_: diary.note("host waits", "device")),
        mock.patch("torch.empty", pinned_empty),
        mock.patch.object(torch.Tensor, "record_stream", lambda *_: diary.note("kept for", _[1].name)),
        mock.patch.object(torch.Tensor, "pin_memory", pin),
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch.object(torch.Tensor, "copy_", copy_),
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch.object(torch.nn.Module, "to", keep_format),
    ]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield diary
