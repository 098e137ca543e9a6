"""Wording of messages."""


def count_of(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless there is one: 1 shard, 1,280 shards."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
