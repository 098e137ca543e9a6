"""Parquet files with images in them, as on the Hugging Face Hub."""

import json
from pathlib import Path

import pytest
from conftest import picture, small_config

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import index_path
from pipeline.shards import containers, splits
from pipeline.shards.index import Index
from pipeline.shards.parquet import ParquetImages
from pipeline.shards.sources import list_splits
from stages import prepare

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "eel"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, seeds: list[int], labels: list | None = None, names: list[str] | None = NAMES, **columns):
    """Images by their seeds, labelled seed mod 3, with the metadata that `datasets` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(seed, ("png", "jpg")[seed % 2]), "path": f"{seed}.png"} for seed in seeds]
    arrays = {"image": pa.array(images, IMAGE), "label": pa.array([n % 3 for n in seeds] if labels is None else labels)}
    table = pa.table(arrays | columns)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)


def parquet_config(root, train="data/train-*.parquet", val="data/validation-*.parquet", **changes):
    return small_config(root, data__source="parquet", data__train=str(root / train), data__val=val and str(root / val),
                        **changes)  # fmt: skip


@pytest.fixture
def data(in_tmp):
    for number in range(2):
        write_parquet(in_tmp / f"data/train-{number:05d}-of-00002.parquet", list(range(10 * number, 10 * number + 8)))
    write_parquet(in_tmp / "data/validation-00000-of-00001.parquet", [30, 31, 32, 33])
    return in_tmp


def index_of(config, split="train") -> Index:
    return Index(index_path(config, split))


def samples(index: Index) -> dict[str, tuple[bytes, str]]:
    return {
        row["key"].decode(): (index.read(shard, position), index.classes[row["label"]])
        for shard in range(len(index.names))
        for position, row in enumerate(index.rows(shard))
    }


def refusal(config, kind=PipelineError) -> str:
    with pytest.raises(kind) as caught:
        prepare.run(config, dry_run=True)
    assert "do:" in str(caught.value) and "expected:" in str(caught.value)
    return str(caught.value)


def test_every_image_is_in_the_index_with_its_own_label(data):
    config = parquet_config(data)
    prepare.run(config)
    expected = {
        f"train-{file:05d}-of-00002/{row:06d}": (picture(seed, ("png", "jpg")[seed % 2]), NAMES[seed % 3])
        for file in range(2)
        for row, seed in enumerate(range(10 * file, 10 * file + 8))
    }
    assert samples(index_of(config)) == expected
    assert index_of(config, "val").classes == NAMES and len(index_of(config, "val")) == 4
    assert not list(data.rglob("*.partial"))


def test_a_shard_that_is_missing_is_written_again_alone(data):
    config = parquet_config(data)
    prepare.run(config)
    index = index_of(config)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(index.location).glob("*.tar")}
    first = Path(index.location) / index.names[0]
    first.unlink()
    prepare.run(config)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(index.location).glob("*.tar")}
    assert {name for name in before if before[name][0] != after[name][0]} == {first.name}
    assert {name: data for name, (_, data) in before.items()} == {name: data for name, (_, data) in after.items()}


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(data):
    found = []
    for workers in (1, 2):
        config = parquet_config(data, name=f"of{workers}", work=str(data / f"work{workers}"), data__workers=workers)
        prepare.run(config)
        found.append((index_of(config).fingerprint, samples(index_of(config))))
    assert found[0] == found[1]


def test_what_a_killed_run_unpacked_is_removed(data):
    config = parquet_config(data)
    prepare.run(config)
    root = Path(index_of(config).location)
    (root / ".images.0000.partial").write_bytes(b"")
    (root / index_of(config).names[0]).unlink()
    prepare.run(config)
    assert not list(data.rglob("*.partial"))


def test_quick_run_reads_no_image_and_a_replaced_file_is_noticed(data, monkeypatch):
    config = parquet_config(data)
    monkeypatch.setattr("pipeline.shards.contents.is_conclusive", lambda *_: True)
    prepare.run(config)
    before = index_of(config).fingerprint
    with monkeypatch.context() as context:
        context.setattr(ParquetImages, "images", None)
        prepare.run(config, quick=True)
    write_parquet(data / "data/train-00000-of-00002.parquet", list(range(1, 9)))
    prepare.run(config, quick=True)
    assert index_of(config).fingerprint != before


def test_a_file_that_changes_while_shards_are_written_is_noticed(data, monkeypatch):
    config, digests = parquet_config(data), containers.container_digests

    def read_then_change(container, *arguments):
        found = digests(container, *arguments)
        write_parquet(data / "data/train-00000-of-00002.parquet", list(range(1, 9)))
        return found

    monkeypatch.setattr(splits, "container_digests", read_then_change)
    with pytest.raises(PipelineError, match="the bytes that it had when prepare started"):
        prepare.run(config)
    assert not list(data.rglob("*.partial"))


def test_a_file_of_fewer_rows_than_listed_is_noticed(data, monkeypatch):
    listings = list_splits(parquet_config(data).data)
    write_parquet(data / "data/train-00000-of-00002.parquet", [0, 1])
    container = listings["train"].container
    assert container is not None
    with pytest.raises(PipelineError, match="files that have changed since"):
        list(container.selected(set(listings["train"].names), "read"))


def test_a_part_of_each_class_is_for_validation(data):
    config = parquet_config(data, val="", data__val_fraction=0.25)
    prepare.run(config)
    train, val = samples(index_of(config)), samples(index_of(config, "val"))
    assert len(train) + len(val) == 16 and not train.keys() & val.keys()
    assert sorted(name for _, name in val.values()) == ["cat", "dog", "dog", "eel"]
    assert all(image == picture(n, ("png", "jpg")[n % 2]) and name == NAMES[n % 3]
               for key, (image, name) in (train | val).items()
               for n in [int(key[6:11]) * 10 + int(key[-6:])])  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "classes"), [(["b", "a", "B"], ["B", "a", "b"]), ([0, 2, 1], ["0", "1", "2"])], ids=["names", "numbers"]
)
def test_without_metadata_labels_name_the_classes(in_tmp, labels, classes):
    for split in ("train", "validation"):
        write_parquet(in_tmp / f"data/{split}-0.parquet", [0, 1, 2] if split == "train" else [3, 4, 5], labels, None)
    found = list_splits(parquet_config(in_tmp).data)["train"]
    assert found.classes == classes and [found.classes[n] for n in found.labels] == list(map(str, labels))


def test_images_that_are_plain_bytes_are_read(in_tmp):
    table = pa.table({"img": pa.array([picture(n) for n in range(4)]), "fine_label": [0, 1, 0, 1]})
    pq.write_table(table, in_tmp / "all.parquet")
    config = parquet_config(in_tmp, "all.parquet", "", data__val_fraction=0.5)
    prepare.run(config)
    images = {image for image, _ in (samples(index_of(config)) | samples(index_of(config, "val"))).values()}
    assert images == {picture(n) for n in range(4)}


def test_dry_run_reads_no_image(data, monkeypatch, capsys):
    monkeypatch.setattr(ParquetImages, "images", None)
    prepare.run(parquet_config(data), dry_run=True)
    assert "train: 16 images of 3 classes in 3 shards" in capsys.readouterr().out


def test_an_image_that_does_not_decode_is_named_by_its_file_and_row(data):
    broken = pa.table({"image": pa.array([{"bytes": b"none", "path": ""}], IMAGE), "label": [1]})
    pq.write_table(broken.replace_schema_metadata(pq.read_schema(data / "data/train-00000-of-00002.parquet").metadata),
                   data / "data/train-00002-of-00002.parquet")  # fmt: skip
    with pytest.raises(PipelineError, match="image train-00002-of-00002/000000"):
        prepare.run(parquet_config(data))


def test_an_image_that_is_not_embedded_is_named(in_tmp):
    table = pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}] * 2, IMAGE), "label": [0, 0]})
    pq.write_table(table, in_tmp / "all.parquet")
    with pytest.raises(PipelineError, match="all.parquet: row 0"):
        prepare.run(parquet_config(in_tmp, "all.parquet", "", data__val_fraction=0.5))


@pytest.mark.parametrize(("labels", "said"), [([0, -1], "'-1'"), ([0, 3], "'3'"), ([0, None], "row 1"), ([0.5, 1], "row 0")])
def test_a_label_of_no_class_is_refused(data, labels, said):
    write_parquet(data / "data/validation-00000-of-00001.parquet", [30, 31], labels)
    message = refusal(parquet_config(data))
    assert "validation-00000-of-00001.parquet" in message and said in message


def test_unlabelled_images_are_no_class_of_their_own(in_tmp):
    write_parquet(in_tmp / "all.parquet", [0, 1, 2], [-1, 0, 1], None)
    assert "label -1" in refusal(parquet_config(in_tmp, "all.parquet", "", data__val_fraction=0.5))


def test_class_names_that_differ_are_refused(data):
    write_parquet(data / "data/validation-00000-of-00001.parquet", [30], names=["dog", "cat", "eel"])
    assert "class names" in refusal(parquet_config(data))


def test_columns_that_are_missing_are_named(data):
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), data / "data/train-00000-of-00002.parquet")
    config = parquet_config(data)
    with pytest.raises(PipelineError, match="class names"):
        list_splits(config.data)
    pq.write_table(pa.table({"image": [b""], "class": [0]}), data / "data/train-00000-of-00002.parquet")
    assert "one of label, labels, fine_label" in refusal(config)


@pytest.mark.parametrize(
    ("train", "val"),
    [("", "x-*.parquet"), ("absent.parquet", "x.parquet"), ("data/train-*.parquet", "data/train-00000-of-00002.parquet")],
)
def test_files_that_are_missing_or_in_both_splits_are_refused(data, train, val):
    assert "data." in refusal(parquet_config(data, train, val), UsageError)


def test_a_url_is_refused(in_tmp):
    config = small_config(in_tmp, data={"source": "parquet", "train": "s3://bucket/a.parquet", "val": "b"})
    assert "Parquet files on this machine" in refusal(config, UsageError)


def test_files_whose_names_give_equal_keys_are_refused(in_tmp):
    for name in ("a.b", "a_b"):
        write_parquet(in_tmp / f"data/{name}.parquet", [0, 1])
    assert "rename one of them" in refusal(parquet_config(in_tmp, "data/*.parquet", "", data__val_fraction=0.5))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_rows_is_refused(in_tmp, split):
    for name in ("train", "validation"):
        write_parquet(in_tmp / f"data/{name}-00000-of-00001.parquet", [] if name == split else [1, 2, 3])
    with pytest.raises(PipelineError, match=f"{split}-00000-of-00001.parquet: no rows"):
        prepare.run(parquet_config(in_tmp))
