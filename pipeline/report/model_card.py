"""A model card: what a trained model is, how good it is, how it was trained, how to load it."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.files import file_sha256, read_json_object, write_text
from pipeline.models.build import NormalizedModel, parameter_count
from pipeline.models.description import ModelDescription

WEIGHTS_LINE = "| SHA-256 of the weights | "
USE = {
    "timm": """```python
import timm, torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:{path}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])
```""",
    "model.onnx": "`{path}` (ONNX): input `images`, float32 RGB (N, 3, {size}, {size}) in [0, 1]; output `logits`."
    " Normalization is part of the graph; class names are in the metadata.",
    "model.pt2": "`{path}` (torch.export): `torch.export.load(path).module()` takes float32 RGB (N, 3, {size}, {size}) in"
    " [0, 1] and returns logits. Normalization is part of it.",
}


def write_model_card(
    path: Path, weights: Path, model: NormalizedModel, description: ModelDescription, about: dict[str, Any],
    exports: list[Path],
) -> None:  # fmt: skip
    """Write the card as Markdown.

    Args:
        weights: the file that the model was loaded from; its metrics.json, if any, gives the results.
        about: metadata of that file.
        exports: the exported files that the card explains.
    """
    results = read_json_object(weights.with_name("metrics.json"))
    text = model_card(parameter_count(model.model), description, about, weights_line(weights), results, exports)
    write_text(path, text)


def weights_line(weights: Path) -> str:
    """The card's line that identifies the file of weights."""
    return f"{WEIGHTS_LINE}`{file_sha256(weights)}` |"


def described_weights(card: Path) -> str | None:
    """The line of a card that identifies the weights; None if the file is not a card, or does not exist."""
    lines = card.read_text(errors="replace").splitlines() if card.is_file() else []
    return next((line for line in lines if line.startswith(WEIGHTS_LINE)), None)


def model_card(
    parameters: int, description: ModelDescription, about: dict[str, Any], weights: str, results: dict[str, Any],
    exports: list[Path],
) -> str:  # fmt: skip
    """The card as Markdown."""
    accuracy = [
        f"| {label} | {results[key]:.2%} |"
        for key, label in (
            ("top1", "top-1"), ("top5", "top-5"), ("val_top1_class", "top-1, class head"),
            ("val_top1_mean", "top-1, mean of both heads"),
        )
        if isinstance(results.get(key), float)
    ]  # fmt: skip
    names = ", ".join(description.classes[:20]) + (", ..." if len(description.classes) > 20 else "")
    kind = "ensemble" if description.members else "custom model" if description.code else "timm"
    lines = [
        f"# {description.model}", "",
        f"An image classifier for {len(description.classes):,} classes: {names}.", "",
        "| | |", "| --- | --- |",
        f"| architecture | {kind} `{description.model}`, `{json.dumps(description.kwargs)}` |",
        f"| parameters | {parameters:,} |",
        f"| input | RGB, {description.size} x {description.size} px, centre crop {description.crop:g} |",
        f"| mean, std | {description.mean}, {description.std} |",
        f"| training run | `{about.get('run', 'unknown')}` |",
        weights, "",
    ]  # fmt: skip
    if accuracy:
        lines += ["## Results on the validation set", "", "| | |", "| --- | --- |", *accuracy, ""]
    lines += ["## Use", ""]
    for exported in exports:
        if exported.name in USE:
            lines += [USE[exported.name].replace("{path}", str(exported)).replace("{size}", str(description.size)), ""]
    return "\n".join(lines)
