"""Validation images that are taken from the training images: stratified, seeded, moved by nothing else."""

import pytest
from conftest import small_config, write_folders
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import resolve
from pipeline.config.paths import index_path
from pipeline.shards.index import Index
from pipeline.shards.validation_split import chosen_for_validation
from stages import prepare

CLASSES = {"cat": 10, "dog": 5, "eel": 2, "fox": 1}
FRACTIONS = st.floats(0.01, 0.99)
NAMES = st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True).map(lambda ids: [f"{n}.png" for n in ids])


def divided(root, **changes):
    return small_config(root, **{"data__val": "", "data__val_fraction": 0.2} | changes)


def keys(config, split: str) -> set[str]:
    index = Index(index_path(config, split))
    return {row["key"].decode() for shard in range(len(index.names)) for row in index.rows(shard)}


def test_each_class_is_divided_and_every_image_is_on_one_side(in_tmp):
    write_folders(in_tmp / "train", CLASSES)
    config = divided(in_tmp)
    prepare.run(config)
    train, val = keys(config, "train"), keys(config, "val")
    assert not train & val
    assert train | val == {f"{name}/{i:03d}" for name, count in CLASSES.items() for i in range(count)}
    assert {name: sum(key.startswith(name) for key in val) for name in CLASSES} == {"cat": 2, "dog": 1, "eel": 1, "fox": 0}
    assert Index(index_path(config, "train")).classes == Index(index_path(config, "val")).classes == [*CLASSES]


def test_same_seed_divides_alike_in_another_folder_and_another_seed_does_not(in_tmp, monkeypatch):
    found = []
    for place, seed in (("one", 0), ("other", 0), ("third", 1)):
        (in_tmp / place).mkdir()
        monkeypatch.chdir(in_tmp / place)
        write_folders(in_tmp / place / "train", {"cat": 20, "dog": 20})
        config = divided(in_tmp / place, data__seed=seed)
        prepare.run(config)
        found.append((keys(config, "val"), Index(index_path(config, "train")).fingerprint))
    assert found[0] == found[1] and found[0][0] != found[2][0]


def test_quick_run_reads_no_image_of_either_side(in_tmp, monkeypatch):
    from pipeline.shards import contents

    write_folders(in_tmp / "train", CLASSES)
    config = divided(in_tmp)
    monkeypatch.setattr(contents, "is_conclusive", lambda *_: True)
    prepare.run(config)
    monkeypatch.setattr(contents, "_file_digest", None)
    prepare.run(config, quick=True)


def test_copies_on_both_sides_are_warned_of(in_tmp, capsys):
    write_folders(in_tmp / "train", {"cat": 10})
    for path in sorted((in_tmp / "train/cat").iterdir()):
        path.write_bytes((in_tmp / "train/cat/000.png").read_bytes())
    prepare.run(divided(in_tmp))
    assert "val: warning: 1 of its images are training images too" in capsys.readouterr().out


def test_classes_of_one_image_each_are_refused(in_tmp):
    write_folders(in_tmp / "train", {"cat": 1, "dog": 1})
    with pytest.raises(PipelineError, match="no images for validation"):
        prepare.run(divided(in_tmp), dry_run=True)


def test_dry_run_tells_both_sides_and_writes_nothing(in_tmp, capsys):
    write_folders(in_tmp / "train", CLASSES)
    prepare.run(divided(in_tmp), dry_run=True)
    said = capsys.readouterr().out
    assert "train: 14 images of 4 classes" in said and "val: 4 images of 4 classes" in said
    assert not (in_tmp / "work").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"val": "x"}, "data.val must be empty"),
        ({"source": "digits"}, "data.val_fraction must be 0"),
        ({"source": "shards"}, "data.val_fraction must be 0"),
    ],
)
def test_a_fraction_for_data_with_a_split_of_its_own_is_refused(data, said):
    with pytest.raises(UsageError, match=said):
        resolve({"data": {"train": "a", "val_fraction": 0.1} | data}, (), "test")


@given(NAMES, FRACTIONS, st.randoms())
def test_the_order_of_names_does_not_matter(names, fraction, random):
    shuffled = random.sample(names, len(names))
    assert chosen_for_validation(names, [0] * len(names), 3, fraction) == (
        chosen_for_validation(shuffled, [0] * len(names), 3, fraction)
    )


@given(NAMES, FRACTIONS)
def test_an_added_image_moves_at_most_one_other_and_none_of_another_class(names, fraction):
    labels = [0] * len(names)
    before = chosen_for_validation([*names, "b", "c"], [*labels, 1, 1], 3, fraction)
    after = chosen_for_validation([*names, "new.png", "b", "c"], [*labels, 0, 1, 1], 3, fraction)
    moved = (before ^ after) - {"new.png"}
    assert len(moved) <= 1 and moved <= set(names)


@given(NAMES, FRACTIONS)
def test_both_sides_have_an_image_of_each_class_of_two(names, fraction):
    chosen = chosen_for_validation(names, [0] * len(names), 3, fraction)
    assert (len(names) < 2 and not chosen) or 0 < len(chosen) < len(names)
