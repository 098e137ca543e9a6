"""What `pipeline init` chooses for a folder of images, and why: pure functions of a few facts.

The values are starting points that suit data sets of this kind; none was tuned on the user's images.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.cli.plan import Given, InitFacts, InitPlan, make_plan, steps_per_epoch
from pipeline.common.wording import count_of, size_of
from pipeline.config.schema import Config
from pipeline.shards.advice import padding

SHARD = 1280
"""Most samples per shard, the default of data.shard_samples."""
MEGAPIXELS = 0.5
"""Mean size from which images are read in separate processes on a CPU too."""
PRECISIONS = {
    "bfloat16": "a GPU that computes in bfloat16",
    "float16": "a GPU that computes in float16 but not in bfloat16",
    "float32": "no faster format on this machine",
}
"""Why each precision is chosen."""
DENSE_BYTES = 2e9
"""Largest store of all logits; a larger one holds the argmax only."""


@dataclass(frozen=True)
class Choice:
    """A value of the configuration and the reason for it."""

    value: Any
    reason: str


Choices = dict[str, Choice]
"""By key, section.key."""


def choose(facts: InitFacts, given: Given = MappingProxyType({})) -> Choices:
    """Every choice, in the order of the file.

    Args:
        given: what the command line gives; the choices suit it, but do not repeat it.

    Raises:
        UsageError: an image size that no patch size divides.
    """
    plan = make_plan(facts, given)
    return {
        **_data(facts, plan.group),
        **_recipe(facts, plan),
        **_teacher(facts, plan),
        **_store(facts, plan),
        **_student(facts, plan),
        **_evaluation(facts, plan),
    }


def released_teacher(gpu: bool) -> str:
    """The timm tag of the pretrained teacher: DeiT's own, or a network of a twentieth of its cost."""
    return "regnety_160.deit_in1k" if gpu else "regnety_008_tv.tv2_in1k"


def released_student(gpu: bool) -> str:
    """The timm tag of the weights that students start from, with and without a distillation token."""
    return f"deit_{_student_size(gpu)}_patch16_224.fb_in1k"


def _student_size(gpu: bool) -> str:
    return "small" if gpu else "tiny"


def _data(facts: InitFacts, group: int) -> Choices:
    least = -(-facts.images // SHARD)
    shards = min(range(least, 2 * least + 1), key=lambda count: padding(facts.images, count, group))
    samples = -(-facts.images // shards)
    unused = padding(facts.images, shards, group)
    return {
        "data.shard_samples": Choice(samples, f"{count_of(shards, 'shard')}; {unused:.1%} of the slots of their groups stay unused"),
        "data.max_bad": Choice(
            max(1, facts.images // 100), "a few broken files are left out and listed in index.json instead of causing an error"
        ),
    }


def _recipe(facts: InitFacts, plan: InitPlan) -> Choices:
    fills = f"half of the images have a shorter side of at least {facts.short_side} px"
    scratch = "training from scratch on few images gains little from more pixels"
    pretrained = "the student's weights are for 224 px, and its position embeddings are resized"
    groups = min(plan.batches.values()) // plan.group
    several = "at least two groups per batch, so that a batch has several mixings"
    return {
        "recipe.size": Choice(plan.size, f"{fills}; {pretrained if plan.pretrained['student'] else scratch}"),
        "recipe.scale": Choice([0.25, 1.0], f"milder crops than DeiT's 0.08: {_why_milder(plan.size)}"),
        **(_moderate_augmentation() if facts.gpu else _light_augmentation()),
        "recipe.group_size": Choice(plan.group, several if groups > 1 else "a divisor of the batch sizes"),
        "recipe.block": Choice(plan.block, "views that share one decode"),
    }


def _why_milder(size: int) -> str:
    return "at this size a small crop shows too little" if size < 192 else "a run this short gains nothing from small crops"


def _moderate_augmentation() -> Choices:
    return {"recipe.mix_prob": Choice(0.5, "half as much Mixup and CutMix as in DeiT, whose runs are far longer")}


def _light_augmentation() -> Choices:
    return {
        "recipe.auto_augment": Choice(None, "crops, flips and color_jitter alone: a run this short gains nothing from RandAugment"),
        "recipe.erase_prob": Choice(0.0, "nor from random erasing"),
        "recipe.mix_prob": Choice(0.2, "a fifth of DeiT's Mixup and CutMix, whose runs are far longer"),
    }


def _learning(section: str, facts: InitFacts, plan: InitPlan, rate: float, why: str) -> Choices:
    """Keys that every training needs; `rate` is the learning rate in use."""
    epochs, batch = plan.epochs[section], plan.batches[section]
    steps = steps_per_epoch(facts.images, batch)
    return {
        f"{section}.epochs": Choice(epochs, f"about {epochs * steps:,} steps in all; {why}"),
        f"{section}.warmup_epochs": Choice(
            min(5, max(int(epochs >= 5), epochs // 10)), "about a tenth of the epochs, 5 at most; none below 5 epochs"
        ),
        f"{section}.warmup_lr": Choice(
            round(rate / 10, 6), "DeiT's schedule spends an epoch or more at this rate first, which would be too long at DeiT's 1e-6"
        ),
        f"{section}.batch_size": Choice(batch, f"about {steps:,} steps per epoch"),
        f"{section}.lr": Choice(round(rate * 512 / batch, 6), f"{rate:g} at this batch size: lr is for a batch of 512"),
        f"{section}.ema_decay": Choice(None, "no average of the weights: DeiT's spans some 25,000 steps"),
        f"{section}.precision": Choice(facts.precision, PRECISIONS[facts.precision]),
        f"{section}.eval_epochs": Choice(max(1, epochs // 5), "about five validations"),
        **_workers(section, facts),
    }


def _workers(section: str, facts: InitFacts) -> Choices:
    if facts.gpu or facts.megapixels > MEGAPIXELS:
        return {}
    return {f"{section}.workers": Choice(0, "small images are rendered quickly: all cores are left to the model")}


def _teacher(facts: InitFacts, plan: InitPlan) -> Choices:
    if plan.pretrained["teacher"]:
        return _pretrained_teacher(facts, plan)
    size = plan.size
    stride = 8 if size <= 32 else 16 if size <= 64 or facts.gpu else 32
    last = -(-size // stride)
    model = "regnety_008" if facts.gpu else "regnety_002"
    return {
        "teacher.model": Choice(model, "a small convolutional network, which learns more from few images than a DeiT"),
        "teacher.kwargs": Choice({"output_stride": stride}, f"its last feature map is {last} x {last}"),
        **_learning("teacher", facts, plan, 1e-3, _why(facts)),
        "teacher.drop_path": Choice(0.0, "a small model"),
        "teacher.min_top1": _few_images_gate(facts) if facts.few else _gate(facts, 0.2 if facts.gpu else 0.1),
    }


def _pretrained_teacher(facts: InitFacts, plan: InitPlan) -> Choices:
    tag = released_teacher(facts.gpu)
    cost = "DeiT's own teacher" if facts.gpu else "small enough to be fine-tuned on a CPU"
    return {
        "teacher.model": Choice(tag.partition(".")[0], f"a convolutional network, {cost}"),
        "teacher.weights": Choice(tag, "pretrained on ImageNet; its classifier is replaced by one for your classes"),
        **_learning("teacher", facts, plan, 3e-4, "fine-tuning needs few epochs"),
        "teacher.head_epochs": Choice(1, "the new classifier alone first, so that it does not disturb the pretrained layers"),
        "teacher.drop_path": Choice(0.0, "a short training"),
        "teacher.min_top1": _gate(facts, 0.4),
    }


def _why(facts: InitFacts) -> str:
    return "from scratch" if facts.gpu else "from scratch, kept short for a CPU: more epochs usually help"


def _gate(facts: InitFacts, share: float) -> Choice:
    """A share of the way from a constant guess to 1."""
    gate = round(facts.majority + share * (1 - facts.majority), 2)
    guess = f"always predicting the most frequent class gives {facts.majority:.2f}"
    return Choice(gate, f"{guess}; a teacher below this has hardly learnt anything")


def _few_images_gate(facts: InitFacts) -> Choice:
    """Twice the accuracy of a constant guess, but at most a tenth of the way from it to 1."""
    gate = round(min(2 * facts.majority, facts.majority + 0.1 * (1 - facts.majority)), 2)
    return Choice(
        gate,
        f"only a little above {facts.majority:.2f}, which always predicting the most frequent class gives: with"
        f" {facts.images / facts.classes:.0f} images per class a teacher from scratch cannot be expected to reach more",
    )


def _store(facts: InitFacts, plan: InitPlan) -> Choices:
    views = plan.views
    size = 2.0 * facts.images * views * facts.classes
    dense = size <= DENSE_BYTES
    what = f"all logits take {size_of(size)}"
    kind = Choice("dense", f"{what}, and allow soft distillation too") if dense else Choice(
        "argmax", f"{what}, the argmax {size_of(2.0 * facts.images * views)}: all that hard distillation needs"
    )  # fmt: skip
    one = "one view per epoch of the student"
    return {
        "teacher_logits.views": Choice(
            views, one if views == plan.epochs["student"] else f"about {one}, and a multiple of recipe.block"
        ),
        "teacher_logits.kind": kind,
        "teacher_logits.precision": Choice(facts.precision, "as in training"),
        "teacher_logits.batch_groups": Choice(4, "groups per forward pass of the teacher"),
        **_workers("teacher_logits", facts),
    }


def _student(facts: InitFacts, plan: InitPlan) -> Choices:
    model = f"deit_{_student_size(facts.gpu and plan.pretrained['student'])}_distilled_patch16_224"
    plain = model.replace("_distilled", "")
    variants = {
        "none": {"model": plain, "distillation": "none"},
        "token": {"distillation": "hard"},
        "hard": {"model": plain, "distillation": "hard"},
    }
    few = "fine-tuning needs few epochs"
    learning = (
        _learning("student", facts, plan, 1e-4, few)
        if plan.pretrained["student"]
        else _learning("student", facts, plan, 1e-3, _why(facts))
    )
    return {
        "student.model": Choice(model, "a small DeiT with a distillation token"),
        **(_student_weights(facts) if plan.pretrained["student"] else _student_shape(facts, plan)),
        **learning,
        "student.drop_path": Choice(0.0, "a small model"),
        "students": Choice(["none", "token"], "the same student without and with distillation, to compare"),
        "variants": Choice(variants, "add names to `students` to train more of these"),
    }


def _student_weights(facts: InitFacts) -> Choices:
    reason = (
        "pretrained on ImageNet without distillation; with and without a distillation token, students start from the same"
        " weights, so that distillation alone differs"
    )
    return {"student.weights": Choice(released_student(facts.gpu), reason)}


def _student_shape(facts: InitFacts, plan: InitPlan) -> Choices:
    shape: dict[str, Any] = {"patch_size": plan.patch}
    reason = f"{plan.size // plan.patch} x {plan.size // plan.patch} patches of {plan.patch} pixels a side"
    if not facts.gpu:
        shape |= {"embed_dim": 128, "depth": 6, "num_heads": 2}
        reason += ", half of DeiT-Ti's layers and two thirds of its width, for a CPU"
    return {"student.kwargs": Choice(shape, reason)}


def _evaluation(facts: InitFacts, plan: InitPlan) -> Choices:
    default = Config().finetune.batch_size
    batch = {} if default % plan.group == 0 else {
        "finetune.batch_size": Choice(plan.batches["student"], "not used; it must be a multiple of recipe.group_size")
    }  # fmt: skip
    return {
        "finetune.from": Choice([], "no fine-tuning at a higher resolution"),
        "finetune.views": Choice(plan.block, "not used; it must be a multiple of recipe.block"),
        **batch,
        "evaluate.throughput_seconds": Choice(2.0, "enough for a rough figure"),
        **_workers("evaluate", facts),
    }
