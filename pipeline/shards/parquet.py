"""Open Parquet files, with pyarrow."""

from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError, UsageError


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile.

    Raises:
        UsageError: pyarrow is not installed.
        PipelineError: the file cannot be read.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: a Parquet file", expected="pyarrow", found="it is not installed", do="pip install '.[parquet]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        raise PipelineError(
            f"{path}: the file cannot be read", expected="a Parquet file", found=str(error)[:300], do="restore it"
        ) from error
