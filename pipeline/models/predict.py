"""Classify image files with a trained model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline.common.errors import PipelineError, UsageError, unreadable
from pipeline.models.build import NormalizedModel
from pipeline.models.description import ModelDescription
from pipeline.shards.conversion import FOLDER_FORMATS
from pipeline.shards.images import MAX_PIXELS, Undecodable, open_image, to_rgb
from pipeline.views.render import center_view

BATCH = 64
"""Images per forward pass."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    image: Path
    classes: list[str]
    probabilities: list[float]


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (height, width, 3), turned upright as EXIF says.

    Raises:
        UsageError: the file is missing, or is not an image of a supported format.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such file", expected="an image, or a folder of images", found="nothing", do="correct the path"
        ) from None
    except OSError as error:
        raise unreadable(str(path), error) from error
    try:
        with open_image(data, MAX_PIXELS, FOLDER_FORMATS) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Undecodable as error:
        raise UsageError(
            f"{path}: not a readable image", expected=", ".join(FOLDER_FORMATS), found=str(error), do="remove or convert it"
        ) from error


def preprocess(images: list[np.ndarray], description: ModelDescription) -> torch.Tensor:
    """Evaluation views of images, float32 (N, 3, size, size) in 0..255."""
    views = [center_view(image, description.size, description.crop) for image in images]
    return torch.from_numpy(np.stack(views)).float()


@torch.no_grad()
def predict_files(
    model: NormalizedModel, description: ModelDescription, paths: list[Path], top: int = 5
) -> Iterator[Prediction | PipelineError]:
    """Predictions for image files, in order; for a file that is missing or not an image, an error that says so."""
    top = min(top, len(description.classes))
    for first in range(0, len(paths), BATCH):
        batch, images = [], []
        for path in paths[first : first + BATCH]:
            try:
                images.append(read_image(path))
                batch.append(path)
            except PipelineError as error:
                yield error
        if not images:
            continue
        pictures = preprocess(images, description)
        probabilities, classes = model(pictures.to(model.mean.device))[0].softmax(1).topk(top)
        for path, values, numbers in zip(batch, probabilities.tolist(), classes.tolist(), strict=True):
            yield Prediction(path, [description.classes[number] for number in numbers], values)


def image_files(paths: list[Path]) -> list[Path]:
    """The given files, and the images below the given folders, sorted.

    Raises:
        UsageError: a folder holds no image.
    """
    extensions = Image.registered_extensions()
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(file for file in path.rglob("*") if extensions.get(file.suffix.lower()) in FOLDER_FORMATS)
        if not below:
            raise UsageError(
                f"{path}: no images", expected=", ".join(FOLDER_FORMATS), found="a folder without any", do="correct the path"
            )
        found += below
    return found
