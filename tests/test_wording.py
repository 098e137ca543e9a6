"""Numbers in messages agree with their nouns, and have units that fit."""

import pytest

from pipeline.common.wording import count_of, size_of


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "shard", "1 shard"), (0, "shard", "0 shards"), (1280, "image", "1,280 images"), (2, "class", "2 classes")],
)
def test_a_noun_is_in_the_plural_unless_there_is_one(number, noun, text):
    assert count_of(number, noun) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"), (884, "884 B"), (999, "999 B"), (999.6, "1 kB"), (8_840, "8.84 kB"), (13_000_000, "13 MB"), (99_960_000, "100 MB"),
        (999_600_000, "1 GB"), (830_000_000, "830 MB"), (1_200_000_000_000, "1,200 GB"),
    ],
)  # fmt: skip
def test_a_size_has_three_digits_in_the_largest_unit_that_fits(number, text):
    assert size_of(number) == text
