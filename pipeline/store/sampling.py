"""Classes drawn from the teacher's softmax: kind sampled (Sparse Logit Sampling, arXiv:2503.16870).

With t = counts / k, the expectation of the loss -tau^2 sum t log s has the gradient of the complete soft loss. The k
classes of a view are drawn systematically, at (j + U) / k in the cumulative distribution: each class is drawn k p times,
rounded up or down, so that no other unbiased draw of k classes varies less in any class.

U follows from sample and view alone. After the logits only IEEE 754 additions and multiplications and integers are
used, as libraries' exp and sums of floating-point numbers differ between processors. So the same logits should give the
same classes on every machine.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.batches.batch import Batch
from pipeline.batches.transfer import send
from pipeline.common.errors import UsageError
from pipeline.config.schema import Recipe
from pipeline.config.store_spec import StoreSpec
from pipeline.shards.index import Index
from pipeline.store.layout import StoreLayout
from pipeline.views.draw import draw_offset

PRECISION = 38  # bits of the largest class's weight; with 2^16 classes and 255 draws everything fits into 63 bits
LOWEST = -40.0  # exponents below it have weight 0
TAYLOR = [1 / math.factorial(power) for power in range(12, -1, -1)]


@dataclass(frozen=True)
class Sampler:
    """Draws the classes of views, the same for the store and for online distillation."""

    index: Index
    recipe: Recipe
    samples: int
    tau: float

    def __call__(self, batches: Sequence[Batch], logits: torch.Tensor) -> torch.Tensor:
        """Draw classes, int64 (N, samples), for the slots of batches from the teacher's logits (N, classes)."""
        offsets = torch.cat([self._offsets(batch) for batch in batches])
        return draw_classes(logits, send(offsets, logits.device), self.samples, self.tau)

    def _offsets(self, batch: Batch) -> torch.Tensor:
        """U of each slot, float64 (G * S,); 0.5 for unused slots, which have weight 0."""
        offsets = torch.full(batch.labels.shape, 0.5, dtype=torch.float64)
        for number, (item, members) in enumerate(zip(batch.items, batch.members, strict=True)):
            keys = self.index.rows(item.shard)["key"][members].tolist()
            drawn = [draw_offset(self.recipe, key.decode(), item.view) for key in keys]
            offsets[number, : len(members)] = torch.tensor(drawn, dtype=torch.float64)
        return offsets.flatten()


def draw_classes(logits: torch.Tensor, offsets: torch.Tensor, samples: int, tau: float) -> torch.Tensor:
    """Draw from softmax(logits / tau), in ascending order, int64 (N, samples).

    Args:
        logits: finite, (N, classes).
        offsets: U of each row, float64 (N,), in (0, 1).
    """
    cumulative = class_weights(logits, tau).cumsum(1)
    total = cumulative[:, -1:]
    start = torch.minimum((offsets[:, None] * total).long(), total - 1)  # the product may be rounded up to the total
    points = torch.arange(samples, device=logits.device) * total + start
    # logits that are not finite, which callers refuse, must not become numbers of no class
    return torch.searchsorted(samples * cumulative, points, right=True).clamp(max=logits.shape[1] - 1)


def class_weights(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """softmax(logits / tau) up to a factor, as integers, int64 (N, classes); about 2^38 for the likeliest class."""
    exponents = logits.double()
    exponents = (exponents - exponents.amax(1, keepdim=True)).mul_(1 / tau).clamp_(min=LOWEST)
    halvings = (exponents * (-1 / math.log(2))).round_()
    rest = exponents.add_(halvings * math.log(2))  # within log(2) / 2 of 0
    power = torch.full_like(rest, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        power.mul_(rest).add_(coefficient)
    return power.mul_(2.0**PRECISION).long() >> halvings.long()


def check_sampling(store: StoreLayout, spec: StoreSpec) -> None:
    """Check that a store's drawn classes are those of a configuration, if it has kind sampled.

    Raises:
        UsageError: the store holds other draws, or logits.
    """
    found = store.attributes.get("sampling")
    if spec.sampling is not None and found != spec.sampling:
        raise UsageError(
            f"{store.path}: the drawn classes",
            expected=f"those of the configuration: {json.dumps(spec.sampling)}",
            found=json.dumps(found) if found else "a store of other kinds",
            do="run teacher-logits again, which fills a separate store; or set teacher_logits.samples and"
            " teacher_logits.sample_tau back",
        )
