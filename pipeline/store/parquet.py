"""Export a store as a Parquet file, for tools that know nothing of this project."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.batches.plan import Unit
from pipeline.common.errors import UsageError
from pipeline.common.files import atomic_write
from pipeline.common.progress import progress
from pipeline.config.store_spec import StoreSpec
from pipeline.store.encoding import decode_logits, encode, to_numpy
from pipeline.store.kinds import payload_width
from pipeline.store.manifest import require_complete
from pipeline.store.reader import Store


def export_parquet(store: Store, spec: StoreSpec, path: Path) -> int:
    """Write the configured views as a table with a row per sample and view, a row group per unit.

    Columns: shard, key, label, view, argmax; for sampled also sampled_classes, the drawn classes in ascending order;
    for the kinds with logits top_classes and top_logits, the largest logits in descending order, and others, the
    log-sum-exp of the other classes' logits. Every checksum is compared.

    Returns:
        The number of rows.

    Raises:
        UsageError: pyarrow is not installed.
        PipelineError: a unit is missing or damaged; no file is written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "export to Parquet", expected="pyarrow", found=str(error), do="install the extra `parquet`"
        ) from None
    require_complete(store, spec.views, spec.kind)
    schema, units, rows = _schema(pyarrow, store, spec), store.units(spec.views), 0
    with atomic_write(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        with progress(len(units), "export", "unit") as bar:
            for unit in units:
                table = pyarrow.concat_tables(list(_views(pyarrow, schema, store, spec, unit)))
                writer.write_table(table, row_group_size=table.num_rows)
                rows += table.num_rows
                bar.update()
    return rows


def _schema(pyarrow: Any, store: Store, spec: StoreSpec) -> Any:
    fields = [("shard", pyarrow.string()), ("key", pyarrow.string()), ("label", pyarrow.int32())]
    fields += [("view", pyarrow.int32()), ("argmax", pyarrow.uint16())]
    if spec.kind == "sampled":
        fields += [("sampled_classes", pyarrow.list_(pyarrow.uint16(), spec.k))]
    elif spec.kind != "argmax":
        top_k = _top_k(store, spec)
        fields += [("top_classes", pyarrow.list_(pyarrow.uint16(), top_k))]
        fields += [("top_logits", pyarrow.list_(pyarrow.float32(), top_k)), ("others", pyarrow.float32())]
    about = {"store": store.fingerprint, "index": store.index.fingerprint, "kind": spec.kind}
    return pyarrow.schema(fields, metadata=about)


def _top_k(store: Store, spec: StoreSpec) -> int:
    """Classes per row: as many as the store holds, or, from all logits, the configured number."""
    stored = store.array_metadata("topk")["shape"][-1] if spec.kind == "topk" else None
    return ((stored or payload_width("topk", store.classes, spec.k)) - 2) // 2


def _views(pyarrow: Any, schema: Any, store: Store, spec: StoreSpec, unit: Unit) -> Iterator[Any]:
    """A table for each view of a unit."""
    rows = store.index.rows(unit.shard)
    keys = pyarrow.array([key.decode() for key in rows["key"].tolist()])
    shard, label = pyarrow.repeat(store.index.names[unit.shard], len(rows)), pyarrow.array(rows["label"].copy())
    for view in range(unit.block * spec.recipe.block, (unit.block + 1) * spec.recipe.block):
        stored = store.read(unit.shard, view, spec.kind)
        columns = [shard, keys, label, np.full(len(rows), view, np.int32), stored.argmax]
        if stored.payload is not None and spec.kind == "sampled":
            columns += [pyarrow.FixedSizeListArray.from_arrays(stored.payload.ravel(), spec.k)]
        elif stored.payload is not None:
            classes, logits, others = _top(store, spec, stored.payload)
            lists = (pyarrow.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) for x in (classes, logits))
            columns += [*lists, others]
        yield pyarrow.table(columns, schema=schema)


def _top(store: Store, spec: StoreSpec, payload: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest logits of each row: classes uint16 (N, k), logits float32 (N, k), the others' log-sum-exp (N,)."""
    if spec.kind != "topk":
        encoded = encode("topk", decode_logits(spec.kind, torch.from_numpy(payload.copy()), store.classes), spec.k)[1]
        assert encoded is not None
        payload = to_numpy("topk", encoded)
    top_k = (payload.shape[1] - 2) // 2
    logits = payload[:, top_k : 2 * top_k].copy().view(np.float16).astype(np.float32)
    others = payload[:, 2 * top_k :].copy().view(np.float32)[:, 0]
    return payload[:, :top_k].copy(), logits, others
