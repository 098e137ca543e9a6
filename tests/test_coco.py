"""Annotations in COCO's format as a table of images."""

import json

import pytest
from test_tables import found, images, refusal, table_config

from pipeline.cli.find_data import find_data
from pipeline.shards.coco import coco_rows
from stages import prepare

ANIMALS = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]


def write_coco(path, rows, categories=ANIMALS, **changes):
    numbers = {category.get("name"): category["id"] for category in ANIMALS}
    files = [{"id": 10 + number, "file_name": file} for number, (file, _) in enumerate(rows)]
    labels = [{"image_id": 10 + number, "category_id": numbers[label]} for number, (_, label) in enumerate(rows)]
    path.write_text(json.dumps({"images": files, "annotations": labels[::-1], "categories": categories} | changes))
    return path


def split_files(root) -> dict[str, list[tuple[str, str]]]:
    rows = images(root)
    split = {"train": rows[::2], "val": rows[1::2]}
    for name, part in split.items():
        write_coco(root / f"{name}.json", part)
    return split


def test_every_image_is_in_the_index_of_its_file_under_its_category(in_tmp):
    split = split_files(in_tmp)
    config = table_config(in_tmp, "train.json", "val.json")
    prepare.run(config)
    for name, rows in split.items():
        assert found(config, name) == {file.rpartition(".")[0]: label for file, label in rows}


def test_init_takes_such_a_file_for_a_table(in_tmp):
    write_coco(in_tmp / "train.json", images(in_tmp))
    data = find_data(in_tmp / "train.json")
    assert data.source == "table" and data.val_fraction > 0


@pytest.mark.parametrize("categories", [[{"id": 0}, {"id": 1}], [{"id": 0, "name": "x"}, {"id": 1, "name": "x"}]])
def test_without_names_of_their_own_categories_are_named_by_their_ids(in_tmp, categories):
    entries = [{"image_id": number, "category_id": number} for number in (1, 0)]
    content = [{"id": 0, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
    file = write_coco(in_tmp / "a.json", [], categories, images=content, annotations=entries)
    assert coco_rows(file) == [{"file_name": "b.jpg", "label": "category1"}, {"file_name": "a.jpg", "label": "category0"}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": []}, "(images/cat/0.png) has 0 annotations, not one"),
        ({"annotations": [{"image_id": 9, "category_id": 1}]}, "has 0 annotations"),
        ({"images": [], "annotations": [{"image_id": 9, "category_id": 1}]}, "image 9 (not in images) has 1 annotations"),
        ({"annotations": [{"image_id": 10, "category_id": 0}]}, "category_id 0, which is not in categories"),
        ({"annotations": [{"image_id": 10}]}, "without its id, file_name, image_id or category_id: 'category_id'"),
        ({"annotations": [{"image_id": [], "category_id": 1}]}, "an entry without"),
        ({"annotations": [{"image_id": 10, "category_id": 1}, {"image_id": 10, "category_id": 3}]}, "has 2 annotations"),
        ({"images": [{"id": 10, "file_name": "a.png"}, {"id": 10, "file_name": "b.png"}]}, "two images with the same id"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "two categories with the same id"),
        ({"categories": ["cat"]}, "an entry without"),
        ({"categories": None}, "not a JSON object with the lists images, annotations, categories"),
    ],
)
def test_a_file_that_pairs_no_image_with_one_label_is_refused(in_tmp, changes, said):
    write_coco(in_tmp / "train.json", [("images/cat/0.png", "cat")], **changes)
    assert said in refusal(table_config(in_tmp, "train.json", data__val_fraction=0.5))


def test_a_missing_image_is_named(in_tmp):
    write_coco(in_tmp / "train.json", [*images(in_tmp), ("images/cat/lost.png", "cat")])
    assert "images/cat/lost.png" in refusal(table_config(in_tmp, "train.json", data__val_fraction=0.5))


def test_json_of_another_shape_is_refused(in_tmp):
    (in_tmp / "train.json").write_text("[1]")
    assert "not a JSON object with the lists" in refusal(table_config(in_tmp, "train.json", data__val_fraction=0.5))
