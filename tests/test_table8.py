"""configs/table8: each switches off what it says, in what is drawn, and leaves the rest alone."""

from pathlib import Path

import pytest

from pipeline.config.params import load_config
from pipeline.config.policies import ORIGINAL
from pipeline.config.schema import Config, Finetune, Recipe, Student
from pipeline.views.draw import draw_mix, draw_view

FOLDER = Path(__file__).parent.parent / "configs" / "table8"


def recipe(name: str) -> Recipe:
    return load_config(str(FOLDER / f"{name}.yaml"), ()).recipe


def views(name: str) -> list:
    return [draw_view(recipe(name), "key", view, 500, 375) for view in range(200)]


def methods(name: str) -> set[str]:
    return {draw_mix(recipe(name), "shard", 0, view, 64).method for view in range(100)}


CHANGED = {
    "no-randaugment": {"recipe.auto_augment"},
    "autoaugment": {"recipe.auto_augment"},
    "no-mixup": {"recipe.mixup_alpha"},
    "no-cutmix": {"recipe.cutmix_alpha"},
    "no-mixing": {"recipe.mixup_alpha", "recipe.cutmix_alpha"},
    "no-erasing": {"recipe.erase_prob"},
    "no-repeated-augmentation": {"recipe.repeats"},
    "sgd": {"student.optimizer"},
    "finetune-sgd": {"finetune.optimizer"},
    "no-stochastic-depth": {"student.drop_path", "finetune.drop_path"},
    "dropout": {"student.dropout", "finetune.dropout"},
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_ablation_changes_the_papers_deit_b_in_nothing_but_what_it_names(path):
    paper = Config(
        student=Student(model="deit_base_patch16_224", distillation="none"), finetune=Finetune(students=["none"]),
        students=["none"], variants={"none": {}},
    )  # fmt: skip
    found = set()
    for section in ("recipe", "student", "finetune", "teacher_logits", "evaluate"):
        ours, theirs = (getattr(config, section).model_dump() for config in (load_config(str(path), ()), paper))
        found |= {f"{section}.{key}" for key in theirs if ours[key] != theirs[key]}
    assert found == CHANGED[path.stem]


def test_without_randaugment_only_colours_are_jittered():
    assert {name for view in views("no-randaugment") for name, _ in view.ops} == {"Brightness", "Contrast", "Color"}


def test_autoaugment_draws_its_policy_s_ops():
    known = {name for pair in ORIGINAL for name, _, _ in pair}
    assert {name for view in views("autoaugment") for name, _ in view.ops} == known


@pytest.mark.parametrize(
    ("name", "expected"), [("no-mixup", {"cutmix"}), ("no-cutmix", {"mixup"}), ("no-mixing", {"none"})]
)
def test_mixing_is_switched_off(name, expected):
    assert methods(name) == expected


def test_without_erasing_nothing_is_erased():
    assert not any(view.erase for view in views("no-erasing"))


def test_without_repeated_augmentation_a_visit_is_one_view():
    assert recipe("no-repeated-augmentation").repeats == 1
