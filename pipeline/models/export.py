"""Export a trained model to where models are used: a timm folder, ONNX, a torch.export program.

Each file is loaded again and compared with the model it was made from before it counts as written.
"""

import contextlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.types import is_custom_model
from pipeline.models.build import NormalizedModel
from pipeline.models.description import ModelDescription

FILES = {"timm": "timm", "onnx": "model.onnx", "torch": "model.pt2"}
"""What each format writes into the folder of an export."""
FORMATS = tuple(FILES)
TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit, between a model and its export."""
IMAGES, LOGITS = "images", "logits"


@dataclass(frozen=True)
class Export:
    """One written export."""

    path: Path
    difference: float
    """Largest absolute difference of a logit from the exported model's, over the images compared."""
    agreement: float
    """Share of the images compared whose most probable class is the same."""

class Classifier(torch.nn.Module):
    """A model with its normalization, for export: images in, logits out.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: NormalizedModel):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float32 RGB images (N, 3, size, size) in [0, 1] to float32 logits (N, classes)."""
        return self.model(images * 255)[0]


def export(
    model: NormalizedModel, description: ModelDescription, pictures: torch.Tensor, folder: Path, formats: tuple[str, ...]
) -> list[Export]:
    """Write a model in some formats, and compare each with the model.

    Args:
        model: in eval mode on the CPU.
        pictures: float32 (N, 3, size, size) in 0..255, at least two, to compare the logits on.
        folder: receives `timm/`, `model.onnx`, `model.pt2` and `classes.txt`.
        formats: some of FORMATS.

    Raises:
        UsageError: a library for a format is not installed.
        PipelineError: an export gives different logits; its files are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".partial-*"):  # by an export that was killed
        shutil.rmtree(left)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in description.classes))
    classifier, writers = Classifier(model).eval(), {"timm": _write_timm, "onnx": _write_onnx, "torch": _write_program}
    images = pictures / 255
    with torch.no_grad():
        expected = classifier(images)
    exports = []
    for name in formats:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary, _legacy_precision_flags():
            written = writers[name](classifier, description, images, Path(temporary))
            with torch.no_grad():
                result = _compare(folder / written.name, LOADERS[name](written, description)(images), expected)
            if result.path.is_dir():
                remove_export(result.path)
            written.replace(result.path)
        exports.append(result)
    return exports


def other_exports(folder: Path, formats: tuple[str, ...]) -> list[Path]:
    """The exports in a folder that writing some formats would leave there."""
    return [folder / name for format, name in FILES.items() if format not in formats and (folder / name).exists()]


def remove_export(path: Path) -> None:
    """Delete an exported model: a file, or the folder of a format that has several."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def _legacy_precision_flags() -> Iterator[None]:
    """Within the block, convolutions on a GPU have torch's default precision: its exporter reads the old flag, which torch
    refuses to return after `pipeline.common.arithmetic` has set the new one."""
    convolutions: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "tf32"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _compare(path: Path, found: torch.Tensor, expected: torch.Tensor) -> Export:
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item():
        raise PipelineError(
            f"{path}: the exported model",
            expected=f"the model's logits, up to {TOLERANCE:g} of the largest",
            found=f"logits that differ by up to {difference:.3g}",
            do="report this with the model's name and the versions of torch and the format's library",
        )
    return Export(path, difference, (found.argmax(1) == expected.argmax(1)).double().mean().item())


def _write_timm(classifier: Classifier, description: ModelDescription, images: torch.Tensor, folder: Path) -> Path:
    """A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    if found := timm_obstacle(classifier.model, description):
        raise UsageError("export to timm", expected="a model with which timm makes the same predictions", found=found,
                         do="choose --format onnx or torch")  # fmt: skip
    target = folder / FILES["timm"]
    target.mkdir()
    state = {name: tensor.contiguous() for name, tensor in classifier.model.model.state_dict().items()}
    safetensors.torch.save_file(state, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(timm_config(description), indent=2) + "\n")
    return target


def timm_obstacle(model: NormalizedModel, description: ModelDescription) -> str:
    """Why timm cannot reproduce a model's predictions; empty if it can."""
    if description.members or is_custom_model(description.model):
        return "an ensemble" if description.members else f"{description.model}, which is not in timm"
    if description.heads == "class" and hasattr(model.model, "head_dist"):
        return "a distillation head that was not trained, which timm would average in"
    return ""


def timm_config(description: ModelDescription) -> dict[str, Any]:
    """config.json of a timm model folder (timm.models._hub.save_config_for_hf)."""
    own = timm.get_pretrained_cfg(description.model)
    config = {
        "num_classes": len(description.classes),
        "input_size": [3, description.size, description.size],
        "fixed_input_size": "img_size" in description.kwargs,
        "interpolation": "bicubic",
        "crop_pct": description.crop,
        "crop_mode": "center",
        "mean": list(description.mean),
        "std": list(description.std),
    }
    if own is not None:
        config |= {"first_conv": own.first_conv, "classifier": own.classifier}
    return {
        "architecture": description.model.partition(".")[0],
        "num_classes": len(description.classes),
        "label_names": description.classes,
        "model_args": description.kwargs,
        "pretrained_cfg": config,
    }


def _load_timm(path: Path, description: ModelDescription) -> Callable[[torch.Tensor], torch.Tensor]:
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return Classifier(NormalizedModel(model, description.mean, description.std, joint=True)).eval()


def _write_onnx(classifier: Classifier, description: ModelDescription, images: torch.Tensor, folder: Path) -> Path:
    target, batch = folder / FILES["onnx"], torch.export.Dim("batch")
    try:
        import onnx
        import onnxscript  # noqa: F401 torch.onnx needs it
    except ImportError as error:
        raise UsageError("export to ONNX", expected="onnx, onnxscript and onnxruntime", found=str(error),
                         do="install the extra `onnx`, or leave onnx out of --format") from error  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own code
        program = torch.onnx.export(
            classifier, (images[:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
            input_names=[IMAGES], output_names=[LOGITS],
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in description.as_json().items()})
    onnx.save(proto, target)
    return target


def _load_onnx(path: Path, _: ModelDescription) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])


def _write_program(classifier: Classifier, description: ModelDescription, images: torch.Tensor, folder: Path) -> Path:
    target, batch = folder / FILES["torch"], torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(classifier, (images[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, target, extra_files={"model.json": json.dumps(description.as_json())})
    return target


def _load_program(path: Path, _: ModelDescription) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(path).module()


LOADERS: dict[str, Callable[[Path, ModelDescription], Callable[[torch.Tensor], torch.Tensor]]] = {
    "timm": _load_timm,
    "onnx": _load_onnx,
    "torch": _load_program,
}
