"""Sections of the configuration that train a model: teacher, student and their fine-tuning."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.types import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WEIGHTS_SUFFIXES,
    Arguments,
    ClassMap,
    Count,
    CountOrZero,
    File,
    Fraction,
    FractionBelowOne,
    Model,
    NonNegative,
    Pixels,
    Positive,
    PositiveFraction,
    Seed,
    Triple,
    Workers,
    check_custom_model,
)
from pipeline.config.validation import Section


def _timm_tag(weights: str | None) -> str | None:
    return weights if weights and not weights.endswith(WEIGHTS_SUFFIXES) else None


class Training(Section):
    """Settings of the training loop, shared by teacher, student and fine-tuning."""

    epochs: Count = 300
    """Passes over the data; an image contributes one view per epoch on average."""
    batch_size: Positive = 1024
    """Global batch size: over all ranks and accumulation steps, counting repeated copies (DeiT issue 95)."""
    lr: NonNegative = 5e-4
    """Learning rate for a batch of 512; the rate in use is lr * batch_size / 512."""
    min_lr: NonNegative | None = 1e-5
    """Final rate of the cosine schedule, not scaled by the batch size, as in DeiT; null: constant after warm-up."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    warmup_epochs: CountOrZero = 5
    """Epochs in which the learning rate rises linearly."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd uses Nesterov momentum, as in timm."""
    momentum: Fraction = 0.9
    """SGD only."""
    weight_decay: NonNegative = 0.05
    """Not applied to biases, norms, position embeddings and the class token."""
    smoothing: FractionBelowOne = 0.1
    """Label smoothing of the true labels, never of the teacher's predictions."""
    dropout: FractionBelowOne = 0.0
    """Dropout rate: after position embeddings, attention and MLP in ViT students, before the classifier in others."""
    drop_path: FractionBelowOne = 0.1
    """Stochastic depth: the rate of the last layer, from which it falls linearly to 0 in the first."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; null: no clipping, as in DeiT."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.99996
    """Decay of the EMA weights, which are evaluated too; results use the raw weights, as in DeiT. null: no EMA."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """float32 is IEEE 754, never TF32; bfloat16 and float16 are autocast of the forward pass. float16 is for GPUs without
    bfloat16 (V100, T4, RTX 20): the loss is scaled, and a step whose gradient overflows is skipped."""
    compile: bool = False
    """Use torch.compile."""
    checkpoint_activations: bool = False
    """Keep only some activations for the backward pass and recompute the others: less memory, more time, the same
    result. Not with `compile`, nor for models with batch norm."""
    channels_last: bool = False
    """Use the channels_last memory format."""
    deterministic: bool = False
    """Use only deterministic kernels on a GPU: slower, and torch does not have one for every operation."""
    accumulation: Positive = 1
    """Gradient accumulation steps per rank. Changes rounding, what drop-path and dropout draw and, with batch norm, the
    statistics, which are those of one step's slice."""
    workers: Workers = None
    """Rendering processes per rank; null: chosen for the machine."""
    open_shards: Positive = 16
    """Number of shards whose groups the training order interleaves."""
    seed: Seed = 0
    """Determines initial weights, drop-path and the order of training."""
    eval_epochs: Positive = 10
    """Validate every N epochs, and after the last."""
    checkpoint_minutes: NonNegative = 10.0
    """Save a checkpoint every N minutes; the last two are kept."""
    checkpoint_steps: Positive | None = None
    """Also save one every N steps."""
    stop_above: Annotated[float, Field(gt=1)] | None = 10.0
    """Stop when the loss exceeds this multiple of the first step's, or of ln(classes) if that is larger."""
    log_steps: Positive = 50
    """Steps between two entries in log.jsonl."""


class TeacherMember(Section):
    """An additional teacher of an ensemble, used as it is."""

    model: Model = "regnety_160"
    """As `teacher.model`; a timm tag in `weights` names its model itself."""
    kwargs: Arguments = {}
    """Passed to timm.create_model."""
    weights: File
    """As `teacher.weights`, with as many classes as the index unless there is a class_map. To fine-tune a member,
    make it the teacher of another experiment, and name the weights.safetensors that this experiment publishes."""
    class_map: ClassMap | None = None
    """As `teacher.class_map`."""
    mean: Triple = IMAGENET_MEAN
    """Mean by which its input is normalized."""
    std: Triple = IMAGENET_STD
    """Standard deviation by which its input is normalized."""
    size: Pixels | None = None
    """Its input size, to which the first teacher's input is resized on the device. null: the same size."""

    @model_validator(mode="after")
    def _custom_model(self):
        check_custom_model(self.model, self.kwargs, _timm_tag(self.weights))
        return self


class Teacher(Training):
    """The teacher: pretrained weights, or a model trained by the pipeline."""

    model: Model = "regnety_160"
    """Any timm classifier, or a function of your own, mypackage.models:build, that is called with num_classes and kwargs.
    Without weights it is trained on the shards."""
    kwargs: Arguments = {}
    """Passed to timm.create_model, or to the function."""
    weights: File | None = None
    """A timm tag such as regnety_160.deit_in1k, which names the model, too; or weights of `model`: a local .safetensors
    or .pth file, or hf-hub:OWNER/NAME. With as many classes as the index they are used as they are; otherwise the
    classifier is replaced, and the teacher is trained for `epochs`. Files that the pipeline published must have the index's
    classes and the mean and std below, timm tags these two; of a repository nothing is checked."""
    head_epochs: CountOrZero = 0
    """How many of the `epochs`, at the start, train only a replaced classifier, with all other layers frozen in eval mode.
    If equal to `epochs`, only the classifier is trained."""
    class_map: ClassMap | None = None
    """For an index with a subset of the classes of `weights`: their numbers in `weights`, as a list in the index's order or
    by class name; or one of timm's label sets, such as imagenet-1k, if the classes are named n01440764 etc. All other classes
    are removed from the classifier, so argmax and softmax are over the index's. null: the same classes, or new ones."""
    mean: Triple = IMAGENET_MEAN
    """Mean by which its input is normalized."""
    std: Triple = IMAGENET_STD
    """Standard deviation by which its input is normalized."""
    crop: PositiveFraction = 0.875
    """Centre crop for its evaluation."""
    size: Pixels | None = None
    """Input size of a pretrained model that accepts no other, such as a ViT: images are resized to it on the device,
    and it is trained at this size, if at all. null: recipe.size."""
    min_top1: Fraction = 0.5
    """A teacher with a lower top-1 accuracy on val is refused: a poor teacher must not label a million images."""
    ensemble: list[TeacherMember] = []
    """Additional teachers. The predicted probabilities are the mean over all teachers (the logits are its logarithm), also
    for `min_top1`. Their order counts as part of the teacher."""

    @model_validator(mode="after")
    def _custom_model(self):
        check_custom_model(self.model, self.kwargs, _timm_tag(self.weights))
        return self

    @property
    def members(self) -> list["Teacher"]:
        """The teachers of the ensemble, this one first, each as a teacher by itself."""
        others = [Teacher(**member.model_dump(), drop_path=0.0) for member in self.ensemble]
        return [self.model_copy(update={"ensemble": []}), *others]

    @property
    def title(self) -> str:
        """The model, or the weights that name it, of every teacher."""
        return " + ".join(member.weights or member.model for member in self.members)

    @property
    def timm_tag(self) -> str | None:
        """`weights` if they are not a local file: a tag of timm or, with hf-hub:, a repository on the Hugging Face Hub."""
        return _timm_tag(self.weights)

    @property
    def architecture(self) -> str:
        """What is built: a tag of timm names its model; for any other weights it is `model`."""
        return self.timm_tag if self.timm_tag and ":" not in self.timm_tag else self.model


class TeacherFinetune(Training):
    """Adaptation of the teacher to the fine-tuning resolution, as in FixRes: its classifier and last batch norm.

    Disabled unless `epochs` is set. It trains on plain crops of nearly the full image, without mixing.
    """

    epochs: CountOrZero = 0
    """0 leaves the teacher unchanged; the example in FixRes's repository uses 56."""
    batch_size: Positive = 512
    lr: NonNegative = 1e-3
    min_lr: NonNegative | None = 0.0
    warmup_epochs: CountOrZero = 0
    optimizer: Literal["adamw", "sgd"] = "sgd"
    weight_decay: NonNegative = 1e-4
    smoothing: FractionBelowOne = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    area: PositiveFraction = 0.766
    """Area of the square crop as a fraction of the image: 0.875 squared, about what a centre crop shows."""


class Student(Training):
    """A student; each entry of `variants` overrides some of these keys."""

    model: Model = "deit_tiny_distilled_patch16_224"
    """Any timm classifier, such as a deit_*, ResNet, ConvNeXt, Swin, TinyViT or MobileNet. The deit_*_distilled ones have
    a distillation token and head; others are distilled through their class head. Or a function of your own,
    mypackage.models:build, that is called with num_classes and kwargs."""
    kwargs: Arguments = {}
    """Passed to timm.create_model, or to the function: patch_size, embed_dim, depth, num_heads, ..."""
    weights: File | None = None
    """Weights to start from: a timm tag such as deit_tiny_patch16_224.fb_in1k, or a local .safetensors / .pth file. Heads
    with a different number of classes are initialized from scratch, and position embeddings are resized. null: no weights."""
    distillation: Literal["none", "soft", "hard"] = "hard"
    """What the student learns from: labels only (none), also the teacher's probabilities (soft) or its argmax (hard)."""
    alpha: Fraction = 0.5
    """Weight of the distillation loss (lambda in the paper, whose soft runs use 0.1)."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of soft distillation (3 in the paper)."""
    soft_reduction: Literal["numel", "batchmean"] = "numel"
    """numel divides by batch x classes as DeiT's code does, batchmean by the batch."""
    reuse_view: CountOrZero | None = None
    """null: each view has its own predictions. N: the predictions for view N of an image are used for all its views, as if
    the teacher had seen each image once. The student then does not see what the teacher saw: use it only to measure what
    that costs. Needs recipe.mix_prob 0."""

    @model_validator(mode="after")
    def _custom_model(self):
        check_custom_model(self.model, self.kwargs, _timm_tag(self.weights))
        return self

    @model_validator(mode="after")
    def _reuses_predictions(self):
        if self.reuse_view is not None and self.distillation == "none":
            raise ValueError(f"reuse_view must be null without distillation: found {self.reuse_view}")
        return self

    @property
    def uses_labels(self) -> bool:
        """Whether its loss depends on the images' labels."""
        return self.distillation == "none" or self.alpha < 1

    @property
    def timm_tag(self) -> str | None:
        """`weights` if they are not a local file; `model` names the model that they are loaded into."""
        return _timm_tag(self.weights)


class Finetune(Training):
    """Fine-tuning of students at a higher resolution, with labels and teacher as in training."""

    epochs: Count = 30
    batch_size: Positive = 512
    lr: NonNegative = 5e-6
    min_lr: NonNegative | None = None
    """null: constant, as DeiT's command is at a batch of 512; its --min-lr 5e-6 does not scale with the batch size."""
    weight_decay: NonNegative = 1e-8
    students: list[str] = Field(default=[], alias="from")
    """The students to fine-tune, one name or a list, each from `students`. Empty: none."""
    weights: File | None = None
    """A .safetensors or .pth file to start from instead, for example for transfer to another data set; `from` then
    only selects the settings. Heads with a different number of classes are initialized from scratch."""
    size: Pixels = 384
    """Height and width of the views in pixels."""
    views: Count = 30
    """V of the second store."""
    fetch: str | None = None
    """Path or URL of the published second store, as teacher_logits.fetch."""
    teacher_size: Pixels | None = None
    """The teacher's input size; images are resized to it on the device. null: teacher.size or recipe.size, at which it
    was trained; with teacher_finetune.epochs, `size`."""
    train_mode: bool = True
    """false: train without dropout and drop-path, as the first version of DeiT's code did."""

    @field_validator("students", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
