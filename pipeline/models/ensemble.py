"""Several teachers as one: the mean of their predicted probabilities."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import interpolate, log_softmax

from pipeline.common.errors import UsageError
from pipeline.config.schema import Teacher
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.pretrained import load_pretrained


class Ensemble(NormalizedModel):
    """Teachers whose predicted probabilities are averaged; its logits are the logarithm of the mean.

    Each member has its own normalization and, where `sizes` says so, its own input size. Only its forward pass differs
    from a model's: it is given the same pictures, and all weights are in the state dict of `model`.
    """

    def __init__(self, members: Sequence[NormalizedModel], sizes: Sequence[int | None], name: str = "ensemble"):
        """`sizes` are the heights and widths of the members' input in pixels; None: that of the pictures."""
        super().__init__(nn.Module(), *members[0].mean_std, joint=True, name=name)
        self.model.members, self.sizes = nn.ModuleList(members), list(sizes)

    @property
    def members(self) -> list[NormalizedModel]:
        """The models, in the order of the configuration."""
        return list(self.model.members)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, classes) of float pictures (N, 3, P, P) in 0..255, twice: there is one head."""
        pairs = zip(self.model.members, self.sizes, strict=True)
        logits = mean_logits([member(resize_pictures(pictures, size))[0] for member, size in pairs])
        return logits, logits


def mean_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logarithm, float32 (N, classes), of the mean probabilities of several logits (N, classes)."""
    each = torch.stack([log_softmax(part.float(), 1) for part in logits])
    return each.logsumexp(0) - math.log(len(logits))


def resize_pictures(pictures: torch.Tensor, size: int | None) -> torch.Tensor:
    """Resize pictures (N, 3, P, P) to a model's input size if it differs: bilinear, antialiased."""
    if size is None or pictures.shape[-1] == size:
        return pictures
    return interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def build_ensemble(section: Teacher, classes: int) -> NormalizedModel:
    """Build the teacher with all its members, their weights untrained; without other members, the teacher itself."""
    return join(section, [build_teacher(member, classes) for member in section.members])


def join(section: Teacher, members: Sequence[NormalizedModel]) -> NormalizedModel:
    """The teacher made of these models; a single model is the teacher itself."""
    if len(members) == 1:
        return members[0]
    return Ensemble(members, [None, *(member.size for member in section.ensemble)], section.title)


def load_members(section: Teacher, classes: Sequence[str], checksums: Path) -> list[NormalizedModel]:
    """The additional teachers of the ensemble, with their weights.

    Raises:
        UsageError: weights with a different number of classes from the index.
        PipelineError: as `load_pretrained`.
    """
    models = []
    for number, member in enumerate(section.members[1:]):
        model, fits = load_pretrained(member, classes, checksums)
        if not fits:
            raise other_classes(number, str(member.weights), len(classes))
        models.append(model)
    return models


def other_classes(number: int, weights: str, classes: int) -> UsageError:
    """The error for the weights of an additional teacher whose classifier does not fit the index."""
    return UsageError(
        f"teacher.ensemble[{number}].weights {weights}",
        expected=f"a classifier for the {classes:,} classes of the index",
        found="a different number of classes",
        do="set its class_map; or fine-tune it first, as the teacher of another experiment, and name the"
        " weights.safetensors that this experiment publishes",
    )
