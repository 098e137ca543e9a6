"""How similar class and distillation token are, layer by layer (DeiT's paper, section 4)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from pipeline.common.distributed import Rank
from pipeline.models.build import NormalizedModel

PARAMETERS, INPUT, NORM = "parameters", "input", "norm"


@dataclass(frozen=True)
class LayerCosine:
    """The cosine between class and distillation token at one layer."""

    layer: str
    """`parameters`: the learned tokens themselves, the same for every image; `input`: what the first block gets, with
    position embeddings; `1` .. `L`: the residual stream after that block; `norm`: after the final layer norm, which is
    what the heads get."""
    mean: float
    """Over images."""
    deviation: float
    """Population standard deviation over images."""


class TokenCosines:
    """Cosines of the images that pass through a model inside `record`; none if it has no trained distillation token."""

    def __init__(self, model: NormalizedModel, distilled: bool):
        """
        Args:
            distilled: whether the model's distillation token, if it has one, was trained.
        """
        self._layers: dict[str, nn.Module] = {}
        self._parts: dict[str, list[torch.Tensor]] = {}
        if distilled and model.distilled:
            inner = model.model  # timm's VisionTransformerDistilled; its norm_pre does nothing
            blocks = {str(number): block for number, block in enumerate(inner.blocks, 1)}
            self._layers = {INPUT: inner.norm_pre, **blocks, NORM: inner.norm}
            self._parameters = (inner.cls_token.detach().flatten(), inner.dist_token.detach().flatten())

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record every forward pass inside, by forward hooks, which change nothing."""
        self._parts = {layer: [] for layer in self._layers}
        handles = [module.register_forward_hook(self._hook(layer)) for layer, module in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            tokens = output[:, :2].detach().float()
            self._parts[layer].append(cosine_similarity(tokens[:, 0], tokens[:, 1], dim=1))

        return hook

    def gather(self, count: int, device: torch.device) -> list[LayerCosine]:
        """Summarize what was recorded, a row per layer, over all ranks.

        Args:
            count: images that passed through the model, on all ranks together, each on one.
        """
        if not self._layers:
            return []
        # a rank may have had no image
        own = [torch.cat([torch.zeros(0, device=device), *parts]).cpu() for parts in self._parts.values()]
        rows = Rank.current(device).all_gather(torch.stack(own, 1), count, device).double()
        parameters = float(cosine_similarity(*(token.float() for token in self._parameters), dim=0))
        deviations, means = torch.std_mean(rows, 0, correction=0)
        found = zip(self._layers, means.tolist(), deviations.tolist(), strict=True)
        return [LayerCosine(PARAMETERS, parameters, 0.0), *(LayerCosine(*each) for each in found)]
