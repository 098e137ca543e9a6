"""The stores that a configuration needs; the only place that derives this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.paths import teacher_folder, teacher_logits_folder
from pipeline.config.schema import Config, Recipe, TeacherLogits

SAMPLING_VERSION = 1  # bump on any change of a class that kind sampled draws
COMPUTED_WITH, FETCHED = "teacher", "fetched"
"""Keys of a store's summary.json: the `teacher_fingerprint` of the configuration that it was computed with, and where it was
fetched from; the other is null."""
ARGMAX_UNITS = "argmax_units"
"""Key of a store's manifest.json: the fingerprint of what `units` would be for the kind argmax."""


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
    """Precision of the teacher's forward pass: float32, bfloat16 or float16."""
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
        """The command that computes or fetches it."""
        return "pipeline teacher-logits" + " --for finetune" * (self.purpose == "finetune")

    @property
    def commands(self) -> str:
        """The commands that compute it and, before, its teacher."""
        adapted = ", then pipeline teacher --for finetune" if self.purpose == "finetune" else ""
        return f"pipeline teacher{adapted}, then {self.command}"

    @property
    def blocks(self) -> int:
        return self.views // self.recipe.block

    def kind_for(self, distillation: str) -> str:
        """The kind of predictions that a student reads: hard distillation takes the argmax, which stores of every kind have."""
        return "argmax" if distillation == "hard" else self.kind


def store_section(purpose: str) -> str:
    """The section of the configuration with the store's `views` and `fetch`."""
    return "finetune" if purpose == "finetune" else "teacher_logits"


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
        fetch=config.fetch_source(purpose),
        sampling=sampling_identity(config.teacher_logits),
    )


def sampling_identity(settings: TeacherLogits) -> dict[str, Any] | None:
    """What the classes drawn by kind sampled depend on besides logits and recipe, as JSON values; None for other kinds.

    Part of the identity of stores and runs: stores with different draws are different stores.
    """
    if settings.kind != "sampled":
        return None
    return {"samples": settings.samples, "tau": settings.sample_tau, "version": SAMPLING_VERSION}
