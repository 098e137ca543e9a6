"""Checks of a machine: versions, GPUs, decoders, cores, disk, DVC."""

import contextlib
import enum
import importlib.metadata
import io
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image, features

from pipeline.common.cores import available_cores
from pipeline.shards.images import decode, decode_trusted

PROJECT = "deit-offline-distillation"
SHOWN = ("torch", "timm", "pillow", "opencv-python-headless", "zarr", "webdataset")
DISK_BYTES, DISK_SECONDS, PIECE = 256 * 2**20, 4.0, 8 * 2**20


class Level(enum.Enum):
    """What a finding means for the experiment."""

    OK = "ok"
    WARN = "warning"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """The result of a check, as one line."""

    level: Level
    name: str
    text: str


def check_versions() -> Iterator[Finding]:
    """Compare the installed libraries with what the project requires."""
    shown = [f"{name} {_version(name) or 'missing'}" for name in SHOWN]
    yield Finding(Level.OK, "versions", f"Python {platform.python_version()}, {', '.join(shown)}")
    wrong = unmet(importlib.metadata.requires(PROJECT) or [])
    if wrong:
        yield Finding(Level.FAIL, "requirements", f"{'; '.join(wrong)}: install the versions in requirements.txt")


def unmet(requirements: list[str]) -> list[str]:
    """The requirements that the installed libraries do not meet, with what was found; extras do not count."""
    wrong = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement}, found {found or 'none'}")
    return wrong


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_gpus() -> Iterator[Finding]:
    """List the GPUs that torch can use."""
    if not torch.cuda.is_available():
        if torch.version.cuda:
            text = f"torch is built for CUDA {torch.version.cuda} but finds no GPU; if there is one, check the driver"
            yield Finding(Level.WARN, "GPU", text)
        else:
            yield Finding(Level.WARN, "GPU", "none, or torch is built without CUDA: training uses the CPU")
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"cuda:{number}: {found.name}, {free / 2**30:,.0f} of {total / 2**30:,.0f} GiB free"
        if free < total / 2:
            yield Finding(Level.WARN, "GPU", f"{text}: another process uses the rest")
        else:
            yield Finding(Level.OK, "GPU", text)


def fastest_precision(device: torch.device) -> str:
    """The fastest precision on a device: float16 on GPUs whose tensor cores lack bfloat16, such as V100, T4 and RTX 20."""
    major = torch.cuda.get_device_properties(device).major if device.type == "cuda" else 0
    return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"


def check_decoders() -> Iterator[Finding]:
    """Name the JPEG decoders, and compare their pixels: views are only reproducible if both agree."""
    own = features.version("libjpeg_turbo")
    pillow = f"libjpeg-turbo {own}" if own else f"libjpeg {features.version('jpg') or 'missing'}"
    built = re.search(r"JPEG:\s*(.+)", cv2.getBuildInformation())
    other = built[1].strip() if built else "without JPEG"
    text = f"Pillow {pillow}, OpenCV {other}"
    if same_pixels(example_jpeg()):
        yield Finding(Level.OK, "JPEG", f"{text}: same pixels")
    else:
        text += ": their pixels differ, so views would depend on the machine; install the versions in requirements.txt"
        yield Finding(Level.FAIL, "JPEG", text)
    missing = [name for name in ("webp", "avif") if not features.check(name)]
    if missing:
        yield Finding(Level.WARN, "formats", f"Pillow cannot read {', '.join(missing)}: such images are left out")


def example_jpeg() -> bytes:
    """A JPEG with subsampled colour and a width that is not a multiple of the block size."""
    rows, columns = np.mgrid[:75, :93]
    pixels = np.stack([rows * 3, columns * 2, (rows * columns) % 256], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def same_pixels(jpeg: bytes) -> bool:
    """Whether the decoder that checks images and the one that is used for views agree."""
    return np.array_equal(decode(jpeg), decode_trusted(jpeg))


def check_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max"), load: float | None = None) -> Finding:
    """Compare the cores that are visible with the quota of a container and the load.

    Args:
        load: the mean number of processes that ran or waited for a core in the last minute; None: this machine's.
    """
    cores, load = available_cores(), os.getloadavg()[0] if load is None else load
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{cores} cores, {memory:,.0f} GiB of memory"
    with contextlib.suppress(OSError, ValueError):
        quota, period = quota_file.read_text().split()
        if quota != "max" and float(quota) / float(period) < 0.9 * cores:
            text += (
                f"; but a quota of {float(quota) / float(period):.1f} cores (cgroup): set `workers` and OMP_NUM_THREADS"
                " to suit it, or processes wait for one another"
            )
            return Finding(Level.WARN, "cores", text)
    if load > 1.5 * cores:
        text += f"; but the load average is {load:.1f}, and estimates are for this load"
        if os.environ.get("OMP_NUM_THREADS") != "1":
            text += ". On a CPU, set OMP_NUM_THREADS=1: the threads of a step wait for one another, which can be many times slower"
        return Finding(Level.WARN, "cores", text)
    return Finding(Level.OK, "cores", text)


def check_dvc(root: Path) -> Finding:
    """Look for DVC and its files in the project's folder."""
    missing = [name for name in ("dvc.yaml", ".dvc/config") if not (root / name).exists()]
    if missing:
        return Finding(Level.FAIL, "DVC", f"{', '.join(missing)} not found: run this in the folder of the project")
    if not shutil.which("dvc"):
        return Finding(Level.FAIL, "DVC", "no `dvc` command on the PATH: activate .venv, or run each stage by itself")
    text = f"dvc {_version('dvc') or 'of another environment'}"
    if not any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents)):
        return Finding(
            Level.WARN, "DVC", f"{text}, but no git repository: run git init, or dvc config core.no_scm true"
        )
    return Finding(Level.OK, "DVC", text)


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second of sequential access."""

    write: float
    read: float


def measure_disk(folder: Path, size: int = DISK_BYTES, seconds: float = DISK_SECONDS) -> DiskSpeed:
    """Write a temporary file, sync it, drop it from the page cache where the system allows, and read it.

    Args:
        size: bytes; less is written where that takes longer than `seconds` or a tenth of the free space.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / f".doctor.{secrets.token_hex(4)}.partial"
    piece = secrets.token_bytes(min(PIECE, size))
    size = min(size, free_bytes(folder) // 10)
    try:
        with open(path, "wb") as file:
            start, written = time.perf_counter(), 0
            while written < max(size, 1) and time.perf_counter() - start < seconds:
                written += file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            writing = time.perf_counter() - start
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(path, "rb", buffering=0) as file:
            start, total = time.perf_counter(), 0
            while (data := file.read(PIECE)) and time.perf_counter() - start < seconds:
                total += len(data)
            reading = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    return DiskSpeed(written / max(writing, 1e-9), total / max(reading, 1e-9))


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
