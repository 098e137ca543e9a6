"""details.json: what a study's tables show of each student besides its metrics, as in Tables 1 and 4 of the paper."""

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from pipeline.config.paths import TEACHER
from pipeline.config.schema import Config
from pipeline.config.types import is_custom_model
from pipeline.models.build import build_student
from pipeline.report.comparison import AllPredictions, compared_settings, joint_classifier, other_differences
from pipeline.report.entries import Entry

UNDISTILLED = "undistilled"
CLASSIFIERS = ("class", "distillation", "mean")
Disagreement = dict[str, dict[str, float]]
"""Share of the images that are classified differently, by a model's own classifier and what it is compared with."""


def student_details(config: Config, entries: list[Entry], predictions: AllPredictions) -> dict[str, dict[str, Any]]:
    """For each student, its shape if it is a ViT, and how often its classifiers disagree with others."""
    found = disagreements(entries, predictions)
    return {each.name: vit_shape(config, each) | {"disagreement": found[each.name]} for each in entries if each.student}


def vit_shape(config: Config, entry: Entry) -> dict[str, int]:
    """Width, heads and depth of a student, by timm's names; empty if it is not a ViT."""
    if entry.student is None or is_custom_model(entry.student.model):
        return {}
    with torch.device("meta"):
        model = build_student(entry.student, config.recipe, 2, entry.size).model
    if not isinstance(model, VisionTransformer):
        return {}
    blocks: Any = model.blocks
    return {"embed_dim": int(model.embed_dim), "num_heads": blocks[0].attn.num_heads, "depth": len(blocks)}


def disagreements(entries: list[Entry], predictions: AllPredictions) -> dict[str, Disagreement]:
    """Compare the classifiers of every student with the teacher, with the student that was trained without distillation
    but otherwise with the same settings and seed (`undistilled`), and with one another."""
    return {entry.name: _disagreement(entry, entries, predictions) for entry in entries if entry.student}


def _disagreement(entry: Entry, entries: list[Entry], predictions: AllPredictions) -> Disagreement:
    own = {name: each.classes for name, each in predictions[entry.name].items() if name in CLASSIFIERS}
    others = {}
    if TEACHER in predictions:
        others[TEACHER] = predictions[TEACHER][joint_classifier(predictions[TEACHER])].classes
    if entry.distilled and (plain := _undistilled(entry, entries)):
        others[UNDISTILLED] = predictions[plain.name][joint_classifier(predictions[plain.name])].classes
    return {
        name: {other: float(np.mean(found != classes)) for other, found in {**others, **own}.items() if other != name}
        for name, classes in own.items()
    }


def _undistilled(entry: Entry, entries: list[Entry]) -> Entry | None:
    plain = [each for each in entries if each.student and not each.distilled]
    plain = [each for each in plain if compared_settings(each) == compared_settings(entry)]
    return next((each for each in plain if not other_differences(each, entry)), None)
