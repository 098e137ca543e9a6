"""Counter-based random streams: Philox keyed by BLAKE2b of (seed, stream, identity).

Nothing here depends on a position in a list, a worker or the state of a global generator. Only raw words are drawn,
because numpy may change its distributions; callers derive values from them by formulas of their own.
"""

import hashlib
import threading

import numpy as np


def stream_key(seed: int, stream: str, identity: str) -> bytes:
    """The 128-bit key of one stream of one identity; names of streams contain no unit separator."""
    return hashlib.blake2b(f"{seed}\x1f{stream}\x1f{identity}".encode(), digest_size=16).digest()


def philox(key: bytes) -> np.random.Philox:
    """Philox4x64-10 at counter 0; callers use only its `random_raw`."""
    return np.random.Philox(key=np.frombuffer(key, "<u8"))


_thread_local = threading.local()


def raw_words(key: bytes, count: int, stream: int = 0) -> np.ndarray:
    """The first `count` words, uint64, of one of the 2^64 streams of a key.

    Resets one generator per thread to the key: creating a new one takes five times as long.
    """
    try:
        bits = _thread_local.philox
    except AttributeError:
        bits = _thread_local.philox = np.random.Philox(key=0)
    bits.state = {  # pyright: ignore[reportAttributeAccessIssue] tuples, which numpy accepts too, are faster
        "bit_generator": "Philox",
        "state": {"counter": (0, stream, 0, 0), "key": np.frombuffer(key, "<u8")},
        "buffer": (0, 0, 0, 0), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
    }  # fmt: skip
    return bits.random_raw(count)


def noise_words(key: bytes, count: int) -> np.ndarray:
    """uint16 (count,): uniform words, from a stream of the key that `draw_view` does not use."""
    return raw_words(key, -(-count // 4), stream=1).astype("<u8", copy=False).view("<u2")[:count]


def uniforms(words: np.ndarray) -> list[float]:
    """Map uint64 words to floats in (0, 1): (upper 52 bits + 1/2) / 2^52, which float64 represents exactly."""
    return ((words >> 11 | 1) * 2.0**-53).tolist()


def permutation(key: bytes, length: int) -> np.ndarray:
    """int64 (length,): the stable argsort of raw words."""
    return np.argsort(philox(key).random_raw(length), kind="stable")
