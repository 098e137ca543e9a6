"""A RegNetY for images of 32 pixels: a model of your own as teacher, `teacher.model: examples.small_image_regnet:build`.

timm's stem halves the resolution, which small images cannot afford; here it keeps it.
"""

from typing import Any

import timm
from torch import nn


def build(num_classes: int, **kwargs: Any) -> nn.Module:
    """timm's regnety_002 with a stem of stride 1; `kwargs` replace its settings: w0, wa, wm, depth, group_size, ..."""
    model = timm.create_model("regnety_002", num_classes=num_classes, **kwargs)
    model.stem.conv.stride = (1, 1)
    return model
