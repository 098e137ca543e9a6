"""Sections of the configuration that train nothing: data, views, stores and evaluation."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.policies import parse_policy
from pipeline.config.types import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Alpha,
    Count,
    File,
    Fraction,
    FractionBelowOne,
    LocalFolder,
    NonNegative,
    Pixels,
    Positive,
    PositiveFraction,
    Range,
    Seed,
    SetName,
    Triple,
    Workers,
)
from pipeline.config.validation import Section, fingerprint


class Data(Section):
    """Where images come from and how they are divided into shards."""

    source: Literal["digits", "folder", "parquet", "shards", "table", "torchvision"] = "folder"
    """`digits` (bundled with scikit-learn), `folder` (one folder per class), `table` (a CSV, TSV, JSON Lines or Parquet
    file of paths and labels, or COCO annotations), `parquet` (Parquet files of images and labels, as on the Hugging Face Hub),
    `torchvision` (one of its data sets) or `shards` (existing WebDataset tars)."""
    dataset: str = ""
    """torchvision: the name of its class, for example CIFAR10, Flowers102, Food101 or OxfordIIITPet."""
    download: bool = False
    """torchvision: download the data set to data.train if it is not there."""
    train: str = ""
    """folder: the root of the training class folders. table: the file. parquet: the files; shards: paths or a URL;
    {0000..1023} and * are expanded. torchvision: the folder that holds the data set's files. ~ is your home folder."""
    val: str = ""
    """The same for validation; empty with val_fraction, with torchvision, or if the table of data.train has a column
    `split`."""
    val_fraction: FractionBelowOne = 0.0
    """Use this fraction of the training images of each class for validation instead (not with digits and shards). The
    choice depends only on data.seed and the images' paths: an added image moves at most one other of its class."""
    label_key: str = ""
    """shards: the field of each sample's KEY.json that holds its class number, as in img2dataset's output. Empty: KEY.cls
    holds it."""
    class_names: str = ""
    """shards: a file with the class names in the order of their numbers: one per line, or JSON (a list, or names with
    numbers). Empty: the classes are named by their numbers."""
    unlabelled: bool = False
    """Train on images without labels too, by distillation alone: those in the folder `unlabelled` of `train`; of shards,
    samples without a label or with -1. Needs a pretrained teacher, alpha 1 and students without a distillation token."""
    seed: int = 0
    """Determines the order of samples in the shards, and the images that val_fraction chooses."""
    shard_samples: Positive = 1280
    """Largest number of samples per shard; samples are spread evenly, so shard sizes differ by at most one. A multiple
    of recipe.group_size, or slightly less, wastes nothing; see `pipeline prepare --dry-run`."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """Number of undecodable images to tolerate before indexing stops; index.json names each of them."""
    max_pixels: Annotated[int, Field(ge=1, le=2**30)] = 50_000_000
    """Larger images are refused before they are decoded; decoding takes 10 (JPEG, PNG) to 22 (WebP) bytes per pixel."""
    exif_orientation: bool = True
    """Apply the EXIF orientation (with shards, only in evaluate.sets); rotated images are stored as PNG. Turn it off to
    reproduce published results: torchvision and timm ignore the tag."""
    max_per_class: Positive | None = None
    """Use only the first N images of each class (not with digits and shards), for quick trials."""
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that write and index shards; null: one per core."""
    cache: LocalFolder | None = None
    """Folder for local copies of shards at URLs, best on a local disk; null: `cache` in the work folder."""
    cache_gb: Annotated[float, Field(ge=0, le=1e6)] = 10.0
    """Limit of the total size of these copies in GB (1e9 bytes); the least recently used are deleted first. At least
    2 x student.open_shards shards, or all, should fit. 0: no copies, each image is a request."""

    @field_validator("dataset", "val", "label_key", "class_names", mode="before")
    @classmethod
    def _empty(cls, text: Any) -> Any:
        """Read null, such as from `data.val=`, as empty."""
        return "" if text is None else text


class Recipe(Section):
    """Everything that determines views, groups and mixing. Its fingerprint identifies the views."""

    seed: Seed = 0
    """Determines all random draws of views, groups and mixing."""
    size: Pixels = 224
    """Height and width of a view in pixels."""
    scale: Range = (0.08, 1.0)
    """Area of the random resized crop, as a fraction of the image area."""
    ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, drawn log-uniformly."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """A timm string: rand-... (RandAugment with the increasing set) or original (AutoAugment); null disables it."""
    color_jitter: Fraction = 0.3
    """Brightness, contrast and saturation factors from 1 - x to 1 + x; unused with auto_augment, as in timm."""
    erase_prob: Fraction = 0.25
    """Probability of random erasing: pixel noise over 2 % to 33 % of the area."""
    mean: Triple = IMAGENET_MEAN
    """Mean by which a student's input is normalized; also the fill colour, and the mean of the erasing noise. A teacher has
    its own, `teacher.mean`."""
    std: Triple = IMAGENET_STD
    """Standard deviation by which a student's input is normalized; also that of the erasing noise."""
    mixup_alpha: Alpha = 0.8
    """Beta parameter of Mixup; 0 disables it."""
    cutmix_alpha: Alpha = 1.0
    """Beta parameter of CutMix; 0 disables it."""
    mix_prob: Fraction = 1.0
    """Probability that a group is mixed at all."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix rather than Mixup when both are enabled."""
    group_size: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] = 64
    """Slots per group: samples that are mixed with one another (in DeiT, the batch of one GPU)."""
    repeats: Positive = 3
    """Repeated augmentation: consecutive views of an image in one cycle over the data (DeiT: 3; 1 disables it)."""
    block: Positive = 30
    """Consecutive views that share groups and one decode: what the teacher computes at a time."""

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


class TeacherLogits(Section):
    """The stores of teacher predictions."""

    views: Count = 300
    """V: the store covers views 0..V-1 of every training image; a multiple of recipe.block."""
    kind: Literal["argmax", "topk", "dense8", "dense", "sampled"] = "argmax"
    """argmax (2 bytes per view) is all that hard distillation needs; topk, dense8 (one byte per class), dense (float16)
    and sampled (2 bytes per drawn class) also allow soft distillation."""
    top_k: Annotated[int, Field(ge=1, le=65_535)] = 10
    """Classes stored per view by kind topk."""
    samples: Annotated[int, Field(ge=1, le=255)] = 4
    """Classes drawn per view by kind sampled, from the teacher's softmax; one class may be drawn several times."""
    sample_tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the softmax that kind sampled draws from; students with soft distillation need the same `tau`. Above 1 the
    draws are much noisier."""
    fetch: str | None = None
    """Path or URL of a published store (pipeline store publish): it is fetched, and no teacher is needed."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """float32 is IEEE 754, never TF32; bfloat16 and float16 are autocast, except for the classifier, which stays in
    float32."""
    batch_groups: Positive = 8
    """Groups per forward pass of the teacher; 1 makes offline and online training bit-identical on a CPU."""
    workers: Workers = None
    """Rendering processes; null: chosen for the machine."""
    channels_last: bool = False
    """Use the channels_last memory format."""
    compile: bool = False
    """Use torch.compile."""


class Logging(Section):
    """Experiment trackers that training logs to, besides log.jsonl; they change no result."""

    tensorboard: bool = False
    """Write event files to outputs/NAME/tensorboard; needs the package tensorboard."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Name of the project at Weights & Biases, or at the tracker that `module` names; null disables it."""
    module: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")] = "wandb"
    """Module that `wandb` logs with: wandb, or one with the same functions init, log and finish, such as trackio."""


class Evaluate(Section):
    """How models are evaluated on the validation set."""

    batch_size: Positive = 256
    """Images per forward pass."""
    crop: PositiveFraction = 0.875
    """Centre crop: the short side is resized to int(size / crop) (DeiT: 0.875; timm: 0.9)."""
    crop_finetuned: PositiveFraction = 0.875
    """The same for fine-tuned students."""
    sizes: list[Pixels] = []
    """Additional image sizes at which every model is evaluated, with resized position embeddings. This is not the
    paper's Table 10, for which a model is fine-tuned at each size."""
    real_labels: File | None = None
    """ImageNet-ReaL's labels of the validation images (Beyer et al. 2020), for `real_top1`: real.json, or timm for the copy
    in timm. The samples' keys have to contain ImageNet's file names (ILSVRC2012_val_00000293)."""
    sets: dict[SetName, LocalFolder] = {}
    """Additional evaluation sets, for `NAME_top1`: folders by name, for example {v2: imagenetv2-matched-frequency-format-val}.
    Each has one folder of images per class of the index, named after the class or, for ImageNet, after its number (0 to 999)."""
    workers: Workers = None
    """Loading processes; null: chosen for the machine."""
    throughput_seconds: NonNegative = 5.0
    """How long to measure each model's throughput."""

    @property
    def further_sets(self) -> list[str]:
        """The names of the evaluation sets besides validation."""
        return [*self.sets] if self.real_labels is None else ["real", *self.sets]

    def sets_identity(self, data: Data) -> dict[str, str]:
        """The entry of metrics.json that says where these sets are and how they are decoded; empty without any."""
        decoding = [data.max_pixels, data.exif_orientation] if self.sets else []
        return {"sets": fingerprint([self.real_labels, self.sets, *decoding])} if self.further_sets else {}
