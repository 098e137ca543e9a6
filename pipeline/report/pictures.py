"""Pictures inside report.html: thumbnails as data URIs, and the images that a model is most sure about and wrong."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.report.comparison import Predictions
from pipeline.shards.index import Index
from pipeline.views.render import center_view

MISTAKES = 24
THUMBNAIL = 192
"""Longest side of a thumbnail in pixels."""
LOSSLESS = 64
"""Up to this side, thumbnails are PNG files: each of their pixels can be seen."""


@dataclass(frozen=True)
class Thumbnail:
    source: str
    """A data URI."""
    caption: str
    small: bool
    """Whether it is enlarged with hard edges."""


@dataclass(frozen=True)
class Mistake:
    """A validation image that a model classifies wrongly."""

    thumbnail: Thumbnail
    """What the model sees; its caption is the sample's key."""
    label: str
    prediction: str
    confidence: float
    """Probability of the predicted class."""


def thumbnail(picture: np.ndarray, caption: str = "") -> Thumbnail:
    """A picture, uint8 (height, width, 3), reduced to THUMBNAIL pixels if it is larger."""
    image, small = Image.fromarray(picture), max(picture.shape[:2]) <= LOSSLESS
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file, kind = io.BytesIO(), "png" if small else "jpeg"
    image.save(file, kind, **({} if small else {"quality": 85}))
    return Thumbnail(data_uri(file.getvalue(), kind), caption, small)


def data_uri(file: bytes, kind: str) -> str:
    """An image file inside a page."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def confident_mistakes(
    index: Index, labels: np.ndarray, predictions: Predictions, size: int, crop: float, count: int = MISTAKES
) -> list[Mistake]:
    """The wrongly classified images of highest confidence, as the model sees them: a centre crop of `size` pixels."""
    wrong = np.flatnonzero(predictions.classes != labels)
    rows = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:count]
    mistakes = []
    for row in rows.tolist():
        shard, position = index.locate(row)
        picture = center_view(index.image(shard, position), size, crop).transpose(1, 2, 0)
        key = index.rows(shard)[position]["key"].decode()
        label, prediction = index.classes[labels[row]], index.classes[predictions.classes[row]]
        mistakes.append(Mistake(thumbnail(picture, key), label, prediction, float(predictions.confidence[row])))
    return mistakes
