"""How far each kind of store is from the teacher's own float32 logits, on a trained teacher.

KL(teacher || stored) and total variation at tau 1 and 3, mean over the views of the first groups of the training set,
mixed as a student sees them; and what the precision of the teacher's forward pass changes. Run it in the folder of an
experiment that has its teacher.

    python bench/fidelity.py [--config params.yaml] [--groups 40] [--top-k 1,3,5]
"""

import click
import torch
from machine import conditions
from results import head, row

from pipeline.batches.batch import Renderer, mixed
from pipeline.batches.plan import Item
from pipeline.config.params import load_config
from pipeline.config.paths import index_path
from pipeline.config.schema import Config, TeacherLogits
from pipeline.models.teacher import TeacherForward, load_teacher, resize_pictures, teacher_logits
from pipeline.shards.index import Index
from pipeline.store.encoding import decode_logits, encode
from pipeline.store.kinds import row_bytes
from pipeline.views.draw import group_count

TAUS = (1.0, 3.0)
HEAD_TOO = "bfloat16, its head too"


def teachers_logits(config: Config, groups: int) -> tuple[dict[str, torch.Tensor], int]:
    """Float32 logits (samples, classes) of the first groups' first views by precision, and the number of classes."""
    index, recipe = Index(index_path(config, "train")), config.recipe
    teacher = load_teacher(config, index.classes, torch.device("cpu"))
    size = config.teacher_size("train-student")
    settings = [TeacherLogits(precision=name, batch_groups=1) for name in ("float32", "bfloat16")]
    forwards = {chosen.precision: TeacherForward(teacher, chosen, size) for chosen in settings}
    items = [
        Item(shard, group, 0)
        for shard in range(len(index.names))
        for group in range(group_count(int(index.samples[shard]), recipe.group_size))
    ]
    renderer, found = Renderer(index, recipe), {name: [] for name in (*forwards, HEAD_TOO)}
    for item in items[:groups]:
        batch = renderer.render([item])
        pictures, members = mixed(batch), len(batch.members[0])
        for name, forward in forwards.items():
            found[name].append(forward.logits(pictures, recipe.group_size)[:members])
        teacher.float32_head = False
        pictures = resize_pictures(pictures, size)
        found[HEAD_TOO].append(teacher_logits(teacher, pictures, recipe.group_size, 1, "bfloat16")[:members])
        teacher.float32_head = True
    return {name: torch.cat(parts) for name, parts in found.items()}, len(index.classes)


def stored(logits: torch.Tensor, kind: str, top_k: int) -> torch.Tensor:
    """The logits as a store returns them."""
    encoded = encode(kind, logits, top_k)[1]
    assert encoded is not None, f"{kind} keeps no logits"
    return decode_logits(kind, encoded, logits.shape[1])


def distances(logits: torch.Tensor, others: torch.Tensor, tau: float) -> tuple[float, float]:
    """Mean KL(logits || others) and total variation at a temperature."""
    true, found = ((values.double() / tau).log_softmax(1) for values in (logits, others))
    divergence = (true.exp() * (true - found)).sum(1).mean()
    return float(divergence), float(0.5 * (true.exp() - found.exp()).abs().sum(1).mean())


@click.command(help=__doc__)
@click.option("--config", "path", default="params.yaml", show_default=True)
@click.option("--groups", default=40, show_default=True)
@click.option("--top-k", default="1,3,5", show_default=True)
def main(path: str, groups: int, top_k: str):
    config = load_config(path, ())
    by_precision, classes = teachers_logits(config, groups)
    logits = by_precision["float32"]
    print(conditions())
    confidence = logits.softmax(1).amax(1).mean()
    print(f"* {config.teacher.model} on {config.name}: {len(logits):,} views, mean confidence {confidence:.2f}\n")
    head("kind", "bytes per view", "KL, tau 1", "TV, tau 1", "KL, tau 3", "TV, tau 3")
    for kind, k in [("dense", 1), ("dense8", 1), *(("topk", int(k)) for k in top_k.split(","))]:
        numbers = [f"{value:.1e}" for tau in TAUS for value in distances(logits, stored(logits, kind, k), tau)]
        row(f"top {k}" if kind == "topk" else kind, f"{row_bytes(kind, classes, k)}", *numbers)
    print()
    head("teacher computed in, stored as dense", "KL, tau 1", "KL, tau 3", "argmax that differ, %", "ties for argmax, %")
    for name, others in by_precision.items():
        numbers = [f"{distances(logits, stored(others, 'dense', 1), tau)[0]:.1e}" for tau in TAUS]
        best = others.topk(2).values
        shares = [(logits.argmax(1) != others.argmax(1)), best[:, 0] == best[:, 1]]
        row(name, *numbers, *(f"{100 * share.double().mean():.3g}" for share in shares))


if __name__ == "__main__":
    main()
