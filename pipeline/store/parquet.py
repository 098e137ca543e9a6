"""Export a store as a Parquet file, for tools that know nothing of this project."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.batches.plan import Unit
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import atomic_write
from pipeline.config.store_spec import StoreSpec
from pipeline.store.encoding import decode_logits, encode, payload_width, to_numpy
from pipeline.store.reader import Store


def export_parquet(store: Store, spec: StoreSpec, path: Path) -> int:
    """Write the configured views as a table with a row per sample and view, a row group per unit.

    Columns: shard, key, label, view, argmax; unless the kind is argmax also top_classes and top_logits, the largest
    logits in descending order, and others, the log-sum-exp of the other classes' logits. Every checksum is compared.

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
    if missing := store.missing(spec.views, spec.kind):
        raise PipelineError(
            f"{store.path}: the teacher predictions", expected=f"{spec.views} views as {spec.kind}",
            found=f"{len(missing):,} units missing", do="compute them: pipeline teacher-logits",
        )  # fmt: skip
    schema, rows = _schema(pyarrow, store, spec), 0
    with atomic_write(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for unit in store.units(spec.views):
            tables = [pyarrow.table(columns, schema) for columns in _views(store, spec, unit)]
            writer.write_table(table := pyarrow.concat_tables(tables), row_group_size=max(table.num_rows, 1))
            rows += table.num_rows
    return rows


def _schema(pyarrow: Any, store: Store, spec: StoreSpec) -> Any:
    fields = [("shard", pyarrow.string()), ("key", pyarrow.string()), ("label", pyarrow.int32())]
    fields += [("view", pyarrow.uint16()), ("argmax", pyarrow.uint16())]
    if spec.kind != "argmax":
        top_k = _top_k(store, spec)
        fields += [("top_classes", pyarrow.list_(pyarrow.uint16(), top_k))]
        fields += [("top_logits", pyarrow.list_(pyarrow.float32(), top_k)), ("others", pyarrow.float32())]
    about = {"store": store.fingerprint, "index": store.index.fingerprint, "kind": spec.kind}
    return pyarrow.schema(fields, metadata=about)


def _top_k(store: Store, spec: StoreSpec) -> int:
    """Classes per row: as many as the store holds, or, from all logits, the configured number."""
    stored = store.array_metadata("topk")["shape"][-1] if spec.kind == "topk" else None
    return ((stored or payload_width("topk", store.classes, spec.top_k)) - 2) // 2


def _views(store: Store, spec: StoreSpec, unit: Unit) -> Iterator[dict[str, Any]]:
    """The columns of each view of a unit."""
    name, rows = store.index.names[unit.shard], store.index.rows(unit.shard)
    keys = [key.decode() for key in rows["key"].tolist()]
    for view in range(unit.block * spec.recipe.block, (unit.block + 1) * spec.recipe.block):
        stored = store.read(unit.shard, view, spec.kind)
        columns = {"shard": [name] * len(keys), "key": keys, "label": rows["label"], "view": [view] * len(keys)}
        yield columns | {"argmax": stored.argmax} | _top(store, spec, stored.payload)


def _top(store: Store, spec: StoreSpec, payload: np.ndarray | None) -> dict[str, Any]:
    """The columns of the largest logits."""
    if payload is None:
        return {}
    if spec.kind != "topk":
        logits = decode_logits(spec.kind, torch.from_numpy(payload.copy()), store.classes)
        encoded = encode("topk", logits, spec.top_k)[1]
        assert encoded is not None
        payload = to_numpy("topk", encoded)
    top_k = (payload.shape[1] - 2) // 2
    logits = payload[:, top_k : 2 * top_k].copy().view(np.float16).astype(np.float32)
    others = payload[:, 2 * top_k :].copy().view(np.float32)[:, 0]
    return {"top_classes": list(payload[:, :top_k]), "top_logits": list(logits), "others": others}
