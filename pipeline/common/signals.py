"""SIGTERM (preemption) and SIGINT (Ctrl-C): training saves a checkpoint first, a writer gives its lease back."""

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
    """This or another rank received a signal; a checkpoint was saved, from which the same command resumes."""

    def __init__(self, name: str, step: int, received: signal.Signals | None):
        number = received or signal.SIGTERM
        super().__init__(f"{name}: ended by {number.name} at step {step}; the same command resumes from there")
        self.exit_code = 128 + number


HINTS = {signal.SIGTERM: "", signal.SIGINT: "; press Ctrl-C again to end now without saving"}


class SignalRecorder:
    """Context manager that records SIGTERM and Ctrl-C, so that a checkpoint can be saved before the process ends.

    A second Ctrl-C, at least a second after the first, raises KeyboardInterrupt. A second SIGTERM is ignored: a
    scheduler may send it to all processes and torchrun to its own.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "SignalRecorder":
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _record(self, number: int, _) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            # print is not reentrant, and may be what the signal interrupted
            os.write(2, f"\n{self.received.name}: saving after this step, then ending{HINTS[self.received]}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since >= 1:
            raise KeyboardInterrupt

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) in the block, as Ctrl-C raises KeyboardInterrupt."""

    def end(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ended by SIGTERM; the same command resumes from what is complete", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # signal.signal works there only
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def ignore_job_signals() -> None:
    """In a loader worker, ignore Ctrl-C, and SIGTERM from any process but the parent.

    A scheduler signals all processes of a job at once, and the death of a worker would end the main process before it
    can save. The main process ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before other threads start: they inherit the mask
    threading.Thread(target=_exit_on_sigterm_from, args=(parent.pid,), daemon=True).start()


def exit_with_parent() -> None:
    """In a pool worker, exit as soon as the parent has, however it ended, and silently on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker process"
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
