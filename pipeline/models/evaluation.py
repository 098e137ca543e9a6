"""Figures that the paper reports: accuracy of each head and of the joint classifier, disagreement, cost."""

import time
from itertools import product

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softmax
from torch.utils.flop_counter import FlopCounterMode

from pipeline.batches.loader import ImageSet, evaluation_loader
from pipeline.common.arithmetic import autocast
from pipeline.common.distributed import Rank
from pipeline.models.build import NormalizedModel


@torch.no_grad()
def predict(
    model: NormalizedModel,
    images: ImageSet,
    size: int,
    crop: float,
    batch: int,
    workers: int | None,
    device: torch.device,
    precision: str = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the class head and of the distillation head for every image, float32 (images, classes) on the CPU.

    Under torchrun each rank computes its share, and all ranks get all logits.
    """
    rank, training = Rank.current(device), model.training
    model.to(device).eval()
    parts = [[torch.zeros(0, len(images.classes))] * 2]  # a rank may have no share of a small set
    share = rank.local_range(len(images))
    for pictures in evaluation_loader(images, share, size, crop, batch, workers, device.type == "cuda"):
        with autocast(device.type, precision):
            heads = model(pictures.to(device, non_blocking=True).float())
        parts.append([logits.float().cpu() for logits in heads])
    model.train(training)
    class_logits, distillation_logits = (
        rank.all_gather(torch.cat(part), len(images), device) for part in zip(*parts, strict=True)
    )
    return class_logits, distillation_logits


def classifiers(heads: tuple[torch.Tensor, torch.Tensor], distilled: bool) -> dict[str, torch.Tensor]:
    """Scores (N, classes) of every classifier that a model's heads form.

    They are the `class` and the `distillation` head; `mean` of logits (DeiT's code) and `softmax` sum (DeiT's paper,
    section 4). A model with one head has `class` only.
    """
    first, second = heads
    if not distilled:
        return {"class": first}
    return {
        "class": first,
        "distillation": second,
        "mean": (first + second) / 2,
        "softmax": softmax(first, 1) + softmax(second, 1),
    }


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Share in 0..1 of samples whose label is among the k highest scores; of equal scores, the first is the highest, as for
    argmax. (torch.topk chooses any, and in bfloat16 equal scores are frequent.)"""
    own, numbers = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1])
    better = (scores > own) | scores.isnan() | ((scores == own) & (numbers < labels[:, None]))
    return ((better.sum(1) < k) & ~own[:, 0].isnan()).double().mean().item()


def disagreement(predictions: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Share of samples that two classifiers classify differently (paper, Table 4); symmetric, with a zero diagonal."""
    table: dict[str, dict[str, float]] = {name: {} for name in predictions}
    for (a, first), (b, second) in product(predictions.items(), repeat=2):
        table[a][b] = float(np.mean(first != second))
    return table


def multiply_adds(model: NormalizedModel, size: int) -> int:
    """MACs of one image's forward pass, including attention (timm's convention: 1 MAC = 2 FLOPs)."""
    device = next(model.parameters()).device
    model.eval()
    # plain matrix products: torch's counter knows only some fused attention kernels (in torch 2.11 none on a CPU)
    # with gradients: torch's counter fails without them if a parameter, such as a class token, is a module's input
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops() // 2


@torch.no_grad()
def throughput(model: NormalizedModel, size: int, batch: int, seconds: float, precision: str = "float32") -> float:
    """Images per second of the forward pass on the model's device: the median of runs over `seconds`."""
    device = next(model.parameters()).device
    pictures = torch.zeros(batch, 3, size, size, device=device)
    model.eval()
    rates, end = [], time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        with autocast(device.type, precision):
            model(pictures)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(batch / (time.perf_counter() - start))
    return float(np.median(rates))
