"""What a run measures of itself."""

import pytest
import torch

from pipeline.meters import Fetched, Speed, loader_limits


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
        told = speed.told()
        assert told["samples_per_s"] == 6 and told["seconds"] == 4 and told["wait_s"] == 0.5
        assert told["views_a_decoding"] == 3


def test_views_a_decoding_is_left_out_where_nothing_was_decoded():
    assert "views_a_decoding" not in Speed(Clock()).told()


@pytest.mark.parametrize(("waited", "limits"), [(0.0, False), (0.9, False), (1.0, True), (9.0, True)])
def test_loader_limits_where_a_tenth_of_the_time_is_waiting(waited, limits):
    assert loader_limits({"wait_s": 10 * waited, "seconds": 100.0}) == limits


def test_short_time_tells_nothing_of_the_loader():
    assert not loader_limits({"wait_s": 20.0, "seconds": 20.0})


def test_fetched_tensors_come_with_their_values_and_types():
    sent = [torch.tensor([1.5, -2.0]), torch.tensor([[3]], dtype=torch.int16)]
    found = Fetched(*sent).get()
    assert [x.dtype for x in found] == [x.dtype for x in sent]
    assert all(torch.equal(x, y) for x, y in zip(found, sent, strict=True))
