"""The stores that a configuration needs; the only place that derives this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.paths import teacher_folder, teacher_logits_folder
from pipeline.config.schema import Config, Recipe, TeacherLogits

SAMPLING_VERSION = 1  # bump on any change of a class that kind sampled draws


@dataclass(frozen=True)
class StoreSpec:
    """One store of teacher predictions, as a configuration specifies it."""

    purpose: str
    """The stage that reads it: train-student or finetune."""
    recipe: Recipe
    views: int
    """Views per image."""
    kind: str
    """argmax, topk, dense8, dense or sampled."""
    k: int
    """Classes per view, for topk and sampled."""
    precision: str
    """float32, bfloat16 or float16, of the teacher's forward pass."""
    teacher_size: int
    """Height and width of the teacher's input, in pixels."""
    teacher_folder: Path
    """Folder of the teacher's weights and metrics."""
    folder: Path
    """Folder of the store's manifest and summary."""
    fetch: str | None = None
    """Path or URL of the published store to fetch instead of running the teacher."""
    sampling: dict[str, Any] | None = None
    """See `sampling_identity`."""

    @property
    def command(self) -> str:
        """The command that makes it."""
        return "pipeline teacher-logits" + " --for finetune" * (self.purpose == "finetune")

    @property
    def blocks(self) -> int:
        return self.views // self.recipe.block


def store_spec(config: Config, purpose: str) -> StoreSpec:
    """The store that train-student or finetune reads."""
    finetune = purpose == "finetune"
    return StoreSpec(
        purpose=purpose,
        recipe=config.finetune_recipe() if finetune else config.recipe,
        views=config.finetune.views if finetune else config.teacher_logits.views,
        kind=config.teacher_logits.kind,
        k=config.teacher_logits.samples if config.teacher_logits.kind == "sampled" else config.teacher_logits.top_k,
        precision=config.teacher_logits.precision,
        teacher_size=config.teacher_size(purpose),
        teacher_folder=teacher_folder(config, purpose),
        folder=teacher_logits_folder(config, purpose),
        fetch=config.published_store(purpose),
        sampling=sampling_identity(config.teacher_logits),
    )


def sampling_identity(settings: TeacherLogits) -> dict[str, Any] | None:
    """What the classes drawn by kind sampled depend on besides logits and recipe, as JSON values; None for other kinds.

    Part of the identity of stores and runs: stores of other draws are other stores.
    """
    if settings.kind != "sampled":
        return None
    return {"samples": settings.samples, "tau": settings.sample_tau, "version": SAMPLING_VERSION}
