"""The runs below `work`, and which of them are an experiment's own, from their files alone."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.batches.plan import training_plan
from pipeline.cli.matching import foreign_teachers
from pipeline.cli.scan import list_stores, modification_times, read_index, read_json
from pipeline.config.paths import FINGERPRINT, index_path, local_work
from pipeline.config.schema import PURPOSES, Config, Training
from pipeline.config.store_spec import COMPUTED_WITH, StoreSpec, store_spec
from pipeline.training.identity import configured_runs, is_run_of, teacher_fingerprint, used_other_predictions


@dataclass(frozen=True)
class StateFolder:
    """The state folder of a run."""

    folder: Path
    described: dict[str, Any]
    """Its run.json."""
    files: dict[str, float]
    """When each was written."""

    @property
    def complete(self) -> bool:
        return "final.safetensors" in self.files

    @property
    def modified(self) -> float:
        return max(self.files.values(), default=0.0)

    @property
    def checkpoint(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return max((int(name[5:14]) for name in self.files if re.fullmatch(r"step-\d{9}\.ckpt", name)), default=0)


class Experiment:
    """A configuration, and what is read once for all its stages."""

    def __init__(self, config: Config):
        self.config = config
        self.indices = {split: read_index(index_path(config, split)) for split in ("train", "val")}
        self.index: str | None = self.indices["train"].get("fingerprint")
        self.names = [shard["name"] for shard in self.indices["train"].get("shards", [])]
        self.samples = [shard["samples"] for shard in self.indices["train"].get("shards", [])]
        self.stores, self.runs = list_stores(config.work), configured_runs(config, self.index)
        # a folder without run.json may belong to any configuration
        found = [path for path in (local_work(config.work) / "state").glob("*") if FINGERPRINT.fullmatch(path.name)]
        folders = [(folder, read_json(folder / "run.json")) for folder in found]
        self.states = [StateFolder(folder, described, modification_times(folder)) for folder, described in folders if described]
        self.known_runs = {state.folder.name for state in self.states}
        own = [state.folder.name for state in self.states_of("teacher")]
        self.foreign_teachers = foreign_teachers(config, own, self.known_runs)
        self.foreign_stores = self._foreign_stores()

    @property
    def images(self) -> tuple[str | None, ...]:
        """The fingerprints of both indices."""
        return tuple(index.get("fingerprint") for index in self.indices.values())

    def states_of(self, stage: str) -> list[StateFolder]:
        """The states with the configuration's settings that use the published store, or none."""
        configured, (kind, _, student) = self.runs[stage], stage.partition("@")
        if kind == "finetune":
            configured = configured | {"name": f"finetune {student} at {self.config.finetune.size}"}
        elif student:  # with --teacher online the settings are the same, the name is not
            configured = configured | {"name": f"student {student}"}
        store, own = self.manifest(stage).get("fingerprint"), self._recorded(stage, configured)
        return [state for state in own if store is None or state.described.get("store") in (None, store)]

    def published_runs(self, stage: str) -> list[str]:
        """The runs that a stage may have published: also another student's of the same settings, but from this store."""
        student = stage.partition("@")[2]
        store, own = self.manifest(stage).get("fingerprint"), self._recorded(stage, self.runs[stage])
        if store and student and self.config.student_named(student).distillation != "none":
            own = [state for state in own if state.described.get("store") == store]  # none with --teacher online
        return [state.folder.name for state in own]

    def _recorded(self, stage: str, configured: dict[str, Any]) -> list[StateFolder]:
        """The states of a configured run that learnt from the published predictions, if from any in a store."""
        student = stage.partition("@")[2]
        found = [state for state in self.states if is_run_of(configured, state.described)]
        if not student:
            return found
        spec = self._store_spec(stage)
        predictions = (spec.kind_for(self.config.student_named(student).distillation), spec.views, self.manifest(stage))
        return [state for state in found if not used_other_predictions(state.described, *predictions)]

    def _store_spec(self, stage: str) -> StoreSpec:
        return store_spec(self.config, "finetune" if stage.startswith("finetune@") else "train-student")

    def manifest(self, stage: str) -> dict[str, Any]:
        """The manifest of the published store for a stage's students; {} without one."""
        return read_json(self._store_spec(stage).folder / "manifest.json")

    def _foreign_stores(self) -> set[str]:
        """The purposes whose published store is of a teacher other than the configured one."""
        found = set(self.foreign_teachers)
        for purpose in PURPOSES:
            spec = store_spec(self.config, purpose)
            recorded = read_json(spec.folder / "summary.json").get(COMPUTED_WITH)
            if recorded and not spec.fetch and not (spec.teacher_folder / "weights.safetensors").exists():
                found |= {purpose} if recorded != teacher_fingerprint(self.config, self.index, purpose) else set()
        return found

    def steps(self, settings: Training) -> tuple[int | None, float | None]:
        """The steps of a complete run, and the samples per step; None before there is an index."""
        if not any(self.samples):
            return None, None
        plan = training_plan(self, self.config.recipe, settings, self.config.recipe.block)
        return settings.epochs * plan.steps_per_epoch, plan.batch_groups * sum(self.samples) / plan.groups
