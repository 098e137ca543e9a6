"""What the report tells of an experiment beside its results: pictures that the teacher judged, and facts."""

import platform
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.batches.batch import Batch, Renderer, mixed
from pipeline.batches.plan import Item
from pipeline.config.paths import FINETUNED
from pipeline.config.schema import Config, Student
from pipeline.report.plots import Sample, SeenView
from pipeline.shards.index import Index
from pipeline.store.encoding import decode_logits
from pipeline.store.layout import library_versions
from pipeline.store.reader import Store
from pipeline.training.teachers import read_predictions
from pipeline.views.draw import group_count, recipe_fingerprint

SHOWN_SAMPLES, SHOWN_VIEWS = 4, 3


def shown_samples(config: Config, index: Index, answers: tuple[Store, dict[str, Any]] | None) -> list[Sample]:
    """The first members of the first group of the first shard, in the first views.

    Args:
        answers: a store and its manifest, where a teacher judged them.
    """
    renderer = Renderer(index, config.recipe)
    positions = renderer.members(Item(0, 0, 0))[:SHOWN_SAMPLES]
    labels = index.rows(0)["label"]
    samples = {
        int(position): Sample(index.classes[labels[position]], index.image(0, int(position)), [])
        for position in positions
    }
    views = answers[1]["views"] if answers else config.teacher_logits.views
    for view in range(min(SHOWN_VIEWS, views)):
        # another block has other groups, so these samples may be spread over several
        for group in range(group_count(int(index.samples[0]), config.recipe.group_size)):
            item = Item(0, group, view)
            wanted = [(slot, int(p)) for slot, p in enumerate(renderer.members(item)) if int(p) in samples]
            if wanted:
                batch = renderer.render([item])
                for slot, seen in _seen(index, answers, batch, [slot for slot, _ in wanted]):
                    samples[dict(wanted)[slot]].views.append(seen)
    return list(samples.values())


def _seen(
    index: Index, answers: tuple[Store, dict[str, Any]] | None, batch: Batch, slots: list[int]
) -> Iterator[tuple[int, SeenView]]:
    """Some slots of one group, each with its view."""
    judged = _judgements(*answers, batch) if answers else [("", None)] * (max(slots) + 1)
    pictures = mixed(batch).round().byte().permute(0, 2, 3, 1).numpy()
    labels = batch.labels[0]
    for slot in slots:
        partner = int(batch.partner[0, slot])
        cut, alone = bool(batch.box[0, 2] > batch.box[0, 0]), partner == slot or float(batch.lam[0]) == 1
        answer, probability = judged[slot]
        yield slot, SeenView(
            number=batch.items[0].view,
            picture=batch.images[0, slot].permute(1, 2, 0).numpy(),
            mixed=pictures[slot],
            kind="none" if alone else "cutmix" if cut else "mixup",
            lam=1.0 if alone else float(batch.lam[0]),
            partner=index.classes[labels[partner]],
            answer=answer,
            probability=probability,
        )


def _judgements(store: Store, manifest: dict[str, Any], batch: Batch) -> list[tuple[str, float | None]]:
    """Of each slot, the teacher's class and what it gave that class, where the store tells."""
    argmax, payload = read_predictions(store, batch, manifest["kind"])
    if payload is None:
        return [(store.index.classes[answer], None) for answer in argmax]
    sure = decode_logits(manifest["kind"], payload, store.classes).softmax(1)
    return [(store.index.classes[answer], float(row[answer])) for answer, row in zip(argmax, sure, strict=True)]


def describe_experiment(
    config: Config, train: Index, val: Index, store: Store | None, summary: dict[str, Any], device: torch.device
) -> dict[str, dict[str, str]]:
    """What the run was, for the report: headings, terms and what they are; `summary` is the store's."""
    recipe, teacher, tuned, evaluated = config.recipe, config.teacher, config.finetune, config.evaluate
    students = {name: _taught(config.student_named(name)) for name in config.students}
    if students or tuned.weights:
        for name in tuned.students:
            about = f"{tuned.weights or name} at {tuned.size} px, epochs: {tuned.epochs}"
            students[f"{name}-{FINETUNED}"] = about
    cpu = f"CPU, threads: {torch.get_num_threads()}"
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    taught = {}
    if store:
        trained = "elsewhere" if teacher.weights else f"here, epochs: {teacher.epochs}"
        taught["Teacher"] = {"model": teacher.weights or teacher.model, "trained": trained}
        taught["Store of its answers"] = _describe_store(store, summary)
    return {
        "Students": students,
        **taught,
        "Recipe": {
            "views": f"{recipe.size} px, crops of {recipe.scale[0]:g} to {recipe.scale[1]:g} of the image",
            "augmentation": f"{recipe.auto_augment or 'no RandAugment'}, flip {recipe.hflip:g},"
            f" erasing {recipe.erase_prob:g}",
            "mixing": f"mixup {recipe.mixup_alpha:g}, cutmix {recipe.cutmix_alpha:g},"
            f" in groups of {recipe.group_size}",
            "repeats": f"{recipe.repeats}, in blocks of {recipe.block} views",
            "seed": str(recipe.seed),
            "fingerprint": recipe_fingerprint(recipe),
        },
        "Data": {
            "classes": f"{len(train.classes):,}",
            "training": f"{len(train):,} images in {len(train.names):,} shards",
            "validation": f"{len(val):,} images",
            "fingerprint": train.fingerprint,
        },
        "Evaluated with": {
            "device": on,
            "batch": f"{evaluated.batch_size}, throughput over {evaluated.throughput_seconds:g} s",
            "crop": f"{evaluated.crop:g}, fine-tuned {evaluated.crop_finetuned:g}, teacher {teacher.crop:g}",
            "python": platform.python_version(),
        }
        | library_versions(),
    }


def _taught(student: Student) -> str:
    how = "labels only"
    if student.distillation != "none":
        how = f"{student.distillation} distillation, α {student.alpha:g}"
    if student.distillation == "soft":
        how += f", τ {student.tau:g}"
    return f"{student.model}, {how}, epochs: {student.epochs}"


def _describe_store(store: Store, summary: dict[str, Any]) -> dict[str, str]:
    rows, views, size = summary["rows"], summary["views"], summary["bytes"]
    return {
        "images": f"{rows:,}",
        "views of each": f"{views:,}",
        "kind": summary["kind"],
        "size": f"{size / 1e6:,.1f} MB, {size / (rows * views):.1f} bytes a view",
        "precision": str(store.attributes["precision"]),
        "agreement": f"its answer is the image's own label for {summary['agreement_with_labels']:.1%}",
        "fingerprint": store.fingerprint,
    }
