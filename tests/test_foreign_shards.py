"""Shards as other tools write them: labels in JSON, class names and numbers of samples in files next to them."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import picture
from test_prepare import index_of, reading_anything, refusal, samples, shards_config, write_shards

from pipeline.common.errors import UsageError
from pipeline.config.params import load_config
from pipeline.shards import splits
from pipeline.shards.adjacent import read_class_names, read_sample_counts
from pipeline.shards.patterns import expand
from pipeline.shards.samples import Labels
from stages import prepare

ROOT = Path(__file__).parent.parent


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))


def img2dataset(path: Path, labels: list, number: int = 0, key: str = "label") -> None:
    """A shard as img2dataset writes it with save_additional_columns."""
    members = []
    for i, label in enumerate(labels):
        name = f"{number:05d}{i:04d}"
        content = {"url": "https://example.org/a.jpg", "caption": "a cat", "key": name, "status": "success",
                   "error_message": None, "width": 12, "height": 10, key: label}  # fmt: skip
        members += [
            (f"{name}.jpg", picture(100 * number + i, "jpg")),
            (f"{name}.json", json.dumps(content).encode()),
            (f"{name}.txt", b"a cat"),
        ]
    write_tar(path, members)


def prepared(config):
    prepare.run(config)
    return index_of(config)


def test_labels_are_read_from_a_field_of_the_json_that_img2dataset_writes(in_tmp):
    img2dataset(in_tmp / "in" / "train-0000.tar", [2, 0, "1", 1.0])
    img2dataset(in_tmp / "in" / "val-0000.tar", [0, 1], 1)
    index = prepared(shards_config(in_tmp, train="train-0000.tar", label_key="label"))
    assert [label for *_, label in samples(index)] == [2, 0, 1, 1]
    assert samples(index)[0] == ("000000000", picture(0, "jpg"), 2)
    assert index.classes == ["0", "1", "2"]


@pytest.mark.parametrize("label", ["cat", 1.5, True, [1], {}, 65535, -2, None, -1], ids=str)
def test_field_that_is_no_class_number_is_refused_with_its_sample(in_tmp, label):
    img2dataset(in_tmp / "in" / "train-0000.tar", [0, label])
    img2dataset(in_tmp / "in" / "val-0000.tar", [0])
    message = refusal(shards_config(in_tmp, train="train-0000.tar", label_key="label"))
    assert "'000000001'" in message and "'label' (data.label_key)" in message


@pytest.mark.parametrize("data", [b"", b"[1]", b"no json", b"[" * 100_000, b'{"a": 1}', b"\xff", b'"label"'], ids=len)
def test_json_without_the_field_holds_no_label(data):
    assert Labels("label").parse(data) in (None, -1)


def test_another_field_is_another_index_and_no_field_the_one_there_was(in_tmp):
    for split in ("train", "val"):
        members = [
            ("a.png", picture(len(split))), ("a.cls", b"1"), ("a.json", json.dumps({"coarse": 0, "fine": 2}).encode())
        ]  # fmt: skip
        write_tar(in_tmp / "in" / f"{split}-0000.tar", members)
    config = shards_config(in_tmp, train="train-0000.tar")
    found = {}
    for key in ("", "coarse", "fine", ""):
        changed = config.model_copy(update={"data": config.data.model_copy(update={"label_key": key})})
        found[key] = samples(prepared(changed))[0][2]
    assert found == {"": 1, "coarse": 0, "fine": 2}


def test_folder_of_an_index_is_named_as_before_there_was_a_label_key(in_tmp):
    write_shards(in_tmp / "in", [2])
    write_shards(in_tmp / "in", [2], "val")
    config = shards_config(in_tmp, train="train-0000.tar")
    paths = [f"{in_tmp}/in/train-0000.tar"]
    expected = splits.fingerprint([paths, config.data.max_pixels])
    prepare.run(config)
    assert [path.parent.parent.name for path in in_tmp.rglob("work/data/*/train/index.json")] == [expected]


@pytest.mark.parametrize("key", ["label_key", "class_names"])
def test_keys_for_shards_are_refused_for_other_sources(in_tmp, key):
    with pytest.raises(UsageError, match=f"data.{key} must be empty unless data.source is shards"):
        shards_config(in_tmp, source="folder", **{key: "label"})


# class names

NAMES = ["tench", "goldfish", "great white shark"]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(NAMES),
        "\r\n".join(NAMES) + "\r\n",
        json.dumps(NAMES),
        json.dumps({name: number for number, name in reversed(list(enumerate(NAMES)))}),
        json.dumps({str(number): name for number, name in reversed(list(enumerate(NAMES)))}),
    ],
    ids=["lines", "lines of Windows", "list", "name: number", "number: name"],
)
def test_class_names_are_read_in_the_order_of_their_numbers(in_tmp, text):
    Path("names").write_bytes(text.encode())
    assert read_class_names("names") == NAMES


@pytest.mark.parametrize(
    "text",
    ["", "\n", "a\n\nb", "crane\ncat\ncrane", "[]", "[1]", "[", '{"a": 1, "b": 2}', '{"a": 0, "b": 0}', '{"a": "b"}',
     '{"0": 0.5}', "\xff"],
)
def test_file_that_does_not_name_every_class_is_refused(in_tmp, text):
    Path("names").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"data\.class_names: names\n"):
        read_class_names("names")


def test_classes_have_the_names_of_the_file_and_naming_them_decodes_nothing(in_tmp, monkeypatch):
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    prepare.run(shards_config(in_tmp))
    Path("names").write_text("\n".join([*NAMES, "tiger shark"]))
    monkeypatch.setattr(splits, "index_shard", reading_anything)
    config = shards_config(in_tmp, class_names="names")
    assert prepared(config).classes == index_of(config, "val").classes == [*NAMES, "tiger shark"]


def test_names_that_are_configured_no_more_do_not_decide_the_number_of_classes(in_tmp):
    write_shards(in_tmp / "in", [4, 3, 5])  # labels 0 to 2
    write_shards(in_tmp / "in", [3], "val")
    before = prepared(shards_config(in_tmp))
    Path("names").write_text("\n".join([*NAMES, "tiger shark", "hammerhead"]))
    assert len(prepared(shards_config(in_tmp, class_names="names")).classes) == 5
    after = prepared(shards_config(in_tmp))
    assert after.classes == before.classes == ["0", "1", "2"]
    assert after.fingerprint == before.fingerprint


def test_too_few_names_are_refused(in_tmp):
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    Path("names").write_text("a\nb\n")
    message = refusal(shards_config(in_tmp, class_names="names"))
    assert "a label below 2" in message and "correct data.class_names" in message


def test_missing_file_of_names_is_reported_in_the_dry_run(in_tmp):
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    with pytest.raises(UsageError, match=r"data\.class_names: none"):
        prepare.run(shards_config(in_tmp, class_names="none"), dry_run=True)


# numbers of samples, as in timm's _info.json


def info(**lengths: int) -> str:
    """The file of a data set whose shards of train and val have these lengths."""
    content = {
        split: {
            "name": split,
            "num_samples": sum(length for name, length in lengths.items() if name.startswith(split)),
            "filenames": [f"{name}.tar".replace("_", "-") for name in lengths if name.startswith(split)],
            "shard_lengths": [length for name, length in lengths.items() if name.startswith(split)],
        }
        for split in ("train", "val")
    }
    return json.dumps({"splits": content})


def test_timm_reads_the_file_as_it_is_read_here(in_tmp):
    from timm.data.readers.reader_wds import _load_info, _parse_split_info

    Path("_info.json").write_text(info(train_0000=4, train_0001=3, val_0000=3))
    split = _parse_split_info("train", _load_info(str(in_tmp)))
    counts = read_sample_counts(str(in_tmp))
    assert dict(zip(split.filenames, split.shard_lengths, strict=True)).items() < counts.items() and len(counts) == 3


def test_shard_of_another_number_of_samples_is_warned_of(in_tmp, capsys):
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    (in_tmp / "in" / "_info.json").write_text(info(train_0000=4, train_0001=9, train_0002=5, val_0000=3))
    prepare.run(shards_config(in_tmp))
    output = capsys.readouterr().out
    assert "train: warning: _info.json has a different number of samples for 1 of 3 shards: 9 for train-0001.tar, which has" in output
    assert "val: warning: _info" not in output


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"splits": 1}', '{"splits": {"a": {"filenames": [1]}}}', "\xff"])
def test_file_of_another_form_counts_nothing(in_tmp, text):
    Path("_info.json").write_bytes(text.encode("latin-1"))
    assert read_sample_counts(str(in_tmp)) == {}


@pytest.mark.slow
def test_the_configuration_of_the_public_imagenet_shards_reads_their_layout(in_tmp, capsys):
    preset = load_config(ROOT / "configs/imagenet-wds.yaml").data
    names = {split: expand(f"data.{split}", getattr(preset, split)) for split in ("train", "val")}
    assert [len(each) for each in names.values()] == [1024, 64]
    assert names["val"][-1] == "hf://datasets/timm/imagenet-1k-wds/imagenet1k-validation-63.tar"
    folder, splits = in_tmp / "in", {}
    for split, urls in names.items():
        files = [url.rpartition("/")[2] for url in urls[:2]]
        for number, name in enumerate(files):
            members = [(f"{split}{number}{i}", i) for i in range(3)]
            pairs = [((f"{key}.jpg", picture(9 * number + i, "jpg")), (f"{key}.cls", b"%d" % i)) for key, i in members]
            write_tar(folder / name, [file for pair in pairs for file in pair])
        splits[split] = {"name": split, "num_samples": 6, "filenames": files, "shard_lengths": [3, 3]}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    local = {f"data.{split}": f"{folder}/{urls[0].rpartition('/')[2][:-5]}*.tar" for split, urls in names.items()}
    config = load_config(ROOT / "configs/imagenet-wds.yaml", tuple(f"{key}={value}" for key, value in local.items()))
    index = prepared(config)
    assert index.names == ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"] and index.classes == ["0", "1", "2"]
    assert "_info.json" not in capsys.readouterr().out  # it agrees
