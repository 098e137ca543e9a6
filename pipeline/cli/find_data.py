"""Recognize what `pipeline init` is given: class folders, a table of images, or Parquet files with images."""

from pathlib import Path

from pipeline.common.errors import UsageError
from pipeline.config.schema import Data
from pipeline.shards.listing import TRAIN_NAMES, VAL_NAMES
from pipeline.shards.tables import TABLES, has_validation_rows, is_table

VAL_FRACTION, VAL_FRACTION_OF_MANY = 0.2, 0.1
"""The part of the images of each class that is used for validation if there is nothing else for it; from MANY images on,
the smaller one."""
MANY = 4_000


def find_data(root: Path) -> Data:
    """The data section for a folder or a table: what is for training and for validation.

    Raises:
        UsageError: no such folder or file, or neither class folders, tables nor Parquet files where they are looked for.
        PipelineError: a table cannot be read.
    """
    if root.is_file() and root.suffix[1:].lower() in TABLES:
        images = root.suffix.lower() == ".parquet" and not is_table(root)
        return Data(source="parquet", train=str(root), val_fraction=VAL_FRACTION) if images else _of_tables(root, None)
    if not root.is_dir():
        raise UsageError(
            f"{root}", expected="a folder of images or a table", found="no such folder or table", do="correct the path"
        )
    return _tables(root) or _parquet(root) or _class_folders(root)


def _of_tables(train: Path, val: Path | None) -> Data:
    if val:
        return Data(source="table", train=str(train), val=str(val))
    return Data(source="table", train=str(train), val_fraction=0.0 if has_validation_rows(train) else VAL_FRACTION)


def _tables(root: Path) -> Data | None:
    """Tables named as a split, or the metadata files of Hugging Face's image folders."""

    def find(names: tuple[str, ...]) -> Path | None:
        places = [f"{name}{end}" for name in names for end in (".csv", ".tsv", ".jsonl", "/metadata.csv", "/metadata.jsonl")]
        return next((root / place for place in places if (root / place).is_file() and is_table(root / place)), None)

    train = find(TRAIN_NAMES)
    return _of_tables(train, find(VAL_NAMES)) if train else None


def _parquet(root: Path) -> Data | None:
    """Parquet files as `datasets` names them: data/train-00000-of-00001.parquet."""

    def find(names: tuple[str, ...]) -> str:
        patterns = [f"{folder}{name}{end}" for name in names for folder in ("data/", "") for end in ("-*", "")]
        return next((str(root / f"{each}.parquet") for each in patterns if any(root.glob(f"{each}.parquet"))), "")

    train, val = find(TRAIN_NAMES), find(VAL_NAMES)
    return Data(source="parquet", train=train, val=val, val_fraction=0.0 if val else VAL_FRACTION) if train else None


def _class_folders(root: Path) -> Data:
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir() and _has_folders(path)}
    train, val = (next((folders[name] for name in names if name in folders), None) for names in (TRAIN_NAMES, VAL_NAMES))
    if train and val:
        return Data(train=str(train), val=str(val))
    classes = {path.name.lower() for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if train is None and len(classes) > 1 and not classes & {*TRAIN_NAMES, *VAL_NAMES}:
        train = root
    if train is None:
        raise UsageError(
            f"{root}",
            expected=f"one folder of images per class, either here or in folders for training ({', '.join(TRAIN_NAMES)}) and"
            f" validation ({', '.join(VAL_NAMES)})",
            found=", ".join(str(path.name) for path in sorted(root.iterdir())[:5]) or "an empty folder",
            do="put the images of each class, of at least two, into a folder of its own, or name the folder that holds the class folders",
        )
    return Data(train=str(train), val_fraction=VAL_FRACTION)


def _has_folders(path: Path) -> bool:
    return any(each.is_dir() and not each.name.startswith(".") for each in path.iterdir())
