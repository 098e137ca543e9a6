"""What a run measures of itself."""

import pytest
import torch

from pipeline.training.meters import Speed, is_loader_bound, reset_peak_memory


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_of_the_time_since_it_was_told_last():
    clock = Clock()
    speed = Speed(clock)
    for _ in range(2):
        speed.rendered(views=12, decodes=4, waited=0.5)
        speed.stepped(24)
        clock.now += 4
        told = speed.snapshot()
        assert told["samples_per_s"] == 6 and told["seconds"] == 4 and told["wait_s"] == 0.5
        assert told["views_per_decode"] == 3


def test_views_a_decoding_is_left_out_where_nothing_was_decoded():
    assert "views_per_decode" not in Speed(Clock()).snapshot()


@pytest.mark.parametrize(("waited", "limits"), [(0.0, False), (0.9, False), (1.0, True), (9.0, True)])
def test_loader_limits_where_a_tenth_of_the_time_is_waiting(waited, limits):
    assert is_loader_bound({"wait_s": 10 * waited, "seconds": 100.0}) == limits


def test_short_time_tells_nothing_of_the_loader():
    assert not is_loader_bound({"wait_s": 20.0, "seconds": 20.0})


def test_the_peak_of_a_gpus_memory_is_told_until_it_is_forgotten(monkeypatch):
    found, names = [5 * 2**20], ("max_memory_allocated", "reset_peak_memory_stats")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, names[0], lambda: found[-1])
    monkeypatch.setattr(torch.cuda, names[1], lambda: found.append(0))
    assert Speed(Clock()).snapshot()["gpu_mib"] == 5
    reset_peak_memory()
    assert Speed(Clock()).snapshot()["gpu_mib"] == 0


def test_without_a_gpu_in_use_its_memory_is_not_asked_for():
    reset_peak_memory()
    assert "gpu_mib" not in Speed(Clock()).snapshot()
