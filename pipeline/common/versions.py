"""Versions of the libraries that results may depend on."""

import contextlib
import importlib.metadata

VERSIONS = ("numpy", "opencv-python-headless", "pillow", "timm", "torch", "torchvision", "zarr")
"""Libraries that views, predictions and the store's bytes may depend on."""


def library_versions() -> dict[str, str]:
    """Installed versions of VERSIONS."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
