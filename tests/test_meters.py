"""Measurements of a run's speed."""

import pytest
import torch

from pipeline.training.meters import Throughput, loader_warning, reset_peak_memory


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_snapshot_covers_the_time_since_the_last():
    clock = Clock()
    speed = Throughput(clock)
    for _ in range(2):
        speed.add_batch(views=12, decodes=4, waited=0.5)
        speed.add_step(24)
        clock.now += 4
        values = speed.snapshot()
        assert values["samples_per_s"] == 6 and values["seconds"] == 4 and values["wait_s"] == 0.5
        assert values["views_per_decode"] == 3


def test_counting_goes_on_from_a_checkpoint():
    clock = Clock()
    first, second = Throughput(clock), Throughput(clock)
    first.add_batch(views=12, decodes=4, waited=0.5)
    first.add_step(24)
    clock.now += 4
    state = first.state_dict()
    clock.now += 100  # until the process is started again
    second.load_state_dict(state)
    clock.now += 2
    assert second.snapshot() == {"samples_per_s": 4, "seconds": 6, "wait_s": 0.5, "views_per_decode": 3}


def test_views_per_decode_is_left_out_where_nothing_was_decoded():
    assert "views_per_decode" not in Throughput(Clock()).snapshot()


@pytest.mark.parametrize(("waited", "warned"), [(0.0, False), (0.9, False), (1.0, True), (9.0, True)])
def test_the_loader_is_warned_of_where_a_tenth_of_the_time_is_waiting(waited, warned):
    warning = loader_warning({"wait_s": 10 * waited, "seconds": 100.0, "views_per_decode": 1.5}, 3)
    assert bool(warning) == warned
    assert not warned or (f"{waited / 10:.0%} of the epoch" in warning and "(3 workers, 1.50 views per decode)" in warning)


def test_there_is_no_warning_of_the_loader_after_a_short_time():
    assert not loader_warning({"wait_s": 20.0, "seconds": 20.0}, 3)


def test_the_peak_of_a_gpus_memory_is_reported_until_it_is_reset(monkeypatch):
    found, names = [5 * 2**20], ("max_memory_allocated", "reset_peak_memory_stats")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, names[0], lambda: found[-1])
    monkeypatch.setattr(torch.cuda, names[1], lambda: found.append(0))
    assert Throughput(Clock()).snapshot()["gpu_mib"] == 5
    reset_peak_memory()
    assert Throughput(Clock()).snapshot()["gpu_mib"] == 0


def test_without_a_gpu_in_use_its_memory_is_not_asked_for():
    reset_peak_memory()
    assert "gpu_mib" not in Throughput(Clock()).snapshot()
