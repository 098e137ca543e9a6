"""What a configuration asks of each of its two stores: the one place where this is told."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.paths import teacher_folder, teacher_logits_folder
from pipeline.config.schema import Config, Recipe


@dataclass(frozen=True)
class StoreSpec:
    """One store of teacher answers, as a configuration wants it."""

    purpose: str
    """The stage that reads it: train-student or finetune."""
    recipe: Recipe
    views: int
    """Views per image."""
    kind: str
    top_k: int
    precision: str
    """Of the teacher's forward."""
    teacher_size: int
    """Height and width of the teacher's input, in pixels."""
    teacher_folder: Path
    """Holds the published teacher."""
    folder: Path
    """Holds the store's manifest and summary."""

    @property
    def blocks(self) -> int:
        return self.views // self.recipe.block


def store_spec(config: Config, purpose: str) -> StoreSpec:
    """The store that `purpose`, train-student or finetune, reads."""
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
    )
