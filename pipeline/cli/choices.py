"""What `pipeline init` chooses for a folder of images, and why: pure functions of a few facts.

The values are starting points that suit data sets of this kind; none was tuned on the user's images.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.shards.advice import padding

SHARD = 1280
"""Most samples per shard, the default of data.shard_samples."""
MEGAPIXELS = 0.5
"""Mean from which reading images is work for processes of its own on a CPU too."""
DENSE_BYTES = 2e9
"""Largest store of all logits; a larger one holds the argmax only."""


@dataclass(frozen=True)
class Facts:
    """What the choices depend on."""

    images: int
    """Training images."""
    classes: int
    short_side: int
    """Median of the shorter side, in pixels."""
    majority: float
    """Share of the validation images that are of the largest class: the accuracy of a constant guess."""
    megapixels: float = 0.2
    """Mean."""
    gpu: bool = False
    bfloat16: bool = False
    """Whether the GPU computes in it."""
    pretrained: bool = False
    """Whether the weights of `released_teacher` can be had."""


@dataclass(frozen=True)
class Choice:
    """A value of the configuration and the reason for it."""

    value: Any
    reason: str


Choices = dict[str, Choice]
"""By key, section.key."""


def choose(facts: Facts) -> Choices:
    """Every choice, in the order of the file."""
    size, epochs = image_size(facts), student_epochs(facts)
    batch = 64 if not facts.gpu else 256 if facts.images >= 5_000 else 128
    group = min(batch // 2, 64)
    return {
        **_data(facts, group),
        **_recipe(facts, size, group, epochs),
        **_teacher(facts, size, batch),
        **_store(facts, epochs),
        **_student(facts, size, batch, epochs),
        **_evaluation(facts, epochs),
    }


def image_size(facts: Facts) -> int:
    """Pixels: the largest of a few sizes that the images fill."""
    sizes = (32, 64, 96, 128) if facts.gpu else (32, 64, 96)
    return max([size for size in sizes if size <= facts.short_side], default=sizes[0])


def patch_size(facts: Facts, size: int) -> int:
    """Pixels: 16 x 16 patches on a GPU; on a CPU 8 x 8, or 6 x 6 of 16 pixels."""
    return size // 16 if facts.gpu else size // 8 if size < 96 else 16


def epochs_for(facts: Facts, images: int, least: int, most: int) -> int:
    """Epochs in which about `images` images are seen in all."""
    return min(max(round(images / facts.images), least), most)


def student_epochs(facts: Facts) -> int:
    """A multiple of 3, the views per visit, and above 30 of 30, the largest block."""
    epochs = epochs_for(facts, 3_000_000, 60, 300) if facts.gpu else epochs_for(facts, 48_000, 15, 90)
    step = 30 if epochs > 30 else 3
    return -(-epochs // step) * step


def released_teacher(gpu: bool) -> str:
    """The timm tag of the pretrained teacher: DeiT's own, or a network of a twentieth of its cost."""
    return "regnety_160.deit_in1k" if gpu else "regnety_008_tv.tv2_in1k"


def teacher_epochs(facts: Facts) -> int:
    if facts.pretrained:
        return epochs_for(facts, 300_000, 10, 30) if facts.gpu else epochs_for(facts, 15_000, 4, 20)
    return epochs_for(facts, 1_500_000, 40, 120) if facts.gpu else epochs_for(facts, 40_000, 10, 60)


def _data(facts: Facts, group: int) -> Choices:
    least = -(-facts.images // SHARD)
    shards = min(range(least, 2 * least + 1), key=lambda count: padding(facts.images, count, group))
    samples = -(-facts.images // shards)
    unused = padding(facts.images, shards, group)
    return {
        "data.shard_samples": Choice(samples, f"{shards} shards; {unused:.1%} of the slots of their groups stay unused"),
        "data.max_bad": Choice(
            max(1, facts.images // 100), "a few broken files are left out, and named in index.json, rather than an error"
        ),
    }


def _recipe(facts: Facts, size: int, group: int, epochs: int) -> Choices:
    return {
        "recipe.size": Choice(
            size, f"half of the images have a shorter side of at least {facts.short_side} px; training from scratch on"
            " few images gains little from more pixels"
        ),
        "recipe.scale": Choice([0.25, 1.0], "milder crops than DeiT's 0.08: at this size a small crop shows too little"),
        "recipe.mix_prob": Choice(0.5, "half as much Mixup and CutMix as in DeiT, whose runs are far longer"),
        "recipe.group_size": Choice(group, "at least two groups per batch, so that a batch has several mixings"),
        "recipe.block": Choice(min(epochs, 30), "views that share one decode: all of them, 30 at most"),
    }  # fmt: skip


def _learning(section: str, facts: Facts, epochs: int, batch: int, rate: float, why: str) -> Choices:
    """Keys that every training needs; `rate` is the learning rate in use."""
    precision = "bfloat16" if facts.bfloat16 else "float32"
    where = "a GPU that computes in bfloat16" if facts.bfloat16 else "no faster format on this machine"
    return {
        f"{section}.epochs": Choice(epochs, why),
        f"{section}.warmup_epochs": Choice(min(5, max(1, epochs // 10)), "a tenth of the epochs, 5 at most"),
        f"{section}.batch_size": Choice(batch, f"{-(-facts.images // batch):,} steps per epoch"),
        f"{section}.lr": Choice(round(rate * 512 / batch, 6), f"{rate:g} at this batch size: lr is for a batch of 512"),
        f"{section}.ema_decay": Choice(None, "its average would span more steps than this training has"),
        f"{section}.precision": Choice(precision, where),
        f"{section}.eval_epochs": Choice(max(1, epochs // 5), "five validations"),
        **_workers(section, facts),
    }


def _workers(section: str, facts: Facts) -> Choices:
    if facts.gpu or facts.megapixels > MEGAPIXELS:
        return {}
    return {f"{section}.workers": Choice(0, "small images are rendered quickly: all cores are for the model")}


def _teacher(facts: Facts, size: int, batch: int) -> Choices:
    if facts.pretrained:
        return _pretrained_teacher(facts, batch)
    stride = 8 if size <= 32 else 16 if size <= 64 or facts.gpu else 32
    model = "regnety_008" if facts.gpu else "regnety_002"
    return {
        "teacher.model": Choice(model, "a small convolutional network, which learns more from few images than a DeiT"),
        "teacher.kwargs": Choice({"output_stride": stride}, f"its last feature map is {size // stride} x {size // stride}"),
        **_learning("teacher", facts, teacher_epochs(facts), batch, 1e-3, _why(facts)),
        "teacher.drop_path": Choice(0.0, "a small model"),
        **_gate(facts, 0.2),
    }


def _pretrained_teacher(facts: Facts, batch: int) -> Choices:
    tag, epochs = released_teacher(facts.gpu), teacher_epochs(facts)
    cost = "DeiT's own teacher" if facts.gpu else "small enough to be fine-tuned on a CPU"
    return {
        "teacher.model": Choice(tag.partition(".")[0], f"a convolutional network, {cost}"),
        "teacher.weights": Choice(tag, "pretrained on ImageNet; its classifier is replaced by one for your classes"),
        **_learning("teacher", facts, epochs, batch, 3e-4, "fine-tuning needs few epochs"),
        "teacher.head_epochs": Choice(1, "the new classifier alone first, so that it does not spoil what is pretrained"),
        "teacher.drop_path": Choice(0.0, "a short training"),
        **_gate(facts, 0.4),
    }


def _why(facts: Facts) -> str:
    return "from scratch" if facts.gpu else "from scratch, kept short for a CPU: more epochs usually help"


def _gate(facts: Facts, share: float) -> Choices:
    gate = round(facts.majority + share * (1 - facts.majority), 2)
    reason = f"always naming the largest class gives {facts.majority:.2f}; a teacher below this has hardly learnt anything"
    return {"teacher.min_top1": Choice(gate, reason)}


def _store(facts: Facts, epochs: int) -> Choices:
    size = 2.0 * facts.images * epochs * facts.classes
    dense = size <= DENSE_BYTES
    what = f"all logits take {size / 1e6:,.0f} MB"
    kind = Choice("dense", f"{what}, and allow soft distillation too") if dense else Choice(
        "argmax", f"{what}, the argmax {2e-6 * facts.images * epochs:,.0f} MB: all that hard distillation needs"
    )  # fmt: skip
    return {
        "teacher_logits.views": Choice(epochs, "one view per epoch of the student"),
        "teacher_logits.kind": kind,
        "teacher_logits.precision": Choice("bfloat16" if facts.bfloat16 else "float32", "as in training"),
        "teacher_logits.batch_groups": Choice(4, "groups per forward pass of the teacher"),
        **_workers("teacher_logits", facts),
    }


def _student(facts: Facts, size: int, batch: int, epochs: int) -> Choices:
    patch = patch_size(facts, size)
    shape: dict[str, Any] = {"patch_size": patch}
    reason = f"{size // patch} x {size // patch} patches"
    if not facts.gpu:
        shape |= {"embed_dim": 128, "depth": 6, "num_heads": 2}
        reason += ", half of DeiT-Ti's layers and two thirds of its width, for a CPU"
    names = ["none", "token"]
    variants = {
        "none": {"model": "deit_tiny_patch16_224", "distillation": "none"},
        "token": {"distillation": "hard"},
        "hard": {"model": "deit_tiny_patch16_224", "distillation": "hard"},
    }
    return {
        "student.model": Choice("deit_tiny_distilled_patch16_224", "the smallest DeiT with a distillation token"),
        "student.kwargs": Choice(shape, reason),
        **_learning("student", facts, epochs, batch, 1e-3, _why(facts)),
        "student.drop_path": Choice(0.0, "a small model"),
        "students": Choice(names, "the same student without and with distillation, to compare"),
        "variants": Choice(variants, "add names to `students` to train more of these"),
    }


def _evaluation(facts: Facts, epochs: int) -> Choices:
    return {
        "finetune.from": Choice([], "no fine-tuning at a higher resolution"),
        "finetune.views": Choice(min(epochs, 30), "not used; it must be a multiple of recipe.block"),
        "evaluate.throughput_seconds": Choice(2.0, "enough for a rough figure"),
        **_workers("evaluate", facts),
    }
