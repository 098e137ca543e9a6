"""What SIGTERM (preemption) and SIGINT (Ctrl-C) do: a training saves first, a writer gives its lease back."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from pipeline.common.errors import PipelineError


class Interrupted(PipelineError):
    """A signal came, here or to another rank; a checkpoint was saved and the same command goes on from it."""

    def __init__(self, name: str, step: int, came: signal.Signals | None):
        number = came or signal.SIGTERM
        super().__init__(f"{name}: ended by {number.name} at step {step}; the same command goes on from there")
        self.exit_code = 128 + number


AGAIN = {signal.SIGTERM: "", signal.SIGINT: "; Ctrl-C once more ends it at once, without saving"}


class SignalRecorder:
    """Notes SIGTERM and Ctrl-C instead of dying of them, so that a checkpoint can be saved.

    A second Ctrl-C, a second or more after the first, is heeded at once. A SIGTERM never is: the first may come
    several times, from a scheduler to all processes and from torchrun to its own.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "SignalRecorder":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            # print may be what it interrupts, and cannot be entered twice
            os.write(2, f"\n{self.received.name}: saves after this step, then ends{AGAIN[self.received]}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since >= 1:
            raise KeyboardInterrupt

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, by an exception: SystemExit(143)."""

    def end(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ended by SIGTERM; the same command goes on from what is there", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # only there may it be asked for
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def ignore_job_signals() -> None:
    """For a loader's worker: SIGTERM ends it only where its parent sends it, Ctrl-C never.

    A scheduler signals all processes of a job at once, and a worker that dies of it takes the process with it that is
    to save. That one ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return  # macOS cannot tell who sent a signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before there are other threads: they inherit it
    threading.Thread(target=_end_by, args=(parent.pid,), daemon=True).start()


def exit_with_parent() -> None:
    """For a pool's worker: it ends as soon as its parent has, however that ended, and of Ctrl-C without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has one"
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(parent: int) -> None:
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _end_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
