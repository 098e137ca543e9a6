"""Defaults that depend on the machine (workers, threads), and progress in logs instead of bars."""

import os
import signal
import sys

import pytest
import torch

from pipeline.common.cores import available_cores, limit_threads, resolve_workers
from pipeline.common.progress import LogProgress, progress
from pipeline.common.signals import SignalRecorder
from pipeline.config.schema import Config


@pytest.fixture
def sixteen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_workers_follow_the_machine_unless_they_are_chosen(sixteen, monkeypatch):
    assert (resolve_workers(None, False), resolve_workers(None, True), resolve_workers(3, True), resolve_workers(0, True)) == (8, 15, 3, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # ranks of this machine share its cores
    assert (resolve_workers(None, False), resolve_workers(None, True)) == (1, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert (available_cores(), resolve_workers(None, False), resolve_workers(None, True)) == (1, 0, 0)


def test_no_default_has_more_workers_than_there_are_cores():
    config = Config()
    sections = (config.data, config.teacher, config.teacher_logits, config.student, config.finetune, config.evaluate)
    assert [section.workers for section in sections] == [None] * 6


@pytest.mark.parametrize(("workers", "threads"), [(0, 16), (5, 11), (16, 1), (40, 1)])
def test_torch_has_the_cores_that_workers_leave(sixteen, monkeypatch, workers, threads):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    limit_threads(workers)
    assert chosen == [threads]


def test_a_chosen_number_of_threads_stays(sixteen, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("another number"))
    limit_threads(0)


def test_a_log_has_a_line_a_minute_with_loss_and_time_left(capsys):
    now = 0.0
    with LogProgress(600, 0, "student hard", "step", clock=lambda: now) as bar:
        for step in range(300):
            now += 1.0
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 300 / 60 + 1
    assert lines[1] == "student hard: 120 of 600 steps, 1 steps/s, 08:00 left, loss 119"
    assert not any("\r" in line for line in lines)


@pytest.mark.parametrize(
    ("total", "initial", "done", "said"),
    [
        (1_000, 900, 60, "960 of 1,000 steps, 1 steps/s, 00:40 left"),
        (1_000_000, 0, 900_000, "900,000 of 1,000,000 steps, 15,000 steps/s, 00:06 left"),
    ],
    ids=["a resumed loop: its current speed", "a high rate: without an exponent"],
)
def test_the_first_line_of_a_log_tells_speed_and_time_left(total, initial, done, said, capsys):
    now = 0.0
    with LogProgress(total, initial, "student hard", "step", clock=lambda: now) as bar:
        now = 60.0
        bar.update(done)
    assert said in capsys.readouterr().err.splitlines()[0]


def test_a_bar_is_for_terminals_and_one_rank_alone(monkeypatch):
    assert isinstance(progress(3, "x", "step"), LogProgress)
    with progress(3, "x", "step", enabled=False) as bar:
        assert bar.disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(3, "x", "step") as bar:
        assert not isinstance(bar, LogProgress)


@pytest.mark.parametrize(("number", "hint"), [(signal.SIGINT, "again to end now"), (signal.SIGTERM, "saving")])
def test_a_signal_is_acknowledged_at_once(capfd, number, hint):
    with SignalRecorder() as recorder:
        os.kill(os.getpid(), number)
        said = capfd.readouterr().err  # before the step that was going on has ended
    assert recorder.received == number and number.name in said and hint in said
