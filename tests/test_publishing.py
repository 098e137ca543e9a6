"""`pipeline store publish` and `pipeline store fetch`: what arrives is what was published, or is refused by name."""

import contextlib
import errno
import inspect
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import picture, tree
from hypothesis import given
from hypothesis import strategies as st
from test_ensemble import several, sources  # noqa: F401  (fixture)
from test_store_commands import call, flip, the_store
from test_training import CPU, loaded
from test_unlabelled import trainable

from pipeline.common.errors import NotReady, PipelineError
from pipeline.common.files import is_local
from pipeline.common.wording import size_of
from pipeline.config.params import dump, resolve
from pipeline.config.paths import index_path, student_folder, teacher_folder
from pipeline.config.store_spec import store_spec
from pipeline.config.validation import fingerprint
from pipeline.shards.index import Index
from pipeline.shards.published import open_index
from pipeline.store.packs import array_bytes, build_pack, pack_bytes, parse_array, parse_pack, read_arrays, shard_ranges
from pipeline.store.publication import parse, to_json
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter
from stages import needed, prepare, teacher, teacher_logits, train_student

KINDS = ("argmax", "topk", "dense8", "dense", "sampled")
ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(scope="module")
def labs(taught_template, tmp_path_factory) -> Path:
    """Two folders and what the `first` has `published`: `second` has the same images, prepared independently."""
    root = tmp_path_factory.mktemp("labs")
    shutil.copytree(taught_template, root / "first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root / "first")
        config = loaded()
        call("store", "publish", "../published")
        (root / "second").mkdir()
        shutil.copytree(config.data.train, root / "second/pictures", copy_function=shutil.copy)
        shutil.copytree(config.data.val, root / "second/held-out", copy_function=shutil.copy)
        monkeypatch.chdir(root / "second")
        values = config.model_dump(mode="json", by_alias=True)
        values["data"] |= {"train": "pictures", "val": "held-out"}
        Path("params.yaml").write_text(dump(resolve(values, (), "test")))
        prepare.run(loaded())
    return root


@pytest.fixture
def lab(labs, tmp_path, monkeypatch) -> Path:
    """What the first lab has published; the current folder is the second's."""
    root = tmp_path / "labs"
    shutil.copytree(labs, root)
    monkeypatch.chdir(root / "second")
    return root / "published"


def test_a_student_of_a_fetched_store_has_the_weights_of_the_first_labs_without_a_teacher(lab, monkeypatch):
    call("store", "fetch", str(lab))
    train_student.run(loaded(), CPU, "hard")
    here = student_folder(loaded(), "hard") / "weights.safetensors"
    second, found = Path.cwd(), here.read_bytes()
    assert not (teacher_folder(loaded()) / "weights.safetensors").exists()
    monkeypatch.chdir(lab.parent / "first")
    train_student.run(loaded(), CPU, "hard")
    assert here.read_bytes() == found
    assert tree(Path("work/stores")) == tree(second / "work/stores")
    manifest = Path("outputs/small/teacher-logits/manifest.json")
    assert manifest.read_bytes() == (second / manifest).read_bytes()


def test_a_store_that_was_fetched_from_elsewhere_is_not_used(lab):
    call("store", "fetch", str(lab))
    there = "teacher_logits.fetch=elsewhere"
    with pytest.raises(NotReady, match=f"(?s)one fetched from elsewhere.*one fetched from {lab}.*pipeline teacher-logits"):
        train_student.run(loaded(there), CPU, "hard")
    assert "one fetched from elsewhere" in call("store", "publish", "../again", "--set", there, code=1)


def test_a_store_computed_here_is_not_taken_for_a_fetched_one(lab, monkeypatch):
    monkeypatch.chdir(lab.parent / "first")
    with pytest.raises(NotReady, match="one computed locally"):
        train_student.run(loaded(f"teacher_logits.fetch={lab}"), CPU, "hard")


def test_predictions_of_another_teacher_than_the_configured_one_are_not_published(lab, monkeypatch):
    monkeypatch.chdir(lab.parent / "first")
    assert "teacher of another configuration" in call("store", "publish", "../again", "--set", "teacher.mean=[0.1, 0.2, 0.3]", code=1)
    store = json.loads(Path("outputs/small/teacher-logits/manifest.json").read_text())["fingerprint"]
    named = "--store", f"work/stores/{store}.zarr"
    assert "would be written" in call("store", "publish", "../again", "--set", "teacher.mean=[0.1, 0.2, 0.3]", "--dry-run", *named)


@pytest.mark.slow
def test_stages_with_fetch_configured_need_no_teacher(lab):
    config = loaded(f"teacher_logits.fetch={lab}", "students=[hard, none]", "finetune.from=[]")
    Path("params.yaml").write_text(dump(config))
    needed.run(config)
    assert json.loads(Path("outputs/small/needed.json").read_text())["train-student"] == {"fetch": str(lab)}
    assert "not needed" in call("teacher", "--if-needed", "--device", "cpu")
    assert "store complete" in call("teacher-logits", "--if-needed", "--device", "cpu")
    assert "teacher-logits" in call("status")
    call("train-student", "--device", "cpu")
    call("evaluate", "--device", "cpu")
    assert f"published at {lab}" in Path("outputs/small/evaluation/report.html").read_text()
    assert "hard" in Path("outputs/small/evaluation/table.txt").read_text()


def test_the_shards_of_a_folder_are_the_same_images_where_they_are_used_in_place(taught):
    indices = {split: Index(index_path(taught, split)) for split in ("train", "val")}
    places = [f"data.{split}={index.location}/*.tar" for split, index in indices.items()]
    config = loaded("data.source=shards", "name=in-place", *places)
    prepare.run(config)
    found = Index(index_path(config, "train"))
    assert found.fingerprint == indices["train"].fingerprint and found.classes == ["0", "1", "2"]
    shutil.copytree("outputs/small/teacher", "outputs/in-place/teacher")
    before = tree(Path("work/stores"))
    teacher_logits.run(config, CPU)  # the teacher's class names are unknown here, its store is complete
    assert tree(Path("work/stores")) == before


def test_fetching_says_which_key_makes_later_commands_need_no_teacher(lab):
    said = call("store", "fetch", str(lab))
    assert f"set teacher_logits.fetch: {lab} in params.yaml" in said


@pytest.mark.parametrize("name", ["2024", "null"])
def test_a_folder_whose_name_is_a_word_of_yaml_is_fetched(lab, name):
    lab.rename(name)
    call("store", "fetch", name)
    assert json.loads(Path("outputs/small/teacher-logits/summary.json").read_text())["fetched"] == name


def test_a_dry_run_of_fetching_writes_nothing(lab):
    before = tree(Path())
    assert "images x" in call("teacher-logits", "--dry-run", "--set", f"teacher_logits.fetch={lab}", "--device", "cpu")
    assert tree(Path()) == before


def test_an_archive_has_the_same_bytes_each_time_and_is_fetched(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab.parent / "first")
    for name in ("a.tar", "b.tar"):
        call("store", "publish", str(tmp_path / name))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    monkeypatch.chdir(lab.parent / "second")
    call("store", "fetch", str(tmp_path / "a.tar"))
    assert "every checksum as recorded" in call("store", "verify")


def test_nothing_published_names_a_place(lab):
    tmp_path = lab.parent.parent
    for path in lab.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_arrives_as_it_was_published(kind, taught, tmp_path):
    config = loaded(f"teacher_logits.kind={kind}", "teacher_logits.top_k=2", "students=[hard]")
    shutil.rmtree("work/stores")
    teacher_logits.run(config, CPU)
    Path("params.yaml").write_text(dump(config))
    before = tree(the_store())
    call("store", "publish", str(tmp_path / "published"))
    shutil.rmtree("work/stores")
    other = ("--set", "teacher_logits.top_k=3")
    said = call("store", "fetch", str(tmp_path / "published"), *other)
    assert ("top_k 3: 2 classes per view are published and used" in said) == (kind == "topk")
    assert "augmented views of 20 training images" in " ".join((tmp_path / "published/README.md").read_text().split())
    assert tree(the_store()) == before


def test_argmax_is_fetched_from_a_store_of_another_kind(lab):
    Path("params.yaml").write_text(dump(loaded("teacher_logits.kind=argmax", "students=[hard]")))
    call("store", "fetch", str(lab))
    assert not (the_store() / "dense").exists()
    assert "every checksum as recorded" in call("store", "verify")


def test_publishing_more_views_adds_packs_and_rewrites_only_the_manifest(taught, tmp_path):
    target = tmp_path / "published"
    Path("params.yaml").write_text(dump(loaded("teacher_logits.views=4")))
    teacher_logits.run(loaded(), CPU)
    call("store", "publish", str(target))
    before = {path: path.stat() for path in target.rglob("*") if path.is_file()}
    Path("params.yaml").write_text(dump(loaded("teacher_logits.views=8")))
    teacher_logits.run(loaded(), CPU)
    call("store", "publish", str(target))
    changed = [path.name for path, status in before.items() if path.stat().st_mtime_ns != status.st_mtime_ns]
    assert changed == ["manifest.json"]
    assert len(list(target.rglob("*.tar"))) == 2 * len([path for path in before if path.suffix == ".tar"])


def test_fewer_views_than_published_are_fetched(lab):
    Path("params.yaml").write_text(dump(loaded("teacher_logits.views=4")))
    call("store", "fetch", str(lab))
    assert json.loads(Path("outputs/small/teacher-logits/manifest.json").read_text())["views"] == 4


def test_more_views_than_published_are_refused(lab):
    Path("params.yaml").write_text(dump(loaded("teacher_logits.views=12")))
    assert "8 per image" in call("store", "fetch", str(lab), code=2)


def test_another_kind_than_published_is_refused(lab):
    Path("params.yaml").write_text(dump(loaded("teacher_logits.kind=topk")))
    assert "its kind" in call("store", "fetch", str(lab), code=2)


def test_another_recipe_is_refused_by_its_setting(lab):
    Path("params.yaml").write_text(dump(loaded("recipe.hflip=0.25")))
    assert "recipe.hflip: 0.5, 0.25" in call("store", "fetch", str(lab), code=2)


def test_a_recompressed_image_is_refused_by_its_sample(lab):
    image = next(Path("pictures/dog").glob("*.png"))
    image.write_bytes(picture(7))
    prepare.run(loaded())
    said = call("store", "fetch", str(lab), code=2)
    assert f"dog/{image.stem}" in said and "here" in said


def test_a_renamed_class_is_refused_by_its_first_sample(lab):
    Path("pictures/eel").rename("pictures/fish")
    Path("held-out/eel").rename("held-out/fish")
    prepare.run(loaded())
    said = call("store", "fetch", str(lab), code=2)
    assert "fish/" in said or "eel/" in said


def test_a_missing_image_is_refused_by_its_shard(lab):
    next(Path("pictures/dog").glob("*.png")).unlink()
    prepare.run(loaded())
    assert "its images" in call("store", "fetch", str(lab), code=2)


def test_a_flipped_bit_anywhere_in_what_is_fetched_is_found(lab):
    chance = random.Random(0)
    files = [path for path in sorted(lab.rglob("*")) if path.is_file() and path.suffix in (".tar", ".json")]
    for path in files:
        whole = path.read_bytes()
        flip(path, chance)
        shutil.rmtree("work/stores", ignore_errors=True)
        said = call("store", "fetch", str(lab), code=1)
        assert path.name in said
        path.write_bytes(whole)


@pytest.mark.slow
def test_a_flipped_bit_in_an_archive_is_found(lab, tmp_path, monkeypatch):
    chance = random.Random(1)
    monkeypatch.chdir(lab.parent / "first")
    call("store", "publish", str(tmp_path / "a.tar"))
    monkeypatch.chdir(lab.parent / "second")
    whole = (tmp_path / "a.tar").read_bytes()
    for _ in range(20):
        (tmp_path / "a.tar").write_bytes(whole)
        flip(tmp_path / "a.tar", chance)
        shutil.rmtree("work/stores", ignore_errors=True)
        try:
            teacher_logits.run(loaded(f"teacher_logits.fetch={tmp_path / 'a.tar'}"), CPU)
        except PipelineError:
            continue
        assert "every checksum as recorded" in call("store", "verify")  # padding, or the card


def test_a_pack_that_is_missing_is_named(lab):
    pack = next(lab.rglob("*.tar"))
    pack.unlink()
    assert pack.name in call("store", "fetch", str(lab), code=1)


def test_what_was_fetched_is_not_fetched_again(lab):
    call("store", "fetch", str(lab))
    units = sorted(the_store().glob("argmax/c/*/*"))
    before = {path: path.stat().st_mtime_ns for path in units}
    units[0].unlink()
    call("store", "fetch", str(lab))
    assert [path for path in units if path.stat().st_mtime_ns != before[path]] == [units[0]]


def test_damage_here_is_replaced_by_fetching(lab):
    call("store", "fetch", str(lab))
    before = tree(the_store())
    flip(next(iter(the_store().glob("argmax/c/*/*"))), random.Random(0))
    call("store", "fetch", str(lab))
    assert tree(the_store()) == before


def test_predictions_of_another_origin_are_not_taken_for_the_published_ones(lab, tmp_path):
    call("store", "fetch", str(lab))
    manifest = lab / "manifest.json"
    published = parse(manifest.read_bytes())
    other = {kind: {name: ["0" * 16 for _ in hashes] for name, hashes in units.items()}
             for kind, units in published.units.items()}  # fmt: skip
    manifest.write_bytes(to_json(published.model_copy(update={"units": other})))
    assert "computed locally, or are damaged" in call("store", "fetch", str(lab), code=1)


def signed(content: dict) -> bytes:
    """A manifest of any content, with the checksum that belongs to it."""
    return json.dumps(content | {"digest": fingerprint(content)}).encode()


def unsigned(manifest: Path) -> dict:
    return {key: value for key, value in json.loads(manifest.read_bytes()).items() if key != "digest"}


HOSTILE = {
    "no views": lambda m: m.update(views=0),
    "views that are no blocks": lambda m: m.update(views=m["views"] + 1),
    "more views than units": lambda m: m.update(views=m["views"] * 10**12),
    "views as text": lambda m: m.update(views="8"),
    "a shard without a name": lambda m: m["shards"][0].pop("name"),
    "a shard of -1 samples": lambda m: m["shards"][0].update(samples=-1),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "no units of its kind": lambda m: m["units"].pop(m["kind"]),
    "units of another shard": lambda m: m["units"]["argmax"].update(other=[]),
    "a block too many": lambda m: next(iter(m["units"]["argmax"].values())).append("0" * 16),
    "a pack of a block that is not there": lambda m: m["packs"][0].update(block=99),
    "a pack of shards that are not there": lambda m: m["packs"][0].update(last=10**30),
    "a pack of a shard before the first": lambda m: m["packs"][0].update(first=-1),
    "a pack of another kind": lambda m: m["packs"][0].update(array="check"),
    "a file above the folder": lambda m: m["packs"][0].update(name="../../secret"),
    "a file by its full path": lambda m: m["packs"][0].update(name="/etc/passwd"),
    "a file at a URL": lambda m: m["packs"][0].update(name="http://localhost/a.tar"),
    "no table of samples": lambda m: m.update(files=m["files"][1:]),
    "another width": lambda m: m.update(width=m["width"] - 1),
    "another kind": lambda m: m.update(kind="sparse"),
    "another teacher": lambda m: m["teacher"].update(weights="0" * 32),
    "a teacher that is a list": lambda m: m.update(teacher=[]),
    "a recipe with a hole": lambda m: m["recipe_settings"].update(block=0),
    "no list of packs": lambda m: m.pop("packs"),
    "a further key": lambda m: m.update(more=1),
    "a later format": lambda m: m.update(format=2),
    "numbers for classes": lambda m: m.update(classes=[1, 2, 3]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_with_a_valid_checksum_and_impossible_values_is_refused(change, labs):
    content = unsigned(labs / "published/manifest.json")
    parse(signed(content))
    change(content)
    with pytest.raises(ValueError):
        parse(signed(content))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"1", b"\xff", b"[" * 100_000, b'{"digest": 1}', b'{"a": NaN}'], ids=len)
def test_a_file_that_is_no_manifest_is_refused(data):
    with pytest.raises(ValueError):
        parse(data)


def test_packs_of_another_block_are_refused_before_anything_is_committed(lab):
    content = unsigned(lab / "manifest.json")
    for array in ("argmax", content["kind"]):
        first, second = ({**pack} for pack in content["packs"] if pack["array"] == array)
        for pack, other in ((first, second), (second, first)):
            place = next(p for p in content["packs"] if (p["array"], p["block"]) == (array, pack["block"]))
            place.update(name=other["name"], bytes=other["bytes"], sha256=other["sha256"])
    (lab / "manifest.json").write_bytes(signed(content))
    assert "predictions that are not those of this unit" in call("store", "fetch", str(lab), code=1)
    assert not list(Path("work/stores").rglob("argmax/c/*/*"))


def test_a_class_that_does_not_exist_is_refused(taught, tmp_path):
    store = opened_for_writing(taught)
    unit = store.units(4)[0]
    checks = store.read_check(unit)[:, : store.groups]
    predictions = {"argmax": store.read_unit(unit) * 0 + 7, "dense": read_arrays(store, unit, "dense")["dense"]}
    store.write_unit(unit, predictions, checks)
    call("store", "publish", str(tmp_path / "published"))
    shutil.rmtree("work/stores")
    assert "a class that is not one of the 3" in call("store", "fetch", str(tmp_path / "published"), code=1)


def test_an_argmax_computed_here_is_not_replaced_where_another_kind_is_fetched(taught, tmp_path):
    call("store", "publish", str(tmp_path / "published"))
    store = opened_for_writing(taught)
    unit = store.units(4)[0]
    checks, dense = store.read_check(unit)[:, : store.groups], read_arrays(store, unit, "dense")["dense"]
    store.write_unit(unit, {"argmax": (store.read_unit(unit) + 1) % 3, "dense": dense}, checks)
    store.remove_unit(unit, ("dense",))
    before = tree(the_store())
    assert "computed locally, or are damaged" in call("store", "fetch", str(tmp_path / "published"), code=1)
    assert tree(the_store()) == before


def opened_for_writing(config) -> StoreWriter:
    index, spec = open_index(config, "train"), store_spec(config, "train-student")
    store = Store.open(str(the_store()), index, spec.recipe)
    identity = StoreIdentity(index.fingerprint, spec.recipe, store.attributes["teacher"])
    return StoreWriter.create(str(the_store()), identity, index, spec.views, spec.kind, spec.k, spec.precision)


def test_another_number_of_classes_is_named(lab):
    content = unsigned(lab / "manifest.json")
    content.update(classes=[*content["classes"], "unicorn"], width=content["width"] + 1)
    (lab / "manifest.json").write_bytes(signed(content))
    assert "published 4 classes, here 3" in call("store", "fetch", str(lab), code=2)


def test_an_interrupted_fetch_goes_on_with_what_is_missing(lab, monkeypatch):
    write, written = StoreWriter.write_unit, []

    def interrupted(self, unit, *arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(unit)
        write(self, unit, *arguments)

    config = loaded(f"teacher_logits.fetch={lab}")
    monkeypatch.setattr(StoreWriter, "write_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        teacher_logits.run(config, CPU)
    monkeypatch.setattr(StoreWriter, "write_unit", lambda self, *a: (written.append(a[0]), write(self, *a)))
    teacher_logits.run(config, CPU)
    assert len(written) == len(set(written)) == 8
    assert tree(the_store()) == tree(the_store(lab.parent / "first"))


@pytest.mark.slow
def test_a_store_of_an_ensemble_is_published_with_its_accuracy_and_fetched(taught, sources, tmp_path):  # noqa: F811
    shutil.rmtree("work/stores")
    config = several()
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    Path("params.yaml").write_text(dump(config))
    before, target = tree(the_store()), tmp_path / "published"
    call("store", "publish", str(target))
    metrics = json.loads((teacher_folder(config) / "metrics.json").read_text())
    assert parse((target / "manifest.json").read_bytes()).teacher_metrics["top1"] == metrics["top1"]
    assert '"ensemble"' in (target / "README.md").read_text()
    shutil.rmtree("work/stores")
    Path("params.yaml").write_text(dump(config.model_copy(update={"teacher": loaded().teacher})))
    call("store", "fetch", str(target))
    assert tree(the_store()) == before


@pytest.mark.slow
def test_a_store_of_images_without_labels_is_published_and_fetched(in_tmp):
    config = trainable(in_tmp, [0, -1, 1, -1, 1, 0], "unlabelled", unlabelled=True)
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    Path("params.yaml").write_text(dump(config))
    before = tree(the_store())
    call("store", "publish", "published")
    shutil.rmtree("work/stores")
    call("store", "fetch", "published")
    assert tree(the_store()) == before


@pytest.mark.slow
def test_where_only_the_second_store_needs_a_teacher_it_is_made_and_the_first_one_is_fetched(lab):
    config = loaded(f"teacher_logits.fetch={lab}", "students=[hard]", "finetune.from=[hard]")
    Path("params.yaml").write_text(dump(config))
    needed.run(config)
    found = json.loads(Path("outputs/small/needed.json").read_text())
    assert found == {"train-student": {"fetch": str(lab)}, "finetune": True}
    for command in ("teacher", "teacher-logits"):
        call(command, "--if-needed", "--device", "cpu")
    for command in ("teacher", "teacher-logits"):
        call(command, "--for", "finetune", "--if-needed", "--device", "cpu")
    for command in ("train-student", "finetune", "evaluate"):
        call(command, "--device", "cpu")
    assert "0 stores" in call("prune")
    assert "hard-finetuned" in Path("outputs/small/evaluation/table.txt").read_text()


def test_a_full_disk_while_publishing_leaves_no_manifest_and_the_next_call_ends(taught, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for target in ("published", "published.tar"):
            patch.setattr(tarfile.TarFile, "addfile", full)
            assert "No space left" in call("store", "publish", str(tmp_path / target), code=1)
    assert not (tmp_path / "published/manifest.json").exists() and not list(tmp_path.glob("*.tar"))
    call("store", "publish", str(tmp_path / "published"))
    assert (tmp_path / "published/manifest.json").exists()


def test_a_dry_run_of_publishing_tells_the_bytes_and_writes_nothing(taught, tmp_path):
    target = tmp_path / "published"
    said = call("store", "publish", str(target), "--dry-run")
    assert not target.exists()
    text = f"fetch it: pipeline store fetch {target}, or set teacher_logits.fetch: {target}"
    assert text in call("store", "publish", str(target))
    size = sum(path.stat().st_size for path in target.rglob("*.tar"))
    assert f"4 packs of predictions, {size_of(size)}\n" in said
    said = call("store", "publish", str(target), "--dry-run")
    assert "0 packs of predictions, 0 B; 4 packs from an earlier call are kept" in said


@pytest.mark.parametrize("name", ["published.tar", "published"])
def test_what_is_no_published_store_is_not_overwritten(name, taught, tmp_path):
    file = tmp_path / name if name.endswith(".tar") else tmp_path / name / "manifest.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"years of work")
    assert "something else is here" in call("store", "publish", str(tmp_path / name), code=2)
    assert file.read_bytes() == b"years of work"


def test_another_store_is_not_published_over_an_archive(lab, tmp_path, monkeypatch):
    target = tmp_path / "a.tar"
    monkeypatch.chdir(lab.parent / "first")
    call("store", "publish", str(target))
    before = target.read_bytes()
    Path("params.yaml").write_text(dump(loaded("teacher_logits.kind=argmax", "students=[hard]")))
    assert "another store is published here" in call("store", "publish", str(target), code=2)
    assert target.read_bytes() == before


def test_a_header_that_claims_a_huge_array_allocates_nothing():
    data = array_bytes(np.zeros((2, 3), np.uint16))
    huge = data.replace(b"(2, 3), }            ", b"(2000000000000, 3), }")
    assert len(huge) == len(data) and huge != data
    with pytest.raises(ValueError, match="bytes of"):
        parse_array(huge)


def test_another_store_is_not_published_into_the_same_folder(taught, tmp_path):
    target = tmp_path / "published"
    call("store", "publish", str(target))
    before = tree(target)
    config = loaded("teacher.seed=5")
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    assert "another store is published here" in call("store", "publish", str(target), "--set", "teacher.seed=5", code=2)
    assert tree(target) == before


def test_an_incomplete_store_is_not_published(taught, tmp_path):
    next(iter(the_store().glob("argmax/c/*/*"))).unlink()
    assert "incomplete" in call("store", "publish", str(tmp_path / "published"), code=1)
    assert not (tmp_path / "published/manifest.json").exists()


def test_nothing_at_the_source_is_said_plainly(taught, tmp_path):
    assert "no published store" in call("store", "fetch", str(tmp_path / "nowhere"), code=1)


def test_the_card_tells_teacher_recipe_and_use(lab):
    card = (lab / "README.md").read_text()
    for part in ("pipeline store fetch", "top-1", "`scale`", "20 in 4 shards, 3 classes", '"weights"'):
        assert part in card


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 400))
def test_ranges_hold_every_shard_once_and_keep_the_limit(samples, limit):
    ranges = shard_ranges(samples, 2, 3, limit)
    assert [shard for part in ranges for shard in part] == [*range(len(samples))]
    sizes = [sum(samples[shard] * 6 for shard in part) for part in ranges]
    assert all(
        size <= limit or sum(samples[s] > 0 for s in part) == 1 for size, part in zip(sizes, ranges, strict=True)
    )


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_a_pack_is_parsed_into_what_it_was_built_from(samples, block, seed):
    chance = np.random.default_rng(seed)
    argmax = chance.integers(0, 9, (block, samples)).astype(np.uint16)
    arrays = {3: {"check": chance.integers(0, 2**63, (block, 2)).astype(np.uint64), "argmax": argmax}}
    shapes = {3: {name: array.shape for name, array in arrays[3].items()}}
    found = parse_pack(build_pack(arrays), shapes)
    assert len(build_pack(arrays)) == pack_bytes(shapes)
    assert all((found[3][name] == array).all() for name, array in arrays[3].items())


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_a_damaged_pack_is_refused_or_is_of_the_expected_shape(garbage, at):
    arrays = {0: {"check": np.zeros((2, 1), np.uint64), "argmax": np.ones((2, 3), np.uint16)}}
    shapes = {0: {"check": (2, 1), "argmax": (2, 3)}}
    data = build_pack(arrays)
    try:
        found = parse_pack(data[:at] + garbage + data[at + len(garbage) :], shapes)
    except ValueError:
        return
    assert found[0]["argmax"].shape == (2, 3)


class RangeHandler(SimpleHTTPRequestHandler):
    """Answers requests for a part of a file, as web servers do."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = asked.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self.wfile.write(data[start : end + 1])

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


@contextlib.contextmanager
def serving(folder: Path, handler: type[SimpleHTTPRequestHandler] = SimpleHTTPRequestHandler) -> Iterator[str]:
    """The URL of a folder on a local HTTP server."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("localhost", 0), partial(quiet, directory=str(folder)))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has read enough
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def served(lab):
    """The URL of the published folder on a local HTTP server."""
    with serving(lab) as url:
        yield url


def test_a_store_is_fetched_over_http(served):
    call("store", "fetch", served)
    assert "every checksum as recorded" in call("store", "verify")


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
def test_an_archive_at_a_url_is_fetched_where_the_server_gives_parts_of_files(ranges, lab, monkeypatch):
    monkeypatch.chdir(lab.parent / "first")
    call("store", "publish", str(lab / "store.tar"))
    with tarfile.open(lab / "store.tar", "a") as tar:  # larger than what is read at once
        more = tarfile.TarInfo("more")
        more.size = 12 * 2**20
        tar.addfile(more, io.BytesIO(bytes(more.size)))
    monkeypatch.chdir(lab.parent / "second")
    with serving(lab, RangeHandler if ranges else SimpleHTTPRequestHandler) as url:
        if ranges:
            call("store", "fetch", f"{url}/store.tar")
            assert "every checksum as recorded" in call("store", "verify")
        else:
            assert "download the archive" in call("store", "fetch", f"{url}/store.tar", code=1)


def test_the_hub_s_file_system_has_the_functions_that_publishing_and_fetching_call():
    """Without the network: neither an upload nor a download is tried."""
    hub = pytest.importorskip("huggingface_hub").HfFileSystem
    filesystem, root = fsspec.core.url_to_fs("hf://datasets/user/name/store")
    assert isinstance(filesystem, hub) and root == "datasets/user/name/store" and not is_local(filesystem)
    for name, arguments in {"cat_file": 1, "info": 1, "pipe_file": 2, "put_file": 2}.items():
        inspect.signature(getattr(hub, name)).bind(filesystem, *["x"] * arguments)


def killed_until_done(*arguments: str, chance: random.Random) -> int:
    """Run a command again and again, killing it after a random time, until it ends by itself; how often it was killed."""
    environment, seconds = os.environ | {"PYTHONPATH": str(ROOT)}, 3.0
    for kills in itertools.count():
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.wait(chance.uniform(0.3, 1.0) * seconds) == 0
            return kills
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            seconds *= 1.3  # on a busy machine it may take much longer
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("target", ["killed", "killed.tar"])
def test_publishing_killed_at_random_moments_ends_with_the_same_bytes(target, lab, monkeypatch):
    monkeypatch.chdir(lab.parent / "first")
    whole, chance, kills = Path(target.replace("killed", "whole")), random.Random(0), 0
    call("store", "publish", str(whole))
    while kills < KILLS:
        kills += killed_until_done("store", "publish", target, chance=chance)
        if target.endswith(".tar"):
            assert Path(target).read_bytes() == whole.read_bytes()
            Path(target).unlink()
        else:
            found = {path: data for path, data in tree(Path(target)).items() if not path.endswith(".partial")}
            assert found == tree(whole)
            shutil.rmtree(target)


@pytest.mark.slow
def test_fetching_killed_at_random_moments_ends_with_the_published_store(lab):
    chance, kills, published = random.Random(1), 0, tree(the_store(lab.parent / "first"))
    while kills < KILLS:
        kills += killed_until_done("store", "fetch", str(lab), chance=chance)
        assert tree(the_store()) == published
        shutil.rmtree("work/stores")
        shutil.rmtree("outputs/small/teacher-logits")


@pytest.mark.parametrize("name", ["README.md", "samples.npy", "thesis.txt"])
def test_a_folder_with_other_files_is_left_alone(name, taught, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("mine\n")
    said = call("store", "publish", str(folder), code=2)
    assert "something else is here" in said and name in said
    assert "something else is here" in call("store", "publish", "--dry-run", str(folder), code=2)
    assert [path.name for path in folder.iterdir()] == [name]
