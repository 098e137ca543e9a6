"""The typed configuration: every key, with its meaning.

The defaults are the paper's (Touvron et al. 2020, arXiv 2012.12877, Table 9). Unknown keys, wrong types
and impossible combinations are refused with the key's full name; see pipeline.config.validation and pipeline.config.params.
"""

import json
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.common.errors import UsageError
from pipeline.config.policies import parse_policy
from pipeline.config.validation import Section, short_repr, validate

# 0 switches mixing off; tiny parameters would make the rejection that draws from Beta endless
Alpha = Annotated[float, Field(ge=0, le=4), AfterValidator(lambda value: _alpha(value))]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Long = Annotated[int, Field(ge=1, le=100_000)]
"""Epochs and views, of which a run keeps lists."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Workers = Annotated[int, Field(ge=0, le=1024)] | None
"""Loader workers of a process; null: what suits the machine, see pipeline.common.cores."""
NonNegative = Annotated[float, Field(ge=0)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"
"""Of an experiment and of a student: a folder's name, and no option of a command."""


def _alpha(value: float) -> float:
    if 0 < value < 0.05:
        raise ValueError(f"0 or at least 0.05, not {value}")
    return value


FORBIDDEN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def _json(value: dict[str, Any]) -> dict[str, Any]:
    """What a fingerprint can name: no dates, sets, bytes, NaN, and no keys but strings."""
    if FORBIDDEN & value.keys():
        raise InvalidValue(f"no {', '.join(sorted(FORBIDDEN))}: weights are named by the key `weights`", value)
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise InvalidValue("names of arguments with plain values: numbers, words, booleans, null, lists", value)
    return value


def _work(value: str) -> str:
    """A folder, or a URL whose scheme fsspec knows, that means to everyone what it says."""
    value = _home(value)
    if "::" in value or "%" in value:
        raise InvalidValue("a folder or a URL without :: and %, which parts of URLs are read as", value)
    scheme, url, _ = value.partition("://")
    if url:
        from fsspec import available_protocols  # half of what `pipeline --help` takes, and needed for URLs alone

        if scheme not in available_protocols():
            raise InvalidValue("a folder, or a URL of a scheme that fsspec knows, such as s3:// or gs://", value)
    return value


def _model(value: str) -> str:
    if ":" in value or "/" in value:  # hf-hub:NAME would be fetched, again and again
        raise InvalidValue("the name of one of timm's own models", value)
    return value


def _home(value: str) -> str:
    if not value or not value.isprintable():
        raise InvalidValue("a path of printable characters", value)
    return os.path.expanduser(value)


class InvalidValue(ValueError):
    """A value that is not what was expected."""

    def __init__(self, expected: str, value: Any):
        super().__init__(expected)
        self.found = short_repr(value)


Arguments = Annotated[dict[str, Any], AfterValidator(_json)]
"""Of timm.create_model."""
File = Annotated[str, AfterValidator(_home)]
Model = Annotated[str, AfterValidator(_model)]


class Data(Section):
    """Where images come from and how they are cut into shards."""

    source: Literal["digits", "folder", "shards"] = "folder"
    """`digits` (bundled with scikit-learn), `folder` (class folders), `shards` (WebDataset tars of anyone's)."""
    train: str = ""
    """folder: the root of the training class folders. shards: a path or URL, {0000..1023} and * are expanded. ~ is
    your home."""
    val: str = ""
    """The same for validation."""
    seed: int = 0
    """Orders the samples before they are cut into shards."""
    shard_samples: Positive = 1280
    """Samples a shard at most; they are spread evenly, so shards differ by one. A multiple of recipe.group_size, or
    a little less, wastes nothing; `pipeline prepare --dry-run` tells."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """How many undecodable images are tolerated (each is named in index.json) before indexing stops."""
    max_pixels: Annotated[int, Field(ge=1, le=2**30)] = 50_000_000
    """An image of more is refused before it is decoded, which takes 10 (JPEG, PNG) to 22 bytes (WebP) a pixel."""
    exif_orientation: bool = True
    """Turn images upright that a camera marked as lying (folder only); they are stored as PNG. Off where published
    numbers are to be met: torchvision and timm ignore the mark."""
    max_per_class: Positive | None = None
    """Take only the first N images of each class (folder only), for trials."""
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that write and index shards; null: as many as there are cores."""


class Recipe(Section):
    """Everything that decides views, groups and mixing. Its fingerprint names the views."""

    seed: Seed = 0
    size: Annotated[int, Field(ge=8, le=4096)] = 224
    """Pixels a side of a view."""
    scale: Range = (0.08, 1.0)
    """Area of the random resized crop, as a fraction of the image."""
    ratio: Range = (3 / 4, 4 / 3)
    """Aspect of the crop, drawn log-uniformly."""
    hflip: Fraction = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's string: rand-... for RandAugment's increasing set; original, v0 for AutoAugment; or null."""
    color_jitter: Fraction = 0.3
    """Brightness, contrast and saturation, factors 1 - x to 1 + x; inert beside auto_augment, as in timm."""
    erase_prob: Fraction = 0.25
    """Random erasing with pixel noise, area 2 % to 33 %."""
    mean: Triple = IMAGENET_MEAN
    """The recipe's own: fill colour and erasing noise; never a model's."""
    std: Triple = IMAGENET_STD
    mixup_alpha: Alpha = 0.8
    """Beta parameter of Mixup; 0 switches it off."""
    cutmix_alpha: Alpha = 1.0
    """Beta parameter of CutMix; 0 switches it off."""
    mix_prob: Fraction = 1.0
    """Probability that a group is mixed at all."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix where both are on."""
    group_size: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] = 64
    """Slots of a group: samples that are mixed with one another (DeiT: one GPU's batch)."""
    repeats: Positive = 3
    """Repeated augmentation: views of an image in one visit (DeiT: 3; 1 switches it off)."""
    block: Positive = 30
    """Consecutive views that share groups and a decoding: what the teacher computes at once."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"two numbers, 0 < low <= high, not {value}")
        return value

    @field_validator("auto_augment")
    @classmethod
    def _parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse_policy(value)
        return value

    @model_validator(mode="after")
    def _block_holds_repeats(self):
        if self.block % self.repeats:
            raise ValueError(f"block must be a multiple of repeats: block {self.block}, repeats {self.repeats}")
        return self


class Training(Section):
    """What the one training loop needs; shared by teacher, student and fine-tuning."""

    epochs: Long = 300
    batch_size: Positive = 1024
    """Global: over all ranks and accumulation steps, counting repeated copies (DeiT issue 95)."""
    lr: NonNegative = 5e-4
    """At a batch of 512; the rate used is lr * batch_size / 512."""
    min_lr: NonNegative | None = 1e-5
    """Not scaled, as in DeiT; null keeps the rate constant after warm-up."""
    warmup_lr: NonNegative = 1e-6
    warmup_epochs: Annotated[int, Field(ge=0, le=100_000)] = 5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Fraction = 0.9
    """SGD only."""
    weight_decay: NonNegative = 0.05
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing of true labels; never of the teacher's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; null as in DeiT."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.99996
    """Tracked and evaluated beside the raw weights; results are of the raw weights, as in DeiT."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """float32 is IEEE's, never TF32; bfloat16: autocast of the forward."""
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    """On a GPU, only kernels that give the same bits each time: slower, and torch has not all of them."""
    accumulation: Positive = 1
    """Slices that a rank's share of the batch is computed in. Changes rounding only, but for batch norm: its statistics
    are a slice's."""
    workers: Workers = None
    """Rendering processes a rank; null follows the machine."""
    open_shards: Positive = 16
    """Shards that the order keeps open at a time."""
    seed: Seed = 0
    """Initial weights, drop-path and the order of training."""
    eval_epochs: Positive = 10
    """Validate every so many epochs, and after the last."""
    checkpoint_minutes: NonNegative = 10.0
    """A checkpoint every so many minutes; the last two are kept."""
    checkpoint_steps: Positive | None = None
    """And every so many steps."""
    stop_above: Annotated[float, Field(gt=1)] | None = 10.0
    """A loss of so many times the first step's, or ln(classes) if that is more, stops the run."""
    log_steps: Positive = 50


class Teacher(Training):
    """The teacher: trained here, or read from weights."""

    model: Model = "regnety_160"
    """Any timm classifier. Without weights it is trained on the shards."""
    kwargs: Arguments = {}
    """Passed to timm.create_model."""
    weights: File | None = None
    """A timm tag such as regnety_160.deit_in1k, or a local .safetensors / .pth file."""
    mean: Triple = IMAGENET_MEAN
    """What its input is normalised with."""
    std: Triple = IMAGENET_STD
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Centre crop when it is evaluated."""
    size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels a side, for a model with weights that takes one size alone, as a ViT: pictures are resized to it on the
    device. null: those of the pictures."""
    min_top1: Fraction = 0.5
    """It is refused below this top-1 on val: a wrong teacher must not label a million images."""


class TeacherFinetune(Training):
    """The teacher made used to the pictures of fine-tuning, as FixRes does: its classifier and last batch norm.

    Off unless `epochs` is set. Its views are plain crops of nearly all of the image, unmixed.
    """

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 0
    """0 leaves the teacher as it is; FixRes's example has 56."""
    batch_size: Positive = 512
    lr: NonNegative = 1e-3
    min_lr: NonNegative | None = 0.0
    warmup_epochs: Annotated[int, Field(ge=0, le=100_000)] = 0
    optimizer: Literal["adamw", "sgd"] = "sgd"
    weight_decay: NonNegative = 1e-4
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    area: Annotated[float, Field(gt=0, le=1)] = 0.766
    """Of the image that a square crop holds: 0.875 squared, about what a centre crop shows."""


class TeacherLogits(Section):
    """The store of the teacher's answers."""

    views: Long = 300
    """V: views 0..V-1 of every training image; a multiple of recipe.block."""
    kind: Literal["argmax", "topk", "dense8", "dense"] = "argmax"
    """argmax: 2 bytes, all that hard distillation needs; topk, dense8 (a byte a class), dense (float16): soft too."""
    top_k: Annotated[int, Field(ge=1, le=65_535)] = 10
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """float32 is IEEE's, never TF32; bfloat16: autocast, but for the head, which is float32."""
    batch_groups: Positive = 8
    """Groups a forward of the teacher; 1 makes offline and online equal to the bit on a CPU."""
    workers: Workers = None
    channels_last: bool = False
    compile: bool = False


class Student(Training):
    """A student. `variants` overrides these keys by name."""

    model: Model = "deit_tiny_distilled_patch16_224"
    """A deit_* of timm; with `_distilled` it has the distillation token and head."""
    kwargs: Arguments = {}
    """Passed to timm.create_model: patch_size, embed_dim, depth, num_heads, ..."""
    distillation: Literal["none", "soft", "hard"] = "hard"
    alpha: Fraction = 0.5
    """Weight of the distillation loss (paper's lambda); the paper's soft runs use 0.1."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of soft distillation; the paper's is 3."""
    soft_reduction: Literal["numel", "batchmean"] = "numel"
    """numel divides by batch x classes as DeiT's code does, batchmean by the batch."""


class Finetune(Training):
    """Fine-tuning at a higher resolution; both heads learn from label and teacher."""

    epochs: Long = 30
    batch_size: Positive = 512
    lr: NonNegative = 5e-6
    min_lr: NonNegative | None = None
    """Constant, as in DeiT's command, whose 5e-6 falls out of step with the scaled rate at other batches."""
    weight_decay: NonNegative = 1e-8
    students: list[str] = Field(default=[], alias="from")
    """The students that are fine-tuned, each out of `students`: a name or a list of them. Empty: none is."""
    weights: File | None = None
    """A .safetensors or .pth to start from instead, as for another data set: `from` then names its settings only.
    Heads of another number of classes begin anew."""
    size: Annotated[int, Field(ge=8, le=4096)] = 384
    views: Long = 30
    """V of the second store."""
    teacher_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels the teacher sees; pictures are resized on the device. null: what it was trained at, `recipe.size` or
    teacher.size; or `size`, where teacher_finetune.epochs adapt it."""
    train_mode: bool = True
    """false: dropout and drop-path off while the weights learn, as DeiT's first code did."""

    @field_validator("students", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Evaluate(Section):
    batch_size: Positive = 256
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Centre crop: an image is resized to int(size / crop) on its short side (DeiT 0.875; timm 0.9)."""
    crop_finetuned: Annotated[float, Field(gt=0, le=1)] = 0.875
    sizes: list[Annotated[int, Field(ge=8, le=4096)]] = []
    """Pixels a side at which every model is evaluated besides, positions resized. Not Table 10,
    for which the paper fine-tunes a model at each size."""
    workers: Workers = None
    throughput_seconds: NonNegative = 5.0


PURPOSES = ("train-student", "finetune")
"""What a teacher answers for, each with a store of its own."""


class Config(Section):
    """A whole experiment: what params.yaml holds."""

    name: Annotated[str, Field(pattern=NAME)] = "imagenet-deit-tiny"
    """Outputs lie under outputs/<name>/."""
    work: Annotated[str, AfterValidator(_work)] = "work"
    """Folder of shards, stores and training state, each in a folder named by its fingerprint. At a URL lie the
    stores alone; the rest is in the folder `work` then."""
    data: Data = Data()
    recipe: Recipe = Recipe()
    teacher: Teacher = Teacher()
    teacher_finetune: TeacherFinetune = TeacherFinetune()
    teacher_logits: TeacherLogits = TeacherLogits()
    student: Student = Student()
    students: list[str] = ["hard"]
    """The students of this experiment, each a name out of `variants`."""
    variants: dict[str, dict[str, Any]] = {"hard": {}}
    """What each named student changes of `student`; its kwargs are laid on the student's one by one (null: timm's)."""
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()

    @field_validator("finetune", mode="before")
    @classmethod
    def _without(cls, value: Any) -> Any:
        """null: nothing is fine-tuned."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _consistent(self):
        for problem in conflicting_settings(self):
            raise ValueError(problem)
        return self

    def student_named(self, name: str) -> Student:
        """`student` with the overrides of `variants[name]`.

        Raises:
            UsageError: no such variant, or an override that `student` does not take.
        """
        if name not in self.variants:
            raise UsageError(
                f"student {name!r}",
                expected=f"one of {', '.join(self.variants)}",
                found="no such entry in `variants`",
                do=f"add `variants.{name}: {{}}` to params.yaml or correct the name",
            )
        own, student = self.variants[name], self.student.model_dump()
        if isinstance(own.get("kwargs"), dict):
            own = own | {"kwargs": student["kwargs"] | own["kwargs"]}
        return validate(Student, student | own, section=f"variants.{name}")

    def needs_teacher(self, purpose: str) -> bool:
        """Whether a student of train-student or finetune learns from a teacher, so that there must be one."""
        names = self.students if purpose == "train-student" else self.finetune.students
        return any(self.student_named(name).distillation != "none" for name in names)

    def teacher_size(self, purpose: str) -> int:
        """Pixels a side that the teacher sees where it answers for train-student or finetune."""
        if purpose == "finetune":
            adapted = self.finetune.size if self.teacher_finetune.epochs else None
            return self.finetune.teacher_size or adapted or self.teacher_size("train-student")
        return self.teacher.size or self.recipe.size

    def finetune_student(self, name: str) -> Student:
        """A student as it is fine-tuned, with fine-tuning's own dropout and drop-path."""
        student = self.student_named(name)
        return student.model_copy(update={"drop_path": self.finetune.drop_path, "dropout": self.finetune.dropout})

    def finetune_recipe(self) -> Recipe:
        """The recipe of the views at the higher resolution."""
        return self.recipe.model_copy(update={"size": self.finetune.size})

    def teacher_finetune_recipe(self) -> Recipe:
        """That of the teacher's own fine-tuning at that resolution: about what it will be evaluated on."""
        area = self.teacher_finetune.area
        plain = {"scale": (area, area), "ratio": (1.0, 1.0), "auto_augment": None, "color_jitter": 0.0}
        off = {"erase_prob": 0.0, "mix_prob": 0.0, "repeats": 1}
        return self.finetune_recipe().model_copy(update=plain | off)


def conflicting_settings(config: Config) -> list[str]:
    """What no single section can see is wrong; each names its keys in full."""
    found = []
    block, group = config.recipe.block, config.recipe.group_size
    for key, views in (
        ("teacher_logits.views", config.teacher_logits.views),
        ("finetune.views", config.finetune.views),
    ):
        if views % block:
            found.append(f"{key} must be a multiple of recipe.block: {views} views, block {block}")
    students = {f"variants.{name}": config.student_named(name) for name in config.variants}
    runs = {"teacher": config.teacher, "student": config.student, "finetune": config.finetune} | students
    if config.teacher_finetune.epochs:
        runs["teacher_finetune"] = config.teacher_finetune
    for key, run in runs.items():
        if run.batch_size % group:
            found.append(
                f"{key}.batch_size must be a multiple of recipe.group_size: {run.batch_size}, group_size {group}"
            )
        elif (run.batch_size // group) % run.accumulation:
            found.append(
                f"{key}.accumulation must divide the {run.batch_size // group} groups of a batch: {run.accumulation}"
            )
    for name in config.variants:
        if name in ("truth", "teacher") or name.endswith("finetuned") or not re.fullmatch(NAME, name):
            found.append(
                f"variants.{name}: a name in [A-Za-z0-9._-], that no . or - begins and no `finetuned` ends,"
                " other than truth and teacher"
            )
    if config.data.source == "shards":
        found += [
            f"data.{split}: braces that are closed, as in train-{{0000..1023}}.tar, not {text!r}"
            for split, text in (("train", config.data.train), ("val", config.data.val))
            if not _balanced(text)
        ]
    if len(set(config.students)) != len(config.students):
        found.append(f"students must be different names: {config.students}")
    for name in config.students:
        if config.student_named(name).distillation == "soft" and config.teacher_logits.kind == "argmax":
            found.append(
                f"teacher_logits.kind must be topk, dense8 or dense: student {name} distils softly; found argmax"
            )
    others = {config.finetune.teacher_size, config.teacher.size} - {None, config.finetune.size}
    if config.teacher_finetune.epochs and others:
        found.append(
            f"finetune.teacher_size and teacher.size must be null where the teacher is fine-tuned at finetune.size:"
            f" {others.pop()}, teacher_finetune.epochs {config.teacher_finetune.epochs}"
        )
    if config.teacher.size and not config.teacher.weights:
        found.append(
            f"teacher.size must be null without teacher.weights: it is trained here at recipe.size; found"
            f" {config.teacher.size}"
        )
    if len(set(config.finetune.students)) != len(config.finetune.students):
        found.append(f"finetune.from must be different names: {config.finetune.students}")
    for name in config.finetune.students:
        if config.students and not config.finetune.weights and name not in config.students:
            found.append(f"finetune.from must be of students {config.students}: found {name!r}")
        else:
            config.student_named(name)
    return found


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


# How a run is computed, not what it computes: these change no result and no fingerprint.
EXECUTION_ONLY = {
    "workers", "accumulation", "checkpoint_minutes", "checkpoint_steps", "stop_above", "log_steps", "eval_epochs",
    "compile", "channels_last", "deterministic",
}  # fmt: skip


def result_fields(section: Section) -> dict[str, Any]:
    """A section as JSON values, less the keys that only say how the work is carried out."""
    return section.model_dump(mode="json", by_alias=True, exclude=EXECUTION_ONLY)


def finetune_fields(section: Finetune) -> dict[str, Any]:
    """Those of fine-tuning, less where it starts from: the weights themselves are part of a run's identity."""
    return {key: value for key, value in result_fields(section).items() if key not in ("from", "weights")}
