"""Data sets of torchvision by name, in the formats in which they are downloaded."""

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, small_config, write_folders
from PIL import Image
from torchvision import datasets as torchvision_sets

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import resolve
from pipeline.config.paths import index_path
from pipeline.shards.datasets import TorchvisionImages
from pipeline.shards.index import Index
from pipeline.shards.sources import list_splits
from stages import prepare

CLASSES = [f"class {n}" for n in range(10)]
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
LABELS = [n * 7 % 10 for n in range(30)]


def write_cifar(root: Path, monkeypatch) -> Path:
    """CIFAR10 of 20 training images in two batches and 10 test images, and the checksums that torchvision checks."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, first: int) -> list[str]:
        rows = slice(first, first + 10)
        return write(name, {"data": PIXELS[rows].transpose(0, 3, 1, 2).reshape(10, -1), "labels": LABELS[rows]})

    kind = torchvision_sets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [batch("data_batch_1", 0), batch("data_batch_2", 10)])
    monkeypatch.setattr(kind, "test_list", [batch("test_batch", 20)])
    name, md5 = write("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


def write_food(root: Path) -> dict[str, dict[str, tuple[bytes, str]]]:
    """Food101 of two classes; returns bytes and class name by split and key."""
    expected: dict[str, dict[str, tuple[bytes, str]]] = {}
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        listed: dict[str, list[str]] = {"waffles": [], "apple_pie": []}
        for name in listed:
            (root / "food-101/images" / name).mkdir(parents=True, exist_ok=True)
            for n in numbers:
                image = picture(n + 10 * (name == "waffles"), "jpg")
                (root / f"food-101/images/{name}/{n}.jpg").write_bytes(image)
                listed[name].append(f"{name}/{n}")
                expected.setdefault(split, {})[f"food-101/images/{name}/{n}"] = (image, name)
        (root / "food-101/meta").mkdir(exist_ok=True)
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(listed))
    return expected


def write_pets(root: Path):
    (root / "oxford-iiit-pet/images").mkdir(parents=True)
    (root / "oxford-iiit-pet/annotations").mkdir()
    names = ["Abyssinian_1", "beagle_1", "Abyssinian_2", "beagle_2"]
    for n, name in enumerate(names):
        (root / f"oxford-iiit-pet/images/{name}.jpg").write_bytes(picture(n, "jpg"))
    for split, part in (("trainval", names[:2]), ("test", names[2:])):
        lines = [f"{name} {2 if name.startswith('beagle') else 1} 1 1\n" for name in part]
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text("".join(lines))


def dataset_config(root: Path, name: str, **changes):
    changes = {"data__val": "", "data__source": "torchvision", "data__dataset": name, "data__train": str(root)} | changes
    return small_config(root.parent, **changes)


def samples(config, split: str) -> dict[str, tuple[bytes, str]]:
    index = Index(index_path(config, split))
    return {
        row["key"].decode(): (index.read(shard, position), index.classes[row["label"]])
        for shard in range(len(index.names))
        for position, row in enumerate(index.rows(shard))
    }


def refusal(config, kind: type[Exception] = PipelineError) -> str:
    with pytest.raises(kind) as caught:
        prepare.run(config, dry_run=True)
    assert "do:" in str(caught.value) and "expected:" in str(caught.value)
    return str(caught.value)


def test_arrays_are_stored_losslessly_under_their_own_label(in_tmp, monkeypatch):
    config = dataset_config(write_cifar(in_tmp / "data", monkeypatch), "CIFAR10")
    prepare.run(config)
    for split, first, count in (("train", 0, 20), ("val", 20, 10)):
        found = samples(config, split)
        assert len(found) == count
        for n in range(count):
            image, name = found[f"{n:06d}"]
            assert np.array_equal(np.array(Image.open(io.BytesIO(image))), PIXELS[first + n])
            assert name == CLASSES[LABELS[first + n]]


def test_quick_run_reads_no_image(in_tmp, monkeypatch):
    config = dataset_config(write_cifar(in_tmp / "data", monkeypatch), "CIFAR10")
    monkeypatch.setattr("pipeline.shards.contents.is_conclusive", lambda *_: True)
    prepare.run(config)
    monkeypatch.setattr(TorchvisionImages, "images", None)
    prepare.run(config, quick=True)


def test_a_part_of_each_class_is_for_validation(in_tmp, monkeypatch):
    config = dataset_config(write_cifar(in_tmp / "data", monkeypatch), "CIFAR10", data__val_fraction=0.5)
    prepare.run(config)
    train, val = samples(config, "train"), samples(config, "val")
    assert (len(train), len(val)) == (10, 10) and not train.keys() & val.keys()
    assert all(name == CLASSES[LABELS[int(key)]] for key, (_, name) in (train | val).items())


def test_image_files_are_stored_as_they_are(in_tmp):
    expected = write_food(in_tmp / "data")
    config = dataset_config(in_tmp / "data", "Food101")
    prepare.run(config)
    assert samples(config, "train") == expected["train"] and samples(config, "val") == expected["test"]


def test_image_files_of_a_set_without_a_loader_are_stored_as_they_are(in_tmp):
    write_pets(in_tmp / "data")
    config = dataset_config(in_tmp / "data", "OxfordIIITPet")
    prepare.run(config)
    found = samples(config, "train") | samples(config, "val")
    assert {image for image, _ in found.values()} == {picture(n, "jpg") for n in range(4)}
    assert all(name.lower() == key.rpartition("/")[2][:-2].lower() for key, (_, name) in found.items())


def test_a_set_without_splits_needs_a_fraction(in_tmp):
    write_folders(in_tmp / "data", {"cat": 4, "dog": 4})
    assert "set data.val_fraction" in refusal(dataset_config(in_tmp / "data", "ImageFolder"), UsageError)
    splits = list_splits(dataset_config(in_tmp / "data", "ImageFolder", data__val_fraction=0.25).data)
    assert [len(listing.names) for listing in splits.values()] == [6, 2] and splits["val"].classes == ["cat", "dog"]


def test_a_set_that_is_not_there_is_not_downloaded_unless_asked(in_tmp, monkeypatch):
    monkeypatch.setattr(torchvision_sets.CIFAR10, "download", lambda self: write_cifar(in_tmp / "data", monkeypatch))
    (in_tmp / "data").mkdir()
    assert "data.download: true" in refusal(dataset_config(in_tmp / "data", "CIFAR10"))
    config = dataset_config(in_tmp / "data", "CIFAR10", data__download=True)
    assert "run: pipeline prepare" in refusal(config)
    prepare.run(config)
    assert len(samples(config, "train")) == 20
    monkeypatch.setattr(torchvision_sets.CIFAR10, "download", None)
    prepare.run(config)


def test_a_damaged_set_is_refused(in_tmp, monkeypatch):
    config = dataset_config(write_cifar(in_tmp / "data", monkeypatch), "CIFAR10")
    (in_tmp / "data/cifar-10-batches-py/test_batch").write_bytes(b"")
    assert "CIFAR10" in refusal(config)


def test_labels_in_another_order_than_images_are_refused(in_tmp, monkeypatch):
    config = dataset_config(write_cifar(in_tmp / "data", monkeypatch), "CIFAR10")
    item = torchvision_sets.CIFAR10.__getitem__
    monkeypatch.setattr(torchvision_sets.CIFAR10, "__getitem__", lambda self, n: (item(self, n)[0], 1))
    with pytest.raises(PipelineError, match="an image of class 0"):
        prepare.run(config)


@pytest.mark.parametrize("name", ["Cifar10", "FakeData", "EMNIST", "VisionDataset", "wrap_dataset_for_transforms_v2"])
def test_what_is_no_data_set_of_images_and_labels_is_refused(in_tmp, name):
    assert "data." in refusal(dataset_config(in_tmp / "data", name), PipelineError)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"source": "torchvision"}, "data.dataset must be the name"),
        ({"dataset": "CIFAR10"}, "data.dataset must be empty"),
        ({"download": True}, "data.download must be false"),
        ({"source": "torchvision", "dataset": "CIFAR10", "val": "x"}, "data.val must be empty"),
    ],
)
def test_keys_that_conflict_are_refused(data, said):
    with pytest.raises(UsageError, match=said):
        resolve({"data": {"train": "a"} | data}, (), "test")
