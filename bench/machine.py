"""The conditions that a benchmark prints first (machine, versions, command), and the file system's share."""

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "opencv-python-headless", "pillow", "numpy", "zarr")


def conditions() -> str:
    """Markdown lines: processor, cores, memory, GPU, versions, command."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    features = {word for line in _lines("/proc/cpuinfo") if line.startswith("flags") for word in line.split()}
    simd = next((name for name in ("avx512f", "avx2", "sse4_2") if name in features), "no SIMD known")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    arguments = [shlex.quote(Path(word).name if os.sep in word else word) for word in sys.argv[1:]]
    return "\n".join(
        [
            f"* {cpu}, {simd}, {os.cpu_count()} cores, {memory / 2**20:.0f} GiB",
            *_gpu(),
            f"* Python {platform.python_version()}, {versions}",
            f"* `{' '.join(['python', f'bench/{Path(sys.argv[0]).name}', *arguments])}`",
        ]
    )


def _gpu() -> list[str]:
    """A line about the GPU, where torch is imported already: importing it here would count as the process's memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    gpu = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()
    return [f"* {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, cuDNN {cudnn}"]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def filesystem(path: str) -> str:
    """The type of the file system that holds a path, by the longest mount point above it."""
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    above = [mount for mount in mounts if f"{os.path.realpath(path)}/".startswith(mount[0].rstrip("/") + "/")]
    return max(above, key=lambda mount: len(mount[0]), default=["", "an unknown file system"])[1]


def sync(folder: Path) -> None:
    """Sync a folder, everything below it and its parent."""
    for path in [folder.parent, folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def disk_usage(paths: Iterable[Path]) -> tuple[int, int, int]:
    """Number of files, their bytes, and the bytes of the disk blocks that files and folders take, as `du` counts."""
    stats = [(path.is_file(), path.stat()) for path in paths]
    files = [stat for is_file, stat in stats if is_file]
    return len(files), sum(stat.st_size for stat in files), sum(stat.st_blocks * 512 for _, stat in stats)
