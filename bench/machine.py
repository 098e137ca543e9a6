"""What a benchmark prints first: the machine, the versions, the command; and how it takes medians."""

import os
import platform
import shlex
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
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
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    arguments = [shlex.quote(Path(word).name if os.sep in word else word) for word in sys.argv[1:]]
    return "\n".join(
        [
            f"* {cpu}, {simd}, {os.cpu_count()} cores, {memory / 2**20:.0f} GiB",
            *_gpu(),
            f"* Python {platform.python_version()}, {versions}",
            f"* `python bench/{Path(sys.argv[0]).name} {' '.join(arguments)}`",
        ]
    )


def _gpu() -> list[str]:
    """A line where there is a GPU and torch is imported; to import it here would be seen in a process's memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    gpu = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()
    return [f"* {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, cuDNN {cudnn}"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def spread(values: list[float]) -> str:
    """Median and, in brackets, least and greatest."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def filesystem(path: str) -> str:
    """The type of the file system that a path lies on, by the longest mount point above it."""
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    above = [mount for mount in mounts if f"{os.path.realpath(path)}/".startswith(mount[0].rstrip("/") + "/")]
    return max(above, key=lambda mount: len(mount[0]), default=["", "an unknown file system"])[1]
