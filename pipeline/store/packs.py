"""Packs: files that each hold the predictions of one block for some shards, as published stores are divided.

A pack is an uncompressed tar of `.npy` arrays, so numpy alone can read it. Its bytes depend only on what it holds. More
views add packs and leave the existing ones unchanged.

Members, for each shard: `<number>/check.npy`, group checks, uint64 (block, groups), and `<number>/argmax.npy`, uint16
(block, samples); or, in the packs of a kind's payload, `<number>/<kind>.npy`, (block, samples, width).
"""

import io
import math
import tarfile
from collections.abc import Sequence

import numpy as np

from pipeline.batches.plan import Unit
from pipeline.store.kinds import KINDS
from pipeline.store.reader import Store
from pipeline.views.draw import group_count

PACK_BYTES = 64 * 2**20


def shard_ranges(samples: Sequence[int], block: int, row_bytes: int, limit: int = PACK_BYTES) -> list[range]:
    """Divide shards into runs whose packs have about `limit` bytes at most; a larger shard is a run of its own.

    Args:
        samples: number of samples in each shard.
        row_bytes: bytes per sample and view.
    """
    ranges, first, size = [], 0, 0
    for number, count in enumerate(samples):
        unit = count * block * row_bytes
        if size and size + unit > limit:
            ranges.append(range(first, number))
            first, size = number, 0
        size += unit
    return [*ranges, range(first, len(samples))]


def read_arrays(store: Store, unit: Unit, kind: str) -> dict[str, np.ndarray]:
    """Read what packs hold of a unit: `check` and `argmax`, or the payload of another kind.

    Raises:
        Damaged: the unit is missing or damaged.
    """
    block, samples = store.recipe.block, int(store.index.samples[unit.shard])
    if kind != "argmax":
        views = range(unit.block * block, (unit.block + 1) * block)
        payloads = [store.read(unit.shard, view, kind).payload for view in views]
        return {kind: np.stack([payload for payload in payloads if payload is not None])}
    groups = group_count(samples, store.recipe.group_size)
    return {"check": store.read_check(unit)[:, :groups], "argmax": store.read_unit(unit)}


def build_pack(arrays: dict[int, dict[str, np.ndarray]]) -> bytes:
    """The bytes of a pack.

    Args:
        arrays: for each shard, what `read_arrays` returned.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for shard, named in arrays.items():
            for name, array in named.items():
                content = array_bytes(array)
                member = tarfile.TarInfo(f"{shard:06d}/{name}.npy")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def array_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a `.npy`."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def parse_array(data: bytes) -> np.ndarray:
    """Invert `array_bytes`.

    Raises:
        Exception: it is damaged; a header may claim any size, so nothing is allocated by it.
    """
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject or len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data):,} bytes of {dtype} {shape}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def pack_bytes(shapes: dict[int, dict[str, tuple[int, ...]]]) -> int:
    """The size of a pack with arrays of these shapes; see `pack_shapes`."""
    size = 2 * tarfile.BLOCKSIZE
    for named in shapes.values():
        for name, shape in named.items():
            header = len(array_bytes(np.empty((0, *shape[1:]), _dtype(name))))
            size += tarfile.BLOCKSIZE + -(-(header + math.prod(shape) * _dtype(name).itemsize) // 512) * 512
    return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _dtype(name: str) -> np.dtype:
    return np.dtype(np.uint64 if name == "check" else KINDS[name].dtype)


def parse_pack(data: bytes, shapes: dict[int, dict[str, tuple[int, ...]]]) -> dict[int, dict[str, np.ndarray]]:
    """Invert `build_pack`.

    Args:
        shapes: the shape of each array of each shard, as `pack_shapes` returns them.

    Raises:
        ValueError: it is not a pack, or has other shards or shapes.
    """
    found: dict[int, dict[str, np.ndarray]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for shard, named in shapes.items():
                for name, shape in named.items():
                    member, expected = tar.next(), f"{shard:06d}/{name}.npy"
                    # a sparse member may claim any size
                    plain = member is not None and member.isreg() and not member.issparse()
                    content = tar.extractfile(member) if member and plain and member.name == expected else None
                    if content is None:
                        raise ValueError(f"{member.name if member else 'the end'} instead of {expected}")
                    array = parse_array(content.read())
                    if array.shape != shape or array.dtype != _dtype(name):
                        raise ValueError(f"{expected}: {array.dtype} {array.shape} instead of {_dtype(name)} {shape}")
                    found.setdefault(shard, {})[name] = array
            if tar.next():
                raise ValueError("more members than expected")
    except MemoryError:
        raise
    except Exception as error:  # a damaged header makes tarfile and numpy raise almost anything
        raise ValueError(str(error)) from error
    return found


def pack_shapes(store: Store, shards: Sequence[int], kind: str, width: int) -> dict[int, dict[str, tuple[int, ...]]]:
    """The shape of each array in the pack of these shards: of `check` and `argmax`, or of another kind's payload."""
    block, group_size = store.recipe.block, store.recipe.group_size
    shapes = {}
    for shard in shards:
        samples = int(store.index.samples[shard])
        if kind == "argmax":
            shapes[shard] = {"check": (block, group_count(samples, group_size)), "argmax": (block, samples)}
        else:
            shapes[shard] = {kind: (block, samples, width)}
    return shapes
