"""Numbers in messages agree with their nouns."""

import pytest

from pipeline.common.wording import count_of


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "shard", "1 shard"), (0, "shard", "0 shards"), (1280, "image", "1,280 images"), (2, "class", "2 classes")],
)
def test_a_noun_is_in_the_plural_unless_there_is_one(number, noun, text):
    assert count_of(number, noun) == text
