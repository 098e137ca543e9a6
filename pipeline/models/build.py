"""Teacher and student from timm; normalisation; which weights they have."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.weight_init import trunc_normal_
from torch import nn
from torch.nn.functional import interpolate

from pipeline.common.errors import NotYet, PipelineError, UsageError
from pipeline.config.paths import UNNEEDED, teacher_folder
from pipeline.config.schema import Config, Recipe, Student, Teacher, TeacherLogits, Triple
from pipeline.config.validation import differences
from pipeline.models.compiling import compiled
from pipeline.models.linear import use_onednn
from pipeline.models.weights import (
    SUFFIXES,
    load_weights,
    read_foreign,
    read_own_weights,
    refuse_tag,
    save_weights,
    weights_hash,
)


class Normalised(nn.Module):
    """A model behind its own normalisation: takes pictures in 0..255, gives two heads' logits.

    A model without a distillation head gives its logits twice, so a plain student can be distilled
    (Table 3's "usual" and "hard" rows). So does a `joint` one, as a teacher is: its logits are the mean
    of its heads, where it has two, as timm answers.
    """

    model: Any  # one of timm's, which a static checker takes for a Module without methods
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], joint: bool = False):
        super().__init__()
        use_onednn(model)
        self.model = model
        self.float32_head = False
        """Whether what follows the features, pooling and classifier, is in float32 under autocast too."""
        self.distilled = hasattr(model, "head_dist") and not joint
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float pictures (N, 3, P, P) in 0..255 to class and distillation logits (N, classes)."""
        features = self.model.forward_features((pictures - self.mean) / self.std)
        if not self.float32_head:
            return self.heads(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.heads(features.float())

    def heads(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.distilled:
            logits = self.model.forward_head(features)  # of two heads, timm's gives the mean
            return logits, logits
        # timm averages the heads in eval mode; both are wanted in every mode
        tokens = self.model.head_drop(features[:, :2])
        return self.model.head(tokens[:, 0]), self.model.head_dist(tokens[:, 1])


def build(
    section: Teacher | Student, classes: int, mean: Triple, std: Triple, *, size: int | None = None, joint: bool = False
) -> Normalised:
    """The timm model that a teacher or student section names, with fresh weights drawn from its seed.

    Args:
        size: pixels a side, for models with position embeddings (deit_*).
        joint: two heads answer as one; see Normalised.

    Raises:
        UsageError: timm knows no such model, or it does not take these kwargs.
    """
    kwargs: dict[str, Any] = {"drop_rate": section.dropout}
    if size is not None:
        # where timm 0.3.2, which DeiT pins, drops out: after positions, attention and MLP, not before the heads
        kwargs = {"img_size": size, "pos_drop_rate": section.dropout, "proj_drop_rate": section.dropout}
    kwargs |= section.kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        try:
            model = timm.create_model(
                section.model,
                num_classes=classes,
                drop_path_rate=section.drop_path,
                **kwargs,
            )
        except Exception as error:  # each of timm's models has its own way to refuse arguments
            raise _unsuitable(section.model, kwargs, error) from error
        if hasattr(model, "cls_token"):
            trunc_normal_(model.cls_token, std=0.02)  # as DeiT (timm 0.3.2); timm's is 1e-6 now
    return Normalised(model, mean, std, joint)


def _unsuitable(model: str, kwargs: dict[str, Any], error: Exception) -> UsageError:
    found = f"{type(error).__name__}: {error}"
    if timm.is_model(model):
        return UsageError(
            f"model {model!r} with {kwargs}", expected="arguments that it takes", found=found, do="correct kwargs"
        )
    close = difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.5)
    near = f", such as {', '.join(close)}" if close else ""
    return UsageError(f"model {model!r}", expected=f"a model of timm's{near}", found=found, do="correct the name")


def build_student(section: Student, recipe: Recipe, classes: int, size: int) -> Normalised:
    """A deit_* student at `size` pixels, normalised with the recipe's mean and std."""
    return build(section, classes, recipe.mean, recipe.std, size=size)


def build_teacher(section: Teacher, classes: int) -> Normalised:
    return build(section, classes, section.mean, section.std, joint=True)


class TeacherForward:
    """A teacher as it is asked, for the store and in the loop alike.

    Its head computes in float32 whatever the precision: logits that were rounded to bfloat16 tie, and flip.
    """

    def __init__(self, teacher: Normalised, settings: TeacherLogits, size: int | None = None):
        """`size` is the teacher's own input in pixels, where it is another than the views'."""
        self.settings, self.size = settings, size
        teacher.float32_head = True
        if settings.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        self.teacher = compiled(teacher) if settings.compile else teacher

    def logits(self, pictures: torch.Tensor, slots: int) -> torch.Tensor:
        """Mixed pictures (N, 3, P, P) in 0..255, N a multiple of `slots`, to float32 logits (N, classes)."""
        settings, pictures = self.settings, resize_pictures(pictures, self.size)
        if settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        return teacher_logits(self.teacher, pictures, slots, settings.batch_groups, settings.precision == "bfloat16")


@torch.no_grad()
def teacher_logits(teacher: nn.Module, pictures: torch.Tensor, slots: int, groups: int, bf16: bool) -> torch.Tensor:
    """What the teacher answers: pictures (N, 3, P, P) in 0..255 to float32 logits (N, classes).

    Always in forwards of at most `groups` groups of `slots` pictures: offline and online use this one
    function, so on a CPU in float32 with one group a forward they agree to the bit.
    """
    device = pictures.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        logits = [teacher(part)[0].float() for part in pictures.split(slots * groups)]
    return torch.cat(logits)


def resize_pictures(pictures: torch.Tensor, size: int | None) -> torch.Tensor:
    """To the teacher's own size, where that is another: bilinear with antialias, on the device."""
    if size is None or pictures.shape[-1] == size:
        return pictures
    return interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def pretrained_teacher(section: Teacher, weights: str, classes: int, notes: Path) -> Normalised:
    """The teacher with `weights`, those of `teacher.weights`: a local file, or a timm tag (downloaded by timm).

    Args:
        notes: where the digests of foreign files are kept.

    Raises:
        UsageError, PipelineError: no such tag, no network, other shapes.
    """
    if weights.endswith(SUFFIXES):
        teacher = build_teacher(section, classes)
        load_weights(teacher.model, read_foreign(Path(weights), notes), weights)
        return teacher
    if ":" not in weights:  # another hub's are known when they are fetched
        refuse_tag(weights, classes)
    try:
        model = timm.create_model(weights, pretrained=True, num_classes=classes, **section.kwargs)
    except Exception as error:  # timm and the hub raise many kinds
        raise PipelineError(
            f"teacher.weights {weights!r}",
            expected="a timm tag that can be downloaded, or a local .safetensors or .pth file",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            do="check the tag and the network, or download the file and name it",
        ) from error
    return Normalised(model, section.mean, section.std, joint=True)


def teacher_function(section: Teacher) -> dict[str, Any]:
    """What a teacher's weights are put into, as JSON values: other arguments may take the same weights."""
    own = section.model
    if section.weights and not section.weights.endswith(SUFFIXES):
        own = section.weights  # a timm tag, which names the model
    described = {"model": own, "kwargs": section.kwargs, "mean": section.mean, "std": section.std}
    return json.loads(json.dumps(described))


def describe_teacher(section: Teacher, teacher: Normalised, size: int) -> dict[str, Any]:
    """All of a teacher that its answers depend on, as JSON values; part of a store's and of a run's identity.

    Args:
        size: pixels a side of what it sees.
    """
    heads = "mean" if hasattr(teacher.model, "head_dist") else "class"
    return {**teacher_function(section), "head": heads, "weights": weights_hash(teacher.model), "size": size}


def save_teacher(path: Path, section: Teacher, teacher: Normalised) -> None:
    """Its weights, and what they belong into; `path` is written directly, so give a temporary one."""
    save_weights(path, teacher.model, teacher_function(section))


def load_teacher(
    config: Config, classes: int, device: torch.device, purpose: str = "train-student"
) -> Normalised:
    """The published teacher that answers for a purpose, in eval mode on the device.

    Raises:
        PipelineError: it was not computed yet, or is another model's.
    """
    path, section = teacher_folder(config, purpose) / "weights.safetensors", config.teacher
    command = "pipeline teacher" + " --for finetune" * (purpose == "finetune")
    if not path.exists():
        raise NotYet(f"{path}: no teacher", do=f"run: {command}")
    state, about = read_own_weights(path)
    if about == UNNEEDED:
        found = "a mark of dvc repro: no configured student listens to one"
        raise NotYet(f"{path}: no teacher", found=found, do=f"run: {command}")
    function = teacher_function(section)
    others = differences(about, function)
    if others:
        raise PipelineError(
            f"{path}: the teacher of another configuration",
            expected="weights that were published with the model and arguments of `teacher`",
            found="(there, here) " + "; ".join(others[:8]),
            do=f"run: {command}",
        )
    teacher = build_teacher(section.model_copy(update={"drop_path": 0.0, "model": function["model"]}), classes)
    load_weights(teacher.model, state, str(path))
    return teacher.to(device).eval()


def refuse_size(teacher: Normalised, size: int, do: str) -> None:
    """Whether a teacher takes pictures of this size: position embeddings are of one size.

    Raises:
        UsageError: it does not; `do` is what to do then.
    """
    training = teacher.training
    try:
        with torch.no_grad():
            teacher.eval()(torch.zeros(1, 3, size, size, device=teacher.mean.device))
    except (AssertionError, RuntimeError, ValueError) as error:  # what timm's and torch's layers raise
        raise UsageError(
            f"the teacher with pictures of {size} px",
            expected="a model that takes them",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do=do,
        ) from error
    finally:
        teacher.train(training)


def resize_position_embedding(embedding: torch.Tensor, grid: int, prefix: int) -> torch.Tensor:
    """Position embeddings (1, prefix + n * n, D) for a grid x grid of patches, as DeiT resizes them.

    Plain bicubic without antialias, the prefix tokens unchanged (DeiT main.py; timm antialiases).
    """
    kept, patches = embedding[:, :prefix], embedding[:, prefix:]
    old = round(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = interpolate(patches, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([kept, patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def load_resized(model: Normalised, state: dict[str, torch.Tensor], source: str) -> None:
    """A student's weights of another resolution; only the position embeddings change.

    Raises:
        PipelineError: they are of another model.
    """
    prefix = model.model.num_prefix_tokens
    grid = round((model.model.pos_embed.shape[1] - prefix) ** 0.5)
    patches = state["pos_embed"].shape[1] - prefix if "pos_embed" in state else -1
    if patches > 0 and math.isqrt(patches) ** 2 == patches:  # or they are another model's, which load_weights tells
        state = state | {"pos_embed": resize_position_embedding(state["pos_embed"], grid, prefix)}
    load_weights(model.model, state, source)


def with_new_heads(model: Normalised, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights for another number of classes: heads of another shape are the model's own, freshly drawn.

    Returns the state, and the names of the heads that begin anew.
    """
    own = model.model.state_dict()
    heads = [f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")]
    anew = [name for name in heads if name in own and name in state and own[name].shape != state[name].shape]
    return state | {name: own[name] for name in anew}, anew


def adaptable(model: Any) -> list[nn.Module]:
    """What FixRes fine-tunes of a convnet: its classifier and its last batch norm.

    Where the last block has a shortcut with a batch norm, both whose sum is its output.

    Raises:
        UsageError: the model has no batch norm.
    """
    norms = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UsageError(
            f"model {type(model).__name__}", expected="a convnet with batch norms", found="none",
            do="set teacher_finetune.epochs to 0: there is nothing to adapt",
        )  # fmt: skip
    last = norms[-2:] if "downsample" in norms[-1][0] else norms[-1:]
    return [model.get_classifier(), *(part for _, part in last)]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
