"""Class folders: one folder of images per class."""

import os
from pathlib import Path

from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import StatSignature, stat_signature
from pipeline.config.schema import Data
from pipeline.shards.conversion import EXTENSIONS
from pipeline.shards.listing import Listing, count_by_extension, extension


def list_folder(data: Data, split: str) -> Listing:
    """List one folder of images per class, named after the folders.

    Raises:
        UsageError: no such folder.
        PipelineError: no class, or a class without images.
    """
    root = Path(getattr(data, split)).expanduser()
    if not getattr(data, split) or not root.is_dir():
        raise _no_folder(data, split, root)
    return list_class_folders(root, f"data.{split}")


def list_class_folders(root: Path, what: str) -> Listing:
    """List one folder of images per class below `root`, which the configuration key `what` names.

    Raises:
        UsageError: no such folder.
        PipelineError: no class, or a class without images.
    """
    if not root.is_dir():
        raise UsageError(
            f"{what}: {str(root)!r}", expected="a folder with one folder of images per class", found="no such folder",
            do=f"correct {what}",
        )  # fmt: skip
    entries = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    classes = [name for name in entries if (root / name).is_dir()]
    names, labels, signatures = [], [], []
    ignored = [name for name in entries if name not in set(classes)]
    for label, name in enumerate(classes):
        images: list[tuple[str, StatSignature]] = []
        others: list[str] = []
        _scan(root, name, images, others)
        images.sort(key=lambda image: image[0].split("/"))
        ignored += sorted(others)
        if not images:
            raise PipelineError(
                f"{root / name}: a class without images",
                expected=f"at least one file of {', '.join(sorted(EXTENSIONS))}",
                found=count_by_extension(others) or "none",
                do="add images, or convert what is there, or remove the folder",
            )
        for image, signature in images:
            names.append(image)
            labels.append(label)
            signatures.append(signature)
    if not classes:
        raise PipelineError(
            f"{root}: no classes",
            expected="one folder of images per class, for example cat/001.jpg",
            found="no folder in it",
            do=f"point {what} at the folder that holds the class folders",
        )
    return Listing(classes, names, labels, signatures, ignored, root)


def _no_folder(data: Data, split: str, root: Path) -> UsageError:
    named = bool(getattr(data, split))
    without = ", or data.val_fraction to use a part of the training images" * (split == "val")
    return UsageError(
        f"data.{split}: {str(root)!r}" if named else f"data.{split}",
        expected="a folder with one folder of images per class",
        found="no such folder" if named else "nothing: the key is empty",
        do=f"set data.{split} in params.yaml, or --set data.{split}=FOLDER{without}; to continue with shards prepared"
        " from images that are gone: dvc freeze prepare",
    )


def _scan(root: Path, below: str, images: list[tuple[str, StatSignature]], others: list[str]) -> None:
    """Add what is below a folder of `root` to `images` (path, signature) and `others` (path); skip hidden files."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}"
            if entry.name.startswith("."):
                continue  # .DS_Store, ._001.jpg
            if entry.is_dir(follow_symlinks=False):
                _scan(root, name, images, others)
            elif extension(entry.name) in EXTENSIONS and entry.is_file():
                images.append((name, stat_signature(entry.stat())))
            else:
                others.append(name)
