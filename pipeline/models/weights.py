"""Weights in and out: safetensors under a digest of their own, and files of others.

What this project writes carries a digest of its tensors, and of what is said about them, which is compared whenever
it is read.
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
from pipeline.common.files import atomic_write, file_sha256
from pipeline.config.validation import fingerprint

DIGEST = "digest"
"""The only entry of our files' metadata, JSON with `about` and `digest`: several are written in no certain order."""
SUFFIXES = (".safetensors", ".pth", ".pt")
"""Of files that hold weights; whatever else `teacher.weights` says is a timm tag."""


def state_dict_hash(state: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits of BLAKE2b over names, types, shapes and bytes of a state dict's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """`state_dict_hash` of all weights and buffers."""
    return state_dict_hash(model.state_dict())


def save_weights(path: Path, model: nn.Module, about: Mapping[str, Any] | None = None) -> None:
    """A state dict as safetensors under a digest; `path` is written directly, so give a temporary one.

    Args:
        about: JSON values that `read_saved_weights` gives back with the weights; the digest is of both.

    Raises:
        OSError: the disk is full or read-only.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        noted = {"about": about or {}, "digest": _digest(state, about or {})}
        safetensors.torch.save_file(state, path, {DIGEST: json.dumps(noted)})
    except safetensors.SafetensorError as error:  # how it tells what the disk said
        raise OSError(str(error)) from error


def read_weights(path: str | Path, own: bool = False) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from .pth without running code.

    DeiT's lie under `model`, in released files and in training checkpoints; others' under `state_dict`,
    or with DistributedDataParallel's `module.` before every name.

    Args:
        own: it was written by `save_weights`, so it must have its digest.

    Raises:
        PipelineError: missing, damaged, or no weights.
    """
    return _read(Path(path), own)[0]


def read_saved_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state dict that `save_weights` wrote, and what it wrote about it.

    Raises:
        PipelineError: missing, damaged, or no weights.
    """
    return _read(path, own=True)


def read_external_weights(path: Path, notes: Path) -> dict[str, torch.Tensor]:
    """As `read_weights`, of a file of others: its digest is noted at first use, and compared from then on.

    A file that was replaced has another size or time, and is noted anew.

    Args:
        notes: a folder for a small JSON a file.

    Raises:
        PipelineError: it has other bytes than it had, though nobody wrote to it; else as `read_weights`.
    """
    state = read_weights(path)
    stat, digest = path.stat(), file_sha256(path)
    found = {"path": str(path.resolve()), "size": stat.st_size, "time_ns": stat.st_mtime_ns, "sha256": digest}
    note = notes / f"{fingerprint(found['path'])}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged note is none
        was = json.loads(note.read_bytes())
        if (was["size"], was["time_ns"]) == (stat.st_size, stat.st_mtime_ns) and was["sha256"] != digest:
            raise PipelineError(
                f"{path}: damaged weights",
                expected=f"SHA-256 {was['sha256']}, as when it was first used ({note})",
                found=f"{digest}, though its size and time are the same",
                do="fetch it anew",
            )
    with atomic_write(note) as temporary:
        temporary.write_text(json.dumps(found) + "\n")
    return state


def _read(path: Path, own: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    about: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            state, about, noted = _read_safetensors(path)
        else:
            state, noted = _read_pickle(path), None
    except Exception as error:  # pickle, zip and safetensors errors share no base
        raise PipelineError(
            f"{path}: the weights cannot be read",
            expected="a .safetensors file, or a .pth of tensors only",
            found=_without_advice(error),
            do="name the right file",
        ) from error
    _refuse_damaged(path, state, about, noted, own)
    return state, about


def _digest(state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    return fingerprint([state_dict_hash(state), about])


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], str | None]:
    """A state dict, what was written about it, and their digest; none in a foreign file."""
    with safetensors.safe_open(path, "pt") as file:
        noted = (file.metadata() or {}).get(DIGEST)
        sealed = json.loads(noted) if noted else {"about": {}, "digest": None}
        return {name: file.get_tensor(name) for name in file.keys()}, sealed["about"], sealed["digest"]


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    if zipfile.is_zipfile(path):  # as torch.save writes, with checksums that torch.load does not compare
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it has another checksum")
    with torch.serialization.safe_globals([argparse.Namespace]):  # of DeiT's checkpoints, which hold their arguments
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


def _refuse_damaged(
    path: Path, state: dict[str, torch.Tensor], about: dict[str, Any], noted: str | None, own: bool
) -> None:
    if noted is None and own:
        raise PipelineError(
            f"{path}: the weights have no digest",
            expected="a file of this version of the pipeline, which carries one",
            found="none: it is damaged, another file, or an earlier version's",
            do="delete it, then run the command that makes it again",
        )
    if noted is not None and noted != _digest(state, about):
        raise PipelineError(
            f"{path}: damaged weights",
            expected=f"what was written, of digest {noted}",
            found="something else",
            do="delete the file, then run the command that makes it again, or fetch it anew",
        )
    # the beginning of its SHA-256 is part of the name of a file that torch.hub's users release, DeiT's among them
    named = re.fullmatch(r".+-([0-9a-f]{8,64})\.pth", path.name)
    if named and not file_sha256(path).startswith(named[1]):
        raise PipelineError(
            f"{path}: damaged weights",
            expected=f"a SHA-256 that begins with {named[1]}, as the file's name says",
            found=file_sha256(path),
            do="fetch it anew; or give it another name, if it is another file",
        )


def _without_advice(error: Exception) -> str:
    """What torch's loading says, less how one would run the file's code."""
    text = str(error)
    if "Weights only load failed" in text or "weights_only" in text:
        code = re.search(r"GLOBAL (\S+)", text)
        return f"more than tensors: {code[1] if code else 'a pickle with code'}"
    return f"{type(error).__name__}: {text}"


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Strictly.

    Raises:
        PipelineError: a name or shape differs; names the first few.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PipelineError(
            f"{source}: weights of another model",
            expected=f"those of {type(model).__name__} as configured",
            found="; ".join(str(error).splitlines()[1:4]).strip(),
            do="name the file that belongs to this model and number of classes",
        ) from error


def check_timm_tag(tag: str, classes: int | None) -> None:
    """That timm has weights of this name, and of as many classes: timm itself would leave the classifier fresh.

    Raises:
        UsageError: it has not.
    """
    try:
        known = get_pretrained_cfg(tag, allow_unregistered=False) if timm.is_model(tag) else None
    except RuntimeError:  # the model has no such tag
        known = None
    if known is None or not known.has_weights:
        raise UsageError(
            f"teacher.weights {tag!r}",
            expected="a timm tag such as regnety_160.deit_in1k, or a local .safetensors, .pth or .pt file",
            found="timm knows no such weights",
            do="correct the tag: timm.list_pretrained() lists them",
        )
    if classes not in (None, known.num_classes):
        raise UsageError(
            f"teacher.weights {tag!r}",
            expected=f"weights of the {classes:,} classes of the index",
            found=f"weights of {known.num_classes:,}",
            do="train the teacher here (teacher.weights=null), or name a file of weights for these classes",
        )
