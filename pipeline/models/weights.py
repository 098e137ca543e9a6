"""Reading and writing weights: safetensors files with a checksum, and files from elsewhere.

Files that the pipeline wrote carry a checksum of tensors and metadata, which is compared on every read.
"""

import argparse
import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import file_sha256, write_json
from pipeline.config.validation import fingerprint
from pipeline.models.provenance import checksum_record

DIGEST = "digest"
"""The only entry of a file's metadata, JSON with `about` and `digest`: safetensors writes several in any order."""
DESCRIPTION = "description"
"""The key of a model's description among the metadata, see pipeline.models.description."""
TRAINED = "trained"
"""The key of how a model was trained, see pipeline.training.origin."""


def state_dict_hash(state: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2b, 32 hex digits, of the names, types, shapes and bytes of a state dict's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """`state_dict_hash` of a model's parameters and persistent buffers."""
    return state_dict_hash(model.state_dict())


def save_weights(path: Path, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Save a model's state dict with a checksum; `path` is written directly, so pass a temporary one.

    Args:
        metadata: JSON values that `read_saved_weights` returns with the weights; the checksum covers both.

    Raises:
        OSError: the disk is full or read-only.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        entry = {"about": metadata or {}, "digest": _checksum(state, metadata or {})}
        safetensors.torch.save_file(state, path, {DIGEST: json.dumps(entry)})
    except safetensors.SafetensorError as error:  # wraps errors of the disk
        raise OSError(str(error)) from error


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from .safetensors, or from .pth without running code.

    Unwraps `model`, as in DeiT's files, `state_dict`, and DistributedDataParallel's prefix `module.`.

    Raises:
        PipelineError: the file is missing, damaged, or holds no weights.
    """
    return _read(Path(path), own=False)[0]


def read_saved_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote: state dict and metadata.

    Raises:
        PipelineError: the file is missing, damaged, or has no checksum.
    """
    return _read(path, own=True)


def read_description(path: Path) -> dict[str, Any]:
    """What weights that the pipeline published say about themselves, see `pipeline.models.description`; else empty."""
    described = read_metadata(path).get(DESCRIPTION) if path.suffix == ".safetensors" else None
    return described if isinstance(described, dict) else {}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_weights` wrote, without the weights; empty for a file from elsewhere, and for a damaged one,
    which is refused when its weights are read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[DIGEST])["about"]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def read_external_weights(path: Path, checksums: Path) -> dict[str, torch.Tensor]:
    """Read weights from elsewhere, as `read_weights`; their SHA-256 is recorded at first use and compared afterwards.

    A file whose size or modification time differs has been replaced and is recorded again.

    Args:
        checksums: folder with a small JSON file per weight file.

    Raises:
        PipelineError: as `read_weights`, or the bytes changed although size and time did not.
    """
    state = read_weights(path)
    stat, sha256 = path.stat(), file_sha256(path)
    found = {"path": str(path.resolve()), "size": stat.st_size, "time_ns": stat.st_mtime_ns, "sha256": sha256}
    record = checksum_record(path, checksums)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged record counts as none
        was = json.loads(record.read_bytes())
        if (was["size"], was["time_ns"]) == (stat.st_size, stat.st_mtime_ns) and was["sha256"] != sha256:
            raise PipelineError(
                f"{path}: damaged weights",
                expected=f"SHA-256 {was['sha256']}, as at first use ({record})",
                found=f"{sha256}, though size and time are the same",
                do="download it again",
            )
    write_json(record, found)
    return state


def _read(path: Path, own: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    metadata: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            state, metadata, checksum = _read_safetensors(path)
        else:
            state, checksum = _read_pickle(path), None
    except Exception as error:  # pickle, zip and safetensors errors have no common base class
        raise PipelineError(
            f"{path}: the weights cannot be read",
            expected="a .safetensors file, or a .pth of tensors only",
            found=_describe_load_error(error),
            do="name the right file",
        ) from error
    _check_integrity(path, state, metadata, checksum, own)
    return state, metadata


def _checksum(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    return fingerprint([state_dict_hash(state), metadata])


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], str | None]:
    """State dict, metadata, and the checksum of both, None in a file from elsewhere."""
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(DIGEST)
        entry = json.loads(text) if text else {"about": {}, "digest": None}
        return {name: file.get_tensor(name) for name in file.keys()}, entry["about"], entry["digest"]


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    if zipfile.is_zipfile(path):  # torch.save's format, whose checksums torch.load does not compare
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it does not match its checksum")
    else:
        with path.open("rb") as file:
            if file.read(1) != b"\x80":  # the first byte of a pickle
                raise ValueError("not a file written by torch.save")
    with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's checkpoints hold their arguments
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())
    ):
        raise ValueError("not a mapping of names to tensors")
    parallel = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if parallel else name: tensor for name, tensor in state.items()}


def _check_integrity(
    path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any], checksum: str | None, own: bool
) -> None:
    if checksum is None and own:
        raise PipelineError(
            f"{path}: the weights have no checksum",
            expected="a file written by this version of the pipeline",
            found="none: it is damaged, a different file, or written by an earlier version",
            do="delete it, then run the command that writes it",
        )
    if checksum is not None and checksum != _checksum(state, metadata):
        raise PipelineError(
            f"{path}: damaged weights",
            expected=f"the checksum {checksum}, as written",
            found=_checksum(state, metadata),
            do="delete the file, then run the command that writes it, or download it again",
        )
    # files for torch.hub, DeiT's among them, have the beginning of their SHA-256 in the name
    named = re.fullmatch(r".+-([0-9a-f]{8,64})\.pth", path.name)
    if named and not file_sha256(path).startswith(named[1]):
        raise PipelineError(
            f"{path}: damaged weights",
            expected=f"a SHA-256 that begins with {named[1]}, as in the file's name",
            found=file_sha256(path),
            do="download it again; or rename it, if it is a different file",
        )


def _describe_load_error(error: Exception) -> str:
    """Describe an error, without torch's advice on how to run the file's code."""
    text = str(error)
    if "Weights only load failed" in text or "weights_only" in text:
        code = re.search(r"GLOBAL (\S+)", text)
        return f"more than tensors: {code[1] if code else 'a pickle with code'}"
    return f"{type(error).__name__}: {text}"


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict; every name and shape must match.

    Raises:
        PipelineError: some differ; the message names the first few.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PipelineError(
            f"{source}: weights of another model",
            expected=f"those of the configured {type(model).__name__}",
            found="; ".join(_shorten_names(line.strip()) for line in str(error).splitlines()[1:4]),
            do="name the file that belongs to this model and number of classes",
        ) from error


def _shorten_names(line: str, shown: int = 3) -> str:
    """A line of load_state_dict's message, with the first few of the names that it lists, and how many there are."""
    names = re.findall(r'"[^"]+"', line)
    if len(names) <= shown:
        return line
    return f"{line.partition(chr(34))[0]}{', '.join(names[:shown])} and {len(names) - shown:,} more"


def check_timm_tag(tag: str, key: str = "teacher.weights") -> int:
    """The number of classes of timm's weights of this name, which configuration key `key` has.

    Raises:
        UsageError: it has none.
    """
    try:
        known = get_pretrained_cfg(tag, allow_unregistered=False) if timm.is_model(tag) else None
    except RuntimeError:  # timm has the model, but not the tag
        known = None
    if known is None or not known.has_weights:
        raise UsageError(
            f"{key} {tag!r}",
            expected="a timm tag such as regnety_160.deit_in1k, or a local .safetensors, .pth or .pt file",
            found="no such weights in timm",
            do="correct the tag: timm.list_pretrained() lists them",
        )
    return known.num_classes
