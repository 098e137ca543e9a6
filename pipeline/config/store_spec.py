"""The stores that a configuration needs; the only place that derives this."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.paths import teacher_folder, teacher_logits_folder
from pipeline.config.schema import Config, Recipe


@dataclass(frozen=True)
class StoreSpec:
    """One store of teacher predictions, as a configuration specifies it."""

    purpose: str
    """The stage that reads it: train-student or finetune."""
    recipe: Recipe
    views: int
    """Views per image."""
    kind: str
    """argmax, topk, dense8 or dense."""
    top_k: int
    """Classes per view, for topk."""
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
        top_k=config.teacher_logits.top_k,
        precision=config.teacher_logits.precision,
        teacher_size=config.teacher_size(purpose),
        teacher_folder=teacher_folder(config, purpose),
        folder=teacher_logits_folder(config, purpose),
        fetch=config.published_store(purpose),
    )
