"""A RegNetY for images of 32 pixels: a custom model as teacher, `teacher.model: examples.small_image_regnet:build`.

timm's RegNets halve the resolution five times, which leaves a 32-pixel image a single position. Here the strides of the
stem and of the stages are arguments.
"""

from collections.abc import Sequence
from typing import Any

import timm
from torch import nn


def build(num_classes: int, stem_stride: int = 2, strides: Sequence[int] = (1, 2, 1, 2), **kwargs: Any) -> nn.Module:
    """timm's regnety_002 with other strides.

    Args:
        strides: of the four stages.
        kwargs: replace regnety_002's settings: w0, wa, wm, depth, group_size, stem_width, ...
    """
    model = timm.create_model("regnety_002", num_classes=num_classes, **kwargs)
    model.stem.conv.stride = (stem_stride, stem_stride)
    for stage, stride in zip((model.s1, model.s2, model.s3, model.s4), strides, strict=True):
        stage.b1.conv2.conv.stride = (stride, stride)
        if hasattr(stage.b1.downsample, "conv"):
            stage.b1.downsample.conv.stride = (stride, stride)
    return model
