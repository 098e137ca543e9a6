"""Tables of images: paths, labels and splits from CSV, TSV, JSON Lines and Parquet."""

import json
import random

import pytest
from conftest import picture, small_config, write_folders

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import index_path
from pipeline.shards import contents
from pipeline.shards.index import Index
from pipeline.shards.listing import number_classes
from pipeline.shards.sources import list_splits
from stages import prepare

COUNTS = {"cat": 5, "dog": 4}


def table_config(root, train="train.csv", val="", **changes):
    return small_config(root, data__source="table", data__train=str(root / train), data__val=val and str(root / val), **changes)


def images(root, counts=COUNTS) -> list[tuple[str, str]]:
    """Write images below `root`: (path, class name) of each."""
    write_folders(root / "images", counts)
    return [(path.relative_to(root).as_posix(), path.parent.name) for path in sorted((root / "images").rglob("*.*"))]


def write_table(path, rows: list[tuple], columns=("path", "label", "split")):
    records = [dict(zip(columns, row, strict=False)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), path)
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        lines = [comma.join(map(str, values)) for values in ([*records[0]], *(record.values() for record in records))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def split_rows(root) -> list[tuple[str, str, str]]:
    return [(*row, "train" if number % 3 else "val") for number, row in enumerate(images(root))]


def found(config, split) -> dict[str, str]:
    """Class name by key in an index."""
    index = Index(index_path(config, split))
    rows = [row for shard in range(len(index.names)) for row in index.rows(shard)]
    return {row["key"].decode(): index.classes[row["label"]] for row in rows}


def refusal(config, kind=PipelineError) -> str:
    with pytest.raises(kind) as caught:
        prepare.run(config, dry_run=True)
    assert "do:" in str(caught.value) and "expected:" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_row_is_in_the_index_of_its_split_under_its_class(in_tmp, kind):
    rows = split_rows(in_tmp)
    write_table(in_tmp / f"all.{kind}", rows)
    config = table_config(in_tmp, f"all.{kind}")
    prepare.run(config)
    for split in ("train", "val"):
        expected = {path.rpartition(".")[0]: label for path, label, of in rows if of == split}
        assert found(config, split) == expected and expected


def test_images_and_index_are_those_of_class_folders(in_tmp):
    for name in ("train", "val"):
        rows = images(in_tmp / name)
        write_table(in_tmp / name / "images/list.csv", [(path.removeprefix("images/"), label) for path, label in rows])
    config = table_config(in_tmp, "train/images/list.csv", "val/images/list.csv", name="table")
    prepare.run(config)
    folders = small_config(in_tmp, data__train=str(in_tmp / "train/images"), data__val=str(in_tmp / "val/images"))
    prepare.run(folders)
    for split in ("train", "val"):
        table, folder = (Index(index_path(each, split)) for each in (config, folders))
        assert table.fingerprint == folder.fingerprint


def test_the_order_of_rows_does_not_matter(in_tmp):
    rows = split_rows(in_tmp)
    fingerprints = set()
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        write_table(in_tmp / "train.csv", rows)
        prepare.run(table_config(in_tmp))
        fingerprints.add(Index(index_path(table_config(in_tmp), "train")).fingerprint)
    assert len(fingerprints) == 1


def test_paths_are_relative_to_the_table_or_absolute(in_tmp):
    rows = [(str(in_tmp / path), label, split) for path, label, split in split_rows(in_tmp)]
    (in_tmp / "lists").mkdir()
    write_table(in_tmp / "train.csv", rows)
    write_table(in_tmp / "lists/train.csv", [(f"../{path[len(str(in_tmp)) + 1:]}", *rest) for path, *rest in rows])
    near, far = (list_splits(table_config(in_tmp, name).data)["train"] for name in ("train.csv", "lists/train.csv"))
    assert near.root == in_tmp and far.root == in_tmp / "images"
    assert [near.root / name for name in near.names] == [far.root / name for name in far.names]


def test_a_changed_label_is_another_index(in_tmp):
    rows = split_rows(in_tmp)
    write_table(in_tmp / "train.csv", rows)
    prepare.run(table_config(in_tmp))
    before = Index(index_path(table_config(in_tmp), "train"))
    rows[1] = (rows[1][0], "dog", rows[1][2])
    write_table(in_tmp / "train.csv", rows)
    prepare.run(table_config(in_tmp), quick=True)
    after = Index(index_path(table_config(in_tmp), "train"))
    assert after.fingerprint != before.fingerprint and after.location != before.location


def test_quick_run_reads_no_image_and_a_replaced_image_is_noticed(in_tmp, monkeypatch):
    rows = split_rows(in_tmp)
    write_table(in_tmp / "train.csv", rows)
    config = table_config(in_tmp)
    monkeypatch.setattr(contents, "is_conclusive", lambda *_: True)
    prepare.run(config)
    before = Index(index_path(config, "train")).fingerprint
    with monkeypatch.context() as context:
        context.setattr(contents, "_file_digest", None)
        prepare.run(config, quick=True)
    (in_tmp / rows[1][0]).write_bytes(picture(77))
    prepare.run(config, quick=True)
    assert Index(index_path(config, "train")).fingerprint != before


def test_rows_of_other_splits_are_left_out_and_counted(in_tmp, capsys):
    rows = [(path, label, ("train", "val", "test")[i % 3]) for i, (path, label) in enumerate(images(in_tmp))]
    write_table(in_tmp / "train.csv", rows)
    prepare.run(table_config(in_tmp), dry_run=True)
    said = capsys.readouterr().out
    assert "train: 3 images of 2 classes" in said and "val: 3 images" in said
    assert said.count("left out: 3 rows of split test") == 1


def test_test_rows_are_for_validation_if_there_are_no_others(in_tmp):
    rows = [(path, label, ("train", "TEST")[i % 2]) for i, (path, label) in enumerate(images(in_tmp))]
    write_table(in_tmp / "train.csv", rows)
    assert len(list_splits(table_config(in_tmp).data)["val"].names) == 4


def test_a_part_of_the_training_rows_is_for_validation(in_tmp):
    write_table(in_tmp / "train.csv", images(in_tmp))
    splits = list_splits(table_config(in_tmp, data__val_fraction=0.25).data)
    assert [len(splits[split].names) for split in ("train", "val")] == [7, 2]
    assert not {*splits["train"].names} & {*splits["val"].names}


def test_hugging_face_s_metadata_is_a_table(in_tmp):
    for split in ("train", "validation"):
        rows = images(in_tmp / split)
        write_table(in_tmp / split / "metadata.jsonl", rows, ("file_name", "label"))
    splits = list_splits(table_config(in_tmp, "train/metadata.jsonl", "validation/metadata.jsonl").data)
    assert len(splits["val"].names) == 9 and splits["val"].classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["b", "a", "B"], {"B": 0, "a": 1, "b": 2}),
        (["10", *map(str, range(10))], {str(n): n for n in range(11)}),
        (["1", "0", "x"], {"0": 0, "1": 1, "x": 2}),
        (["007", "7"], {"007": 0, "7": 1}),
    ],
)
def test_names_are_numbered_in_order_and_numbers_stay(labels, numbers):
    found = number_classes("table", labels)
    assert found == numbers and [*found] == [*numbers]


@pytest.mark.parametrize("labels", [["1", "2"], ["0", "2"], ["0", "999999999999"]])
def test_numbers_with_gaps_are_refused(labels):
    with pytest.raises(PipelineError, match="all numbers from 0"):
        number_classes("table", labels)


BAD = {
    "no column": ([("images/cat/000.png", "cat")], ("image", "label"), "columns path"),
    "no label": ([("images/cat/000.png", "")], ("path", "label"), "row 1"),
    "no file": ([("images/cat/absent.png", "cat")], ("path", "label"), "no such file"),
    "a NUL": ([("images/\0.png", "cat")], ("path", "label"), "train.csv"),
    "twice": ([("images/cat/000.png", "cat"), ("./images/cat/000.png", "dog")], ("path", "label"), "in several rows"),
    "another split": ([("images/cat/000.png", "cat", "trian")], ("path", "label", "split"), "'trian'"),
    "no split in a row": (
        [("images/cat/000.png", "cat", "train"), ("images/cat/001.jpg", "cat", "")], ("path", "label", "split"), "split",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "said"), BAD.values(), ids=BAD)
def test_a_bad_table_is_named_with_its_row(in_tmp, rows, columns, said):
    images(in_tmp)
    write_table(in_tmp / "train.csv", rows, columns)
    message = refusal(table_config(in_tmp, data__val_fraction=0.5))
    assert "train.csv" in message and said in message


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b'path,label\n"a', b""])
def test_a_file_that_is_no_table_is_refused(in_tmp, text):
    (in_tmp / "train.csv").write_bytes(text)
    with pytest.raises(PipelineError, match="train.csv"):
        prepare.run(table_config(in_tmp, data__val_fraction=0.5), dry_run=True)


@pytest.mark.parametrize("text", ["[1]\n", "{\n", '{"path": "a", "label": 1.5}\n', '{"path": "a", "label": true}\n'])
def test_bad_json_lines_are_refused(in_tmp, text):
    (in_tmp / "train.jsonl").write_text(text)
    assert "train.jsonl" in refusal(table_config(in_tmp, "train.jsonl", data__val_fraction=0.5))


@pytest.mark.parametrize("damage", [b"none", b"PAR1"])
def test_a_damaged_parquet_file_is_refused(in_tmp, damage):
    pytest.importorskip("pyarrow")
    (in_tmp / "train.parquet").write_bytes(damage)
    assert "train.parquet" in refusal(table_config(in_tmp, "train.parquet", data__val_fraction=0.5))


def test_a_label_with_a_comma_needs_quotes(in_tmp):
    (path, *_), *_ = images(in_tmp)
    (in_tmp / "train.csv").write_text(f'path,label\n{path},"crane, bird"\n{path},crane, machine\n')
    said = refusal(table_config(in_tmp, "train.csv", data__val_fraction=0.5))
    assert "line 3: more values than columns" in said and "double quotes" in said


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_two_columns_of_one_name_are_refused(in_tmp, kind):
    separator = {"csv": ",", "tsv": "\t"}[kind]
    lines = [("path", "label", "label"), *((path, label, "other") for path, label in images(in_tmp))]
    (in_tmp / f"train.{kind}").write_text("\n".join(map(separator.join, lines)))
    assert "column 'label' twice" in refusal(table_config(in_tmp, f"train.{kind}", data__val_fraction=0.5))


def test_the_same_table_for_both_splits_is_refused(in_tmp):
    write_table(in_tmp / "train.csv", images(in_tmp))
    assert "in several rows" in refusal(table_config(in_tmp, val="train.csv"))


def test_a_class_of_validation_alone_is_refused(in_tmp):
    rows = images(in_tmp)
    write_table(in_tmp / "train.csv", rows[:5])
    write_table(in_tmp / "val.csv", rows[5:])
    assert "not in training: ['dog']" in refusal(table_config(in_tmp, val="val.csv"))


def test_no_images_for_validation_is_said(in_tmp):
    write_table(in_tmp / "train.csv", images(in_tmp))
    message = refusal(table_config(in_tmp), UsageError)
    assert "no images for validation" in message and "9 without a split" in message


@pytest.mark.parametrize("name", ["absent.csv", "images"])
def test_what_is_no_table_is_refused(in_tmp, name):
    images(in_tmp)
    assert "data.train" in refusal(table_config(in_tmp, name), UsageError)


def test_a_refused_image_is_named_by_its_file(in_tmp):
    rows = split_rows(in_tmp)
    (in_tmp / rows[1][0]).write_bytes(b"none")
    write_table(in_tmp / "train.csv", rows)
    with pytest.raises(PipelineError, match=str(in_tmp / rows[1][0])):
        prepare.run(table_config(in_tmp))
