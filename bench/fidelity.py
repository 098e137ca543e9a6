"""How far each kind of store is from the teacher's own float32 logits, on a trained teacher.

KL(teacher || stored) and total variation at tau 1 and 3, mean over the views of the first groups of the
training set, mixed as a student sees them. Run it in the folder of an experiment whose teacher is there.

    python bench/fidelity.py [--config params.yaml] [--groups 40] [--top-k 1,3,5]
"""

import click
import numpy as np
import torch
from machine import conditions

from pipeline.answers import decode_logits, encode, row_bytes
from pipeline.config import Config
from pipeline.groups import Renderer, mixed
from pipeline.layout import index_path
from pipeline.models import load_teacher, teacher_logits
from pipeline.params import load
from pipeline.plan import Item
from pipeline.recipe import group_count
from pipeline.shards import Index

TAUS = (1.0, 3.0)


def teachers_logits(config: Config, groups: int) -> tuple[torch.Tensor, int]:
    """Float32 logits (samples, classes) of the first groups' first views, and the number of classes."""
    index, recipe = Index(index_path(config, "train")), config.recipe
    teacher = load_teacher(config, len(index.classes), torch.device("cpu"))
    items = [
        Item(shard, group, 0)
        for shard in range(len(index.names))
        for group in range(group_count(int(index.samples[shard]), recipe.group_size))
    ]
    renderer, found = Renderer(index, recipe), []
    for item in items[:groups]:
        rendered = renderer.render([item])
        logits = teacher_logits(teacher, mixed(rendered), recipe.group_size, 1, False)
        found.append(logits[: len(rendered.members[0])])
    return torch.cat(found), len(index.classes)


def distances(logits: torch.Tensor, kind: str, top_k: int, tau: float) -> tuple[float, float]:
    """Mean KL(teacher || stored) and total variation at a temperature."""
    true = (logits.double() / tau).log_softmax(1).numpy()
    encoded = encode(kind, logits, top_k)[1]
    assert encoded is not None, f"{kind} keeps no logits"
    stored = (decode_logits(kind, encoded, logits.shape[1]) / tau).log_softmax(1).double().numpy()
    divergence = (np.exp(true) * (true - stored)).sum(1).mean()
    return float(divergence), float(0.5 * np.abs(np.exp(true) - np.exp(stored)).sum(1).mean())


@click.command(help=__doc__)
@click.option("--config", "path", default="params.yaml", show_default=True)
@click.option("--groups", default=40, show_default=True)
@click.option("--top-k", default="1,3,5", show_default=True)
def main(path: str, groups: int, top_k: str):
    config = load(path, ())
    logits, classes = teachers_logits(config, groups)
    print(conditions())
    confidence = logits.softmax(1).amax(1).mean()
    print(f"* {config.teacher.model} on {config.name}: {len(logits):,} views, mean confidence {confidence:.2f}")
    print("\n| kind | bytes a view | KL, tau 1 | TV, tau 1 | KL, tau 3 | TV, tau 3 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    kinds = [("dense", 1), ("dense8", 1), *(("topk", int(k)) for k in top_k.split(","))]
    for kind, k in kinds:
        name = f"top {k}" if kind == "topk" else kind
        numbers = [f"{value:.1e}" for tau in TAUS for value in distances(logits, kind, k, tau)]
        print(f"| {name} | {row_bytes(kind, classes, k)} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
