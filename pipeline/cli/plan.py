"""The numbers that `pipeline init` chooses and that depend on one another: image size, batches, groups, epochs, views."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.common.errors import UsageError

Given = Mapping[str, Any]
"""Overrides of the command line by section.key, as YAML values that nothing has validated yet."""

SCRATCH_STEPS, FINE_TUNING_STEPS = 400, 250
"""Steps that a training has at least, from scratch and from pretrained weights."""
FEW_PER_CLASS = 50
"""Images per class below which training from scratch learns hardly anything."""
LARGEST_PATCH = 16
"""Largest patch size in pixels; also that of the pretrained students."""
DECODE = 3
"""Cost of a decode relative to a rendering, for photographs."""
SEEN = {
    "teacher": {"cpu": (26_000, 10, 60), "gpu": (1_500_000, 40, 120)},
    "student": {"cpu": (26_000, 15, 90), "gpu": (3_000_000, 60, 300)},
}
"""Images to see in all when training from scratch, fewest and most epochs."""
SEEN_PRETRAINED = {
    "teacher": {"cpu": (15_000, 4, 20), "gpu": (300_000, 10, 30)},
    "student": {"cpu": (24_000, 6, 30), "gpu": (300_000, 12, 30)},
}
"""The same with pretrained weights."""


@dataclass(frozen=True)
class InitFacts:
    """What the choices depend on."""

    images: int
    """Training images."""
    classes: int
    short_side: int
    """Median of the shorter side, in pixels."""
    majority: float
    """Share of the validation images that are of the largest class: the accuracy of a constant guess."""
    megapixels: float = 0.2
    """Mean size of the images."""
    gpu: bool = False
    precision: str = "float32"
    """The fastest one on the device."""
    pretrained: bool = False
    """Whether the teacher's pretrained weights are available."""
    pretrained_student: bool = False
    """Whether the student's are."""

    @property
    def few(self) -> bool:
        """Whether there are few images per class."""
        return self.images < FEW_PER_CLASS * self.classes


@dataclass(frozen=True)
class InitPlan:
    """Numbers that fit one another. `batches`, `epochs` and `pretrained` have the keys teacher and student."""

    pretrained: dict[str, bool]
    size: int
    patch: int
    """The student's patch size in pixels."""
    batches: dict[str, int]
    group: int
    epochs: dict[str, int]
    views: int
    block: int


def make_plan(facts: InitFacts, given: Given) -> InitPlan:
    """Choose the numbers that are not given so that they fit those that are.

    Raises:
        UsageError: the image size is not a multiple of any suitable patch size.
    """
    pretrained = {
        "teacher": _pretrained(facts.pretrained, given, "teacher"),
        "student": _pretrained(facts.pretrained_student, given, "student"),
    }
    size = _number(given, "recipe.size") or image_size(facts, pretrained["student"])
    batches = batch_sizes(facts, given)
    epochs = {
        name: _number(given, f"{name}.epochs") or _epochs(facts, name, pretrained[name], batch)
        for name, batch in batches.items()
    }
    views, block = views_and_block(epochs["student"], given)
    if not {"student.epochs", "teacher_logits.views"} & given.keys():
        epochs["student"] = views
    group = _number(given, "recipe.group_size") or group_size(min(batches.values()), max(batches.values()))
    patch = patch_size(facts, given, size, pretrained["student"])
    return InitPlan(pretrained, size, patch, batches, group, epochs, views, block)


def _number(given: Given, key: str) -> int | None:
    """A positive integer of the command line; None if there is none, or a value that the configuration will refuse."""
    value = given.get(key)
    return value if isinstance(value, int) and value > 0 and value is not True else None


def _pretrained(available: bool, given: Given, section: str) -> bool:
    return given[f"{section}.weights"] is not None if f"{section}.weights" in given else available


def image_size(facts: InitFacts, pretrained: bool) -> int:
    """Pixels: the largest of a few sizes that the images fill; larger ones with weights that were trained at 224."""
    sizes = (32, 64, 96, 128) if facts.gpu else (32, 64, 96)
    if pretrained:
        sizes = (64, 96, 128, 160, 192, 224) if facts.gpu else (64, 96, 128)
    return max([size for size in sizes if size <= facts.short_side], default=sizes[0])


def patch_size(facts: InitFacts, given: Given, size: int, pretrained: bool) -> int:
    """Pixels: the divisor of the image size that is closest to the wanted size, and at least half of it.

    Wanted are 16 x 16 patches on a GPU; on a CPU patches of 8 pixels, or of 16 for images of 96 pixels and more. None is
    larger than 16 pixels.

    Raises:
        UsageError: there is none, or the image size is not a multiple of the patch size that is given or pretrained.
    """
    kwargs = given.get("student.kwargs")
    own = _number(kwargs, "patch_size") if isinstance(kwargs, dict) else None
    wanted = round(size / 16) if facts.gpu else min(8, round(size / 4)) if size < 96 else LARGEST_PATCH
    wanted = min(max(wanted, 1), LARGEST_PATCH)
    fixed = own or (LARGEST_PATCH if pretrained else None)
    allowed = [fixed] if fixed else range(-(-wanted // 2), LARGEST_PATCH + 1)
    fitting = [patch for patch in allowed if size % patch == 0]
    if fitting:
        return min(fitting, key=lambda patch: abs(patch - wanted))
    patch = fixed or wanted
    if "student.model" in given:
        return patch  # a model of the user's, whose sizes are not known here
    below = size // patch * patch
    raise UsageError(
        f"recipe.size {size}",
        expected=f"a multiple of the student's patch size, {patch}",
        found=f"{size / patch:.3g} patches",
        do=f"choose recipe.size={below + patch}" + f" or {below}" * bool(below),
    )


def batch_sizes(facts: InitFacts, given: Given) -> dict[str, int]:
    """Batch sizes of teacher and student: small ones for few images, so that an epoch has several steps."""
    few = 16 if facts.images < 200 else 32 if facts.images < 500 else None
    batch = few or (64 if not facts.gpu else 256 if facts.images >= 5_000 else 128)
    if group := _number(given, "recipe.group_size"):
        batch = max(batch // group, 1) * group
    teacher, student = (_number(given, f"{name}.batch_size") for name in ("teacher", "student"))
    return {"teacher": teacher or student or batch, "student": student or teacher or batch}


def group_size(*batches: int) -> int:
    """An even divisor of all batch sizes, the largest one up to 64 that gives two groups per batch, if there is one.

    Returns 2 for odd batch sizes, which no group size divides and the configuration refuses.
    """
    fitting = [group for group in range(2, 65, 2) if all(batch % group == 0 for batch in batches)]
    return max([group for group in fitting if 2 * group <= min(batches)] or fitting or [2])


def _epochs(facts: InitFacts, section: str, pretrained: bool, batch: int) -> int:
    """Epochs needed to see about the configured number of images and to take enough steps."""
    images, least, most = (SEEN_PRETRAINED if pretrained else SEEN)[section]["gpu" if facts.gpu else "cpu"]
    steps = FINE_TUNING_STEPS if pretrained else SCRATCH_STEPS
    return max(min(max(round(images / facts.images), least), most), -(-steps // steps_per_epoch(facts.images, batch)))


def steps_per_epoch(images: int, batch: int) -> int:
    """About as many as the training makes, which rounds groups per batch and has a few unused slots."""
    return max(1, round(images / batch))


def views_and_block(epochs: int, given: Given) -> tuple[int, int]:
    """At least one view per epoch, in blocks: a multiple of the repeats, and cheap to decode and to render.

    Raises:
        UsageError: the number of views that is given is not a multiple of any block.
    """
    repeats = _number(given, "recipe.repeats") or 3
    block, views = _number(given, "recipe.block"), _number(given, "teacher_logits.views")
    blocks = [block] if block else range(repeats, max(30, repeats) + 1, repeats)
    if views:
        if views % blocks[0]:
            below = views // blocks[0] * blocks[0]
            raise UsageError(
                f"teacher_logits.views {views}",
                expected=f"a multiple of {'recipe.block' if block else 'recipe.repeats'}, {blocks[0]}",
                found=f"{views / blocks[0]:.3g} times as many",
                do=f"choose {below + blocks[0]}" + f" or {below}" * bool(below) + ", or give student.epochs alone",
            )
        return views, max(block for block in blocks if views % block == 0)
    costs = {(-(-epochs // block) * block, block): -(-epochs // block) * (block + DECODE) for block in blocks}
    return min(costs, key=lambda pair: costs[pair])
