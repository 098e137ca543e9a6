"""SIGTERM and Ctrl-C: training records the first one; a loader worker obeys only its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.common.signals import SignalRecorder

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]])
def test_the_first_signal_is_recorded_and_those_with_it_end_nothing(numbers):
    with SignalRecorder() as recorder:
        for number in numbers:
            os.kill(os.getpid(), number)
    assert recorder.received == numbers[0]


def test_a_later_ctrl_c_interrupts_at_once(monkeypatch):
    later = time.monotonic() + 2
    with pytest.raises(KeyboardInterrupt), SignalRecorder():
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("pipeline.common.signals.time.monotonic", lambda: later)
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with SignalRecorder():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


WORKER = """
import multiprocessing, sys, time
from pipeline.common.signals import ignore_job_signals

def work(ready):
    ignore_job_signals()
    ready.set()
    time.sleep(60)

ready = multiprocessing.get_context("fork").Event()
worker = multiprocessing.get_context("fork").Process(target=work, args=(ready,), daemon=True)
worker.start()
ready.wait()
print(worker.pid, flush=True)
sys.stdin.readline()
lived = worker.is_alive()
worker.terminate()
worker.join()
print(lived, worker.exitcode, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_is_ended_by_its_parent_alone(number):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, **pipes) as process:
        os.kill(int(process.stdout.readline()), number)
        time.sleep(0.2)
        said, _ = process.communicate("go on\n", timeout=30)
    assert said == "True 143\n"
