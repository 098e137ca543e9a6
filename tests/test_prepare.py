"""Preparation: every image once, in even shards, the same bytes anywhere; what is wrong is named."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import make_data_set, picture, small_config, tree, write_folders
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import dump, load_config
from pipeline.config.paths import index_path
from pipeline.shards import advice, build, contents, indexing, splits
from pipeline.shards.index import Index
from pipeline.shards.indexing import write_shard
from pipeline.shards.listing import sample_keys
from stages import prepare

ROOT = Path(__file__).parent.parent
TRAIN, VAL = {"cat": 7, "dog": 6, "eel": 4}, {"cat": 2, "dog": 1, "eel": 1}


def index_of(config, split="train") -> Index:
    return Index(index_path(config, split))


def samples(index: Index) -> list[tuple[str, bytes, int]]:
    return [
        (row["key"].decode(), index.read(shard, position), int(row["label"]))
        for shard in range(len(index.names))
        for position, row in enumerate(index.rows(shard))
    ]


def shards(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(root / "work").items() if name.endswith(".tar")}


def times(folder: Path) -> dict[str, int]:
    """Of all files but what is remembered of them, and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and not {path.name, path.parent.name} & {"seen", "preparing"})
    return {str(path): path.stat().st_mtime_ns for path in files}


def refusal(config, kind=PipelineError) -> str:
    with pytest.raises(kind) as caught:
        prepare.run(config)
    assert "do:" in str(caught.value)
    return str(caught.value)


def written(root: Path, train=TRAIN, val=VAL, **changes):
    """A configuration over fresh class folders, not yet prepared."""
    write_folders(root / "train", train)
    write_folders(root / "val", val, seed=1)
    return small_config(root, **changes)


# class folders


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_of_a_folder_is_in_the_index_once_under_its_class(in_tmp, split):
    config, _ = make_data_set(in_tmp, TRAIN, VAL)
    files = sorted((in_tmp / split).rglob("*.*"))
    expected = {(p.read_bytes(), p.parent.name) for p in files}
    index = index_of(config, split)
    found = [(image, index.classes[label]) for _, image, label in samples(index)]
    assert set(found) == expected and len(found) == len(files)
    assert index.classes == ["cat", "dog", "eel"]


def test_key_is_the_path_without_extension(in_tmp):
    _, index = make_data_set(in_tmp, {"cat": 2}, {"cat": 1})
    assert {key for key, *_ in samples(index)} == {"cat/000", "cat/001"}


@pytest.mark.parametrize(
    ("size", "expected"), [(6, [5, 6, 6]), (17, [17]), (100, [17]), (1, 17 * [1]), (16, [8, 9])]
)
def test_shards_are_of_even_size_and_at_most_as_large_as_asked(in_tmp, size, expected):
    _, index = make_data_set(in_tmp, TRAIN, VAL, data__shard_samples=size)
    assert sorted(index.samples.tolist()) == expected


def test_shards_mix_the_classes(in_tmp):
    _, index = make_data_set(in_tmp, {"cat": 40, "dog": 40}, {"cat": 1, "dog": 1}, data__shard_samples=20)
    assert all(3 < Counter(index.rows(shard)["label"].tolist())[0] < 17 for shard in range(4))


def test_images_in_folders_below_a_class_are_found_and_other_files_passed_over(in_tmp):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    (in_tmp / "train" / "cat" / "deep" / "er").mkdir(parents=True)
    (in_tmp / "train" / "cat" / "deep" / "er" / "x.JPEG").write_bytes(picture(5, "jpg"))
    (in_tmp / "train" / "cat" / "notes.txt").write_text("no image")
    (in_tmp / "train" / ".hidden").mkdir()
    (in_tmp / "train" / "readme.png").write_bytes(picture(6))
    prepare.run(config)
    assert {key for key, *_ in samples(index_of(config))} == {"cat/000", "cat/deep/er/x"}


def test_only_the_first_images_of_each_class_are_taken_for_a_trial(in_tmp):
    _, index = make_data_set(in_tmp, TRAIN, VAL, data__max_per_class=2)
    assert sorted(key for key, *_ in samples(index)) == [f"{c}/00{i}" for c in TRAIN for i in range(2)]


def test_same_images_make_the_same_shards_and_index_in_another_folder(in_tmp, monkeypatch):
    built = []
    for name in ("one", "other"):
        (in_tmp / name).mkdir()
        monkeypatch.chdir(in_tmp / name)
        _, index = make_data_set(in_tmp / name, TRAIN, VAL)
        built.append((shards(in_tmp / name), index.fingerprint))
    assert built[0] == built[1] and len(built[0][0]) == 4


def test_another_seed_orders_the_samples_otherwise(in_tmp, monkeypatch):
    orders = []
    for seed in (0, 1):
        (in_tmp / str(seed)).mkdir()
        monkeypatch.chdir(in_tmp / str(seed))
        _, index = make_data_set(in_tmp / str(seed), TRAIN, VAL, data__seed=seed)
        orders.append([key for key, *_ in samples(index)])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.slow
def test_number_of_processes_changes_no_byte(in_tmp, monkeypatch):
    built = []
    for workers in (1, 2):
        (in_tmp / str(workers)).mkdir()
        monkeypatch.chdir(in_tmp / str(workers))
        _, index = make_data_set(in_tmp / str(workers), TRAIN, VAL, data__workers=workers)
        built.append((shards(in_tmp / str(workers)), index.fingerprint))
    assert built[0] == built[1]


# running again


def test_second_run_writes_no_shard_and_no_table(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    before = times(in_tmp / "work")
    prepare.run(config)
    assert times(in_tmp / "work") == before
    assert index_of(config).fingerprint == index.fingerprint


def test_deleted_index_output_comes_back_without_writing_shards(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    before = times(in_tmp / "work")
    index_path(config, "train").unlink()
    prepare.run(config)
    assert times(in_tmp / "work") == before
    assert samples(index_of(config)) == samples(index)


def test_deleted_shard_alone_is_written_again(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    before, images = times(in_tmp / "work"), samples(index)
    gone = Path(index.location) / index.names[1]
    gone.unlink()
    prepare.run(config)
    after = times(in_tmp / "work")
    assert {path for path in after if path.endswith(".tar") and after[path] != before[path]} == {str(gone)}
    assert samples(index_of(config)) == images


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-3], lambda data: b"", lambda data: data[:-1] + b"\xff"],
    ids=["cut", "empty", "flipped"],
)
def test_damaged_table_is_made_again(in_tmp, damage):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    images, table = samples(index), Path(index.table)
    table.write_bytes(damage(table.read_bytes()))
    prepare.run(config)
    assert samples(index_of(config)) == images


def test_running_prepare_again_repairs_a_damaged_shard_as_its_message_says(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    images, path = samples(index), Path(index.location) / index.names[0]
    data, row = bytearray(path.read_bytes()), index.rows(0)[0]
    data[row["offset"] + row["size"] // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PipelineError) as caught:
        index_of(config).read(0, 0)
    assert "run: pipeline prepare" in str(caught.value)
    prepare.run(config)
    assert samples(index_of(config)) == images


def test_damaged_shard_is_not_indexed_as_if_it_were_whole(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    images, path = samples(index), Path(index.location) / index.names[0]
    # a jpg, which decodes all the same
    row = next(r for r in index.rows(0) if r["key"].decode().endswith(("1", "4")))
    data = bytearray(path.read_bytes())
    data[row["offset"] + row["size"] - 20] ^= 1
    path.write_bytes(data)
    (Path(index.location) / index.names[1]).unlink()  # so prepare has work to do
    try:
        prepare.run(config)
    except PipelineError as error:
        assert index.names[0] in str(error)
    else:
        assert samples(index_of(config)) == images


@pytest.mark.parametrize("change", ["more", "fewer", "renamed", "another size", "moved"])
def test_changed_folder_is_another_data_folder_and_leaves_the_old_one(in_tmp, change):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    before, cat = shards(in_tmp), in_tmp / "train" / "cat"
    match change:
        case "more":
            (cat / "new.png").write_bytes(picture(77))
        case "fewer":
            (cat / "000.png").unlink()
        case "renamed":
            (cat / "000.png").rename(cat / "another.png")
        case "another size":
            (cat / "000.png").write_bytes(picture(78, width=50))
        case "moved":
            (cat / "000.png").rename(in_tmp / "train" / "dog" / "moved.png")
    prepare.run(config)
    again = index_of(config)
    assert again.location != index.location and again.fingerprint != index.fingerprint
    assert before.items() < shards(in_tmp).items()


def replace_an_image(path: Path) -> None:
    """Another image with as many bytes in the place of a PNG; its times are kept."""
    plain, status = [], path.stat()
    for seed in (1, 2):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(seed))).save(buffer, "png", compress_level=0)
        plain.append(buffer.getvalue())
    assert len(plain[0]) == len(plain[1])
    path.write_bytes(plain[1] if path.read_bytes() == plain[0] else plain[0])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def later(monkeypatch):
    """The clock goes 10 s ahead: what was just written counts as settled."""
    ahead = SimpleNamespace(time=lambda: time.time() + 10)
    for module in (contents, indexing):
        monkeypatch.setattr(module, "time", ahead)


def reading_anything(*_):
    raise AssertionError("it was read")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_replaced_image_of_equal_size_and_time_is_noticed(in_tmp, later, split, quick):
    config = written(in_tmp)
    replace_an_image(in_tmp / split / "cat" / "000.png")
    prepare.run(config, quick=quick)
    before = index_of(config, split)
    replace_an_image(in_tmp / split / "cat" / "000.png")
    prepare.run(config, quick=quick)
    after = index_of(config, split)
    assert after.fingerprint != before.fingerprint and after.location != before.location
    assert (in_tmp / split / "cat" / "000.png").read_bytes() in {image for _, image, _ in samples(after)}


def test_quick_run_reads_no_image_and_no_shard_and_leaves_the_published_index(in_tmp, later, monkeypatch):
    config = written(in_tmp)
    prepare.run(config)
    prepare.run(config, quick=True)  # the shards were new
    before = times(in_tmp)
    for module, name in ((contents, "_file_digest"), (build, "shard_sha256"), (splits, "index_shard")):
        monkeypatch.setattr(module, name, reading_anything)
    prepare.run(config, quick=True)
    assert times(in_tmp) == before


def test_images_are_read_again_unless_it_shall_be_quick(in_tmp, later, monkeypatch):
    config = written(in_tmp)
    prepare.run(config)
    monkeypatch.setattr(contents, "_file_digest", reading_anything)
    with pytest.raises(AssertionError, match="it was read"):
        prepare.run(config)


def test_image_so_new_that_its_times_may_not_tell_is_read_again(in_tmp, monkeypatch):
    config = written(in_tmp)
    prepare.run(config)
    monkeypatch.setattr(contents, "_file_digest", reading_anything)
    with pytest.raises(AssertionError, match="it was read"):
        prepare.run(config, quick=True)


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("0", "1"), lambda text: "["])
def test_damaged_cache_of_digests_only_makes_images_read_again(in_tmp, later, damage):
    config = written(in_tmp)
    prepare.run(config)
    before = times(in_tmp)
    for cache in (in_tmp / "work/data/seen").iterdir():
        cache.write_text(damage(cache.read_text()))
    prepare.run(config, quick=True)
    assert times(in_tmp) == before


def test_image_that_changes_while_shards_are_written_is_named(in_tmp, monkeypatch):
    config = written(in_tmp)
    path, listed = in_tmp / "train" / "cat" / "000.png", splits.file_digests

    def read_then_change(*arguments):
        held = listed(*arguments)
        path.write_bytes(picture(99))
        return held

    monkeypatch.setattr(splits, "file_digests", read_then_change)
    assert f"{path}: the image" in refusal(config)


def test_another_validation_set_writes_no_training_shard_again(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    before = times(in_tmp / "work")
    write_folders(in_tmp / "other", VAL, seed=5)
    config = small_config(in_tmp, data__val=str(in_tmp / "other"))
    prepare.run(config)
    after = times(in_tmp / "work")
    assert {path for path in after if path not in before and "/train/" in path} == set()
    assert before.items() <= after.items()
    assert (index_of(config).location, index_of(config).fingerprint) == (index.location, index.fingerprint)


@pytest.mark.parametrize("changes", [{"data__max_bad": 3}, {"data__workers": 2}, {"data__max_per_class": 50}])
def test_what_changes_no_shard_writes_none_again(in_tmp, changes):
    make_data_set(in_tmp, TRAIN, VAL)
    before = times(in_tmp / "work")
    prepare.run(small_config(in_tmp, **changes))
    assert times(in_tmp / "work") == before


def test_fewer_bad_images_tolerated_than_an_index_has_are_refused(in_tmp):
    config = written(in_tmp, data__max_bad=1)
    (in_tmp / "train" / "cat" / "000.png").write_bytes(b"")
    prepare.run(config)
    assert "cat/000" in refusal(small_config(in_tmp))


def test_copy_of_work_and_outputs_reads_its_own_files(in_tmp, monkeypatch):
    _, index = make_data_set(in_tmp / "here", TRAIN, VAL)
    whole = samples(index)
    (in_tmp / "elsewhere").mkdir()
    for name in ("here", "outputs"):
        shutil.move(name, in_tmp / "elsewhere" / name)
    monkeypatch.chdir(in_tmp / "elsewhere")
    for path in ("outputs/small/data/train/index.json", next(Path("here/work").rglob("train/index.json"))):
        assert samples(Index(path)) == whole


def test_work_elsewhere_than_the_outputs_is_named_in_full(in_tmp, monkeypatch):
    (in_tmp / "project").mkdir()
    monkeypatch.chdir(in_tmp / "project")
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    (in_tmp / "moved").mkdir()
    shutil.move("outputs", in_tmp / "moved")
    monkeypatch.chdir(in_tmp / "moved")
    assert samples(index_of(config)) == samples(index)


def test_file_that_an_index_names_outside_the_work_folder_is_left_alone(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    whole, precious = samples(index), in_tmp / "precious" / index.names[0]
    precious.parent.mkdir()
    precious.write_bytes(b"not ours")
    path = Path(index.location) / "index.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"location": str(precious.parent)}))
    prepare.run(config)
    assert precious.read_bytes() == b"not ours"
    assert samples(index_of(config)) == whole and index_of(config).location == index.location


def test_partial_files_of_a_killed_run_are_swept_when_shards_are_written_again(in_tmp):
    config, index = make_data_set(in_tmp, TRAIN, VAL)
    Path(index.location, ".000000.tar.0123abcd.partial").write_bytes(b"half")
    Path(index.location, index.names[0]).unlink()
    prepare.run(config)
    assert not list(in_tmp.rglob("*.partial"))


def test_killed_worker_is_reported_in_one_message():
    with pytest.raises(PipelineError, match="out of memory") as caught, build.process_map(2) as map_tasks:
        list(map_tasks(os._exit, [9]))
    assert "data.workers" in str(caught.value)


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "from pipeline.shards.build import process_map; from test_prepare import pid_slowly\n"
        "if __name__ == '__main__':\n"
        "    with process_map(2) as map_tasks:\n"
        "        [print(pid, flush=True) for pid in map_tasks(pid_slowly, range(99))]"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    workers = {int(parent.stdout.readline()) for _ in range(4)}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def pid_slowly(_: int) -> int:
    time.sleep(0.3)
    return os.getpid()


@pytest.mark.slow
def test_dvc_notices_a_replaced_image_and_runs_nothing_more_where_none_was(in_tmp):
    config = written(in_tmp, work="work")
    replace_an_image(in_tmp / "train" / "cat" / "000.png")
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["prepare"] | {"deps": []}
    after = {"cmd": "echo begun >> after", "deps": ["outputs/${name}/data/train/index.json"]}
    dag = {"vars": ["params.yaml"], "stages": {"prepare": stage, "after": after}}
    Path("dvc.yaml").write_text(yaml.safe_dump(dag))
    Path("params.yaml").write_text(dump(config))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for command in ("init -q --no-scm", "repro -q", "repro -q"):
        subprocess.run(["dvc", *command.split()], env=environment, check=True)
    assert Path("after").read_text() == "begun\n"
    replace_an_image(in_tmp / "train" / "cat" / "000.png")
    subprocess.run(["dvc", "repro", "-q"], env=environment, check=True)
    assert Path("after").read_text() == "begun\nbegun\n"


def test_dry_run_says_what_it_would_write_and_writes_nothing(in_tmp, capsys):
    config = written(in_tmp)
    before = tree(in_tmp)
    prepare.run(config, dry_run=True)
    assert tree(in_tmp) == before
    assert "train: 17 images of 3 classes in 3 shards" in capsys.readouterr().out


# digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        config = small_config(root, data={"source": "digits", "shard_samples": 480})
        prepare.run(config)
        yield config, {s: Index(index_path(config, s).absolute()) for s in ("train", "val")}


def test_every_digit_is_in_one_split_once(digits):
    numbers = [int(key) for split in digits[1].values() for key, *_ in samples(split)]
    assert sorted(numbers) == list(range(1797))


def test_digits_have_their_true_labels(digits):
    from sklearn.datasets import load_digits

    truth = load_digits().target
    assert all(truth[int(key)] == label for split in digits[1].values() for key, _, label in samples(split))


def test_a_fifth_of_each_digit_is_for_validation(digits):
    train, val = (Counter(digits[1][split].labels().tolist()) for split in ("train", "val"))
    assert all(val[digit] == -(-(train[digit] + val[digit]) // 5) for digit in range(10))


def test_digits_are_cut_evenly(digits):
    assert sorted(digits[1]["train"].samples.tolist()) == [477, 478, 478]


# formats, orientation, what is left out


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(index: Index) -> dict[str, np.ndarray]:
    keys = [row["key"].decode() for shard in range(len(index.names)) for row in index.rows(shard)]
    images = [index.image(shard, n) for shard in range(len(index.names)) for n in range(index.samples[shard])]
    return dict(zip(keys, images, strict=True))


@pytest.mark.parametrize(("extension", "kind"), [("bmp", "BMP"), ("tif", "TIFF"), ("gif", "GIF"), ("ppm", "PPM")])
def test_image_of_another_format_is_stored_as_a_png_of_its_pixels(in_tmp, extension, kind):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    image = Image.open(io.BytesIO(picture(7)))
    data = encoded(image, kind)
    (in_tmp / "train/cat" / f"other.{extension.upper()}").write_bytes(data)
    prepare.run(config)
    index = index_of(config)
    assert np.array_equal(pixels_of(index)["cat/other"], np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    with tarfile.open(Path(index.location, index.names[0])) as tar:
        assert "cat/other.png" in tar.getnames()


def test_image_of_a_wrong_extension_is_stored_by_what_it_is(in_tmp):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    image = Image.open(io.BytesIO(picture(7)))
    for name, kind in (("a.JPEG", "BMP"), ("b.jpeg", "PNG"), ("c.png", "JPEG"), ("d.JPEG", "JPEG")):
        (in_tmp / "train/cat" / name).write_bytes(encoded(image, kind))
    prepare.run(config)
    with tarfile.open(Path(index_of(config).location, "000000.tar")) as tar:
        assert {"cat/a.png", "cat/b.png", "cat/c.jpg", "cat/d.jpg"} <= set(tar.getnames())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photograph_that_a_camera_marked_is_upright(in_tmp, kind, orientation):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    image, exif = Image.open(io.BytesIO(picture(7, width=9, height=5))), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    (in_tmp / "train/cat" / f"lying.{kind.lower()}").write_bytes(data)
    prepare.run(config)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels_of(index_of(config))["cat/lying"], np.array(upright))


def test_photograph_is_left_as_it_is_where_the_mark_is_to_be_ignored(in_tmp):
    config = written(in_tmp, {"cat": 1}, {"cat": 1}, data__exif_orientation=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.open(io.BytesIO(picture(7, width=9, height=5))), "JPEG", exif=exif)
    (in_tmp / "train/cat/lying.jpg").write_bytes(data)
    prepare.run(config)
    assert data in {image for _, image, _ in samples(index_of(config))}


@pytest.mark.parametrize("config", ["imagenet-deit-tiny", "imagenet-deit-small", "imagenet-deit-base"])
def test_published_numbers_ignore_the_mark(config):
    assert not load_config(ROOT / f"configs/{config}.yaml").data.exif_orientation


def test_files_that_are_left_out_are_counted_and_named(in_tmp, capsys):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    for name in ("a.heic", "b.HEIC", "notes.txt", ".DS_Store", "._000.png", "README"):
        (in_tmp / "train/cat" / name).write_bytes(b"")
    (in_tmp / "train/stray.png").write_bytes(picture(1))
    prepare.run(config, dry_run=True)
    said = capsys.readouterr().out
    assert "left out" in said and "2 .heic (cat/" in said and "1 .txt (cat/notes.txt)" in said
    assert "1 without an extension (cat/README)" in said and "stray.png" in said and "DS_Store" not in said


def test_class_of_images_that_cannot_be_read_says_what_they_are(in_tmp):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    (in_tmp / "train/dog").mkdir()
    (in_tmp / "train/dog/a.heic").write_bytes(b"")
    assert "1 .heic (dog/a.heic)" in refusal(config)


def test_image_of_more_pixels_than_allowed_is_refused_before_it_is_decoded(in_tmp, monkeypatch):
    config = written(in_tmp, {"cat": 1}, {"cat": 1}, data__max_pixels=400)
    (in_tmp / "train/cat/big.png").write_bytes(picture(1, width=21, height=20))
    message = refusal(config)
    assert "big.png (21 x 20 pixels: more than 400 (data.max_pixels))" in message


SIXTEEN_BITS = Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10))
REFUSED = {
    "more pixels than allowed.bmp": (encoded(Image.new("RGB", (21, 20)), "BMP"), "21 x 20 pixels: more than 400"),
    "16 bits.tif": (encoded(SIXTEEN_BITS, "TIFF"), "mode I;16: more than 8 bits"),
    "truncated.bmp": (encoded(Image.new("RGB", (19, 20)), "BMP")[:600], "truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_image_that_cannot_be_converted_to_a_png_is_refused_with_the_true_reason(in_tmp, name):
    config = written(in_tmp, {"cat": 1}, {"cat": 1}, data__max_pixels=400)
    data, expected = REFUSED[name]
    (in_tmp / "train/cat" / name).write_bytes(data)
    message = refusal(config)
    assert f"{name} ({expected}" in message or f"{name} (image file is {expected}" in message


def test_progress_is_logged_in_lines_where_the_output_is_kept(in_tmp, capsys):
    config = written(in_tmp)
    prepare.run(config)
    prepare.run(config)
    said = capsys.readouterr().err
    assert "train shards: 3 of 3 shards" in said and "17 of 17 files" in said and "/train: 3 of 3 shards" in said
    assert "\r" not in said and "%|" not in said


# padding and order


def test_padding_is_reported_and_warned_about_with_the_size_to_choose(in_tmp, capsys):
    config = written(in_tmp, {"cat": 8, "dog": 8}, {"cat": 1, "dog": 1}, data__shard_samples=6)
    prepare.run(config, dry_run=True)
    said = capsys.readouterr().out
    assert "groups of 4 samples: 33.33% of the slots in each forward pass are unused" in said and "warning: data.shard_samples=8 would" in said


@pytest.mark.parametrize(
    ("total", "shards", "group", "share"),
    [(1281167, 1001, 64, 0.0001), (1281167, 1024, 64, 0.0225), (65 * 7, 7, 64, 0.4922), (128, 2, 64, 0.0)],
)
def test_padding_is_the_share_of_slots_without_a_sample(total, shards, group, share):
    assert advice.padding(total, shards, group) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(("config", "images"), [("cifar10", 50_000), ("imagenet-deit-base", 1_281_167)])
def test_shards_of_a_configuration_waste_little(config, images):
    loaded = load_config(ROOT / f"configs/{config}.yaml")
    assert advice.padding(images, -(-images // loaded.data.shard_samples), loaded.recipe.group_size) < 0.005


@pytest.mark.parametrize("by_class", [True, False])
def test_shards_that_are_sorted_by_class_are_warned_of(in_tmp, capsys, by_class):
    for split in ("train", "val"):
        for number in range(3):
            lot = [(f"{number}/{i}", "png", picture(9 * number + i), number if by_class else i % 3) for i in range(9)]
            write_shard(in_tmp / "in" / f"{split}-{number:04d}.tar", lot)
    prepare.run(shards_config(in_tmp))
    assert ("sorted by class" in capsys.readouterr().out) == by_class


# bad input


def test_home_is_expanded(in_tmp, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp))
    prepare.run(written(in_tmp, {"cat": 1}, {"cat": 1}, data={"train": "~/train", "val": "~/val"}))


@pytest.mark.parametrize("val", ["train", "train/../train", "link"])
def test_training_images_are_refused_for_validation(in_tmp, val):
    config = written(in_tmp, data__val=str(in_tmp / val))
    (in_tmp / "link").symlink_to(in_tmp / "train")
    assert "data.val" in refusal(config, UsageError)


def test_image_of_both_splits_is_warned_of(in_tmp, capsys):
    config = written(in_tmp)
    shutil.copy(in_tmp / "train/cat/000.png", in_tmp / "val/cat/copy.png")
    prepare.run(config)
    assert "val: warning: 1 of its images are training images too, byte for byte (cat/copy.png)" in (
        capsys.readouterr().out
    )


def test_empty_validation_is_reported_as_such(in_tmp):
    message = refusal(written(in_tmp, data__val=""), UsageError)
    assert "data.val\n" in message and "the key is empty" in message


def test_empty_key_says_which_to_set(in_tmp):
    assert "set data.train" in refusal(small_config(in_tmp, data__train=""), UsageError)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_folder_is_named(in_tmp, split):
    config = written(in_tmp, data={split: str(in_tmp / "nowhere")})
    message = refusal(config, UsageError)
    assert f"data.{split}" in message and str(in_tmp / "nowhere") in message and "no such folder" in message


def test_file_in_the_place_of_a_folder_is_refused(in_tmp):
    (in_tmp / "file").write_text("")
    assert "data.train" in refusal(written(in_tmp, data__train=str(in_tmp / "file")), UsageError)


def test_folder_without_classes_is_named(in_tmp):
    config = written(in_tmp, data__train=str(in_tmp / "flat"))
    (in_tmp / "flat").mkdir()
    (in_tmp / "flat" / "001.png").write_bytes(picture(1))
    message = refusal(config)
    assert f"{in_tmp}/flat: no classes" in message and "one folder of images per class" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_without_images_is_named(in_tmp, split):
    config = written(in_tmp)
    (in_tmp / split / "fox").mkdir()
    (in_tmp / split / "fox" / "notes.txt").write_text("no image")
    assert f"{in_tmp}/{split}/fox: a class without images" in refusal(config)


def test_class_that_only_validation_has_is_named(in_tmp):
    message = refusal(written(in_tmp, {"cat": 1, "dog": 1}, {"cat": 1, "dog": 1, "fox": 1}))
    assert "not in training: ['fox']" in message and str(in_tmp / "val") in message


def test_class_that_validation_lacks_is_named(in_tmp):
    assert "missing: ['eel']" in refusal(written(in_tmp, TRAIN, {"cat": 1, "dog": 1}))


BAD = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda data: b"not an image, and long enough to be one " * 9,
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["000.png", "001.jpg", "002.webp"])
def test_bad_image_stops_preparation_and_is_named(in_tmp, damage, name):
    config = written(in_tmp)
    path = in_tmp / "train" / "dog" / name
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(config)
    assert f"{path} (" in message and "0x" not in message and "at most 0 (data.max_bad)" in message
    assert not index_path(config, "train").exists()


def test_tolerated_bad_images_are_named_in_the_index_and_left_out(in_tmp, capsys):
    config = written(in_tmp, data__max_bad=2)
    for name, damage in (("cat/000.png", BAD["empty"]), ("eel/001.jpg", BAD["truncated"])):
        path = in_tmp / "train" / name
        path.write_bytes(damage(path.read_bytes()))
    prepare.run(config)
    refused = json.loads(index_path(config, "train").read_text())["refused"]
    assert {(bad["key"], bool(bad["reason"])) for bad in refused} == {("cat/000", True), ("eel/001", True)}
    assert len(samples(index_of(config))) == 15
    assert "refused" in (out := capsys.readouterr().out) and "cat/000" in out and "eel/001" in out


def test_one_bad_image_more_than_tolerated_stops_preparation(in_tmp):
    config = written(in_tmp, data__max_bad=1)
    for name in ("cat/000.png", "eel/001.jpg"):
        (in_tmp / "train" / name).write_bytes(b"")
    message = refusal(config)
    assert "found:    2" in message and "cat/000" in message and "eel/001" in message


def test_image_that_vanishes_while_shards_are_written_is_named(in_tmp, monkeypatch):
    config = written(in_tmp)
    listed = splits.list_splits

    def list_then_lose(data):
        listings = listed(data)
        (in_tmp / "train" / "cat" / "000.png").unlink(missing_ok=True)
        return listings

    monkeypatch.setattr(splits, "list_splits", list_then_lose)
    assert str(in_tmp / "train" / "cat" / "000.png") in refusal(config)
    assert not list(in_tmp.rglob("*.partial"))


def test_file_names_that_are_no_utf8_are_prepared(in_tmp):
    config = written(in_tmp, {"cat": 1}, {"cat": 1})
    for i, name in enumerate([b"\xff.png", b"\xfe.png"]):
        (in_tmp / "train" / "cat" / os.fsdecode(name)).write_bytes(picture(i))
    prepare.run(config)
    assert len(index_of(config)) == 3


# shards by other hands


def write_shards(root: Path, counts: list[int], split="train") -> list[tuple[str, bytes, int]]:
    lots = [
        [(f"{n}/{i}", "png", picture(100 * n + i), (n + i) % 3) for i in range(count)]
        for n, count in enumerate(counts)
    ]
    for number, lot in enumerate(lots):
        write_shard(root / f"{split}-{number:04d}.tar", lot)
    return [(key, image, label) for lot in lots for key, _, image, label in lot]


def shards_config(root: Path, train="train-{0000..0002}.tar", val="val-0000.tar", **changes):
    data = {"source": "shards", "train": f"{root}/in/{train}", "val": f"{root}/in/{val}"}
    return small_config(root, data=data | changes)


def test_shards_that_are_there_are_indexed_in_place(in_tmp):
    theirs = write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    before, changed = tree(in_tmp / "in"), times(in_tmp / "in")
    (in_tmp / "in").chmod(0o500)
    try:
        config = shards_config(in_tmp)
        prepare.run(config)
        index = index_of(config)
        assert samples(index) == theirs
        assert index.names == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
        assert index.classes == ["0", "1", "2"]
    finally:
        (in_tmp / "in").chmod(0o700)
    assert (tree(in_tmp / "in"), times(in_tmp / "in")) == (before, changed)


def test_shards_of_relative_paths_are_indexed(in_tmp):
    theirs = write_shards(in_tmp / "in", [3])
    write_shards(in_tmp / "in", [3], "val")
    data = {"source": "shards", "train": "in/train-0000.tar", "val": "in/val-0000.tar"}
    config = small_config(in_tmp, data=data)
    prepare.run(config)
    assert samples(index_of(config)) == theirs


def test_changed_shard_is_noticed_when_preparing_again(in_tmp):
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    config = shards_config(in_tmp)
    prepare.run(config)
    before = index_of(config).fingerprint
    write_shards(in_tmp / "in", [4, 3, 6])
    prepare.run(config)
    assert index_of(config).fingerprint != before


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_key_of_shards_says_which_to_set(in_tmp, split):
    write_shards(in_tmp / "in", [2, 2, 2])
    config = shards_config(in_tmp)
    config = config.model_copy(update={"data": config.data.model_copy(update={split: ""})})
    assert f"set data.{split}" in refusal(config, UsageError)


def test_shard_that_is_missing_is_named(in_tmp):
    write_shards(in_tmp / "in", [2, 2])
    write_shards(in_tmp / "in", [3], "val")
    assert f"{in_tmp}/in/train-0002.tar" in refusal(shards_config(in_tmp))


def test_validation_label_that_training_lacks_is_refused(in_tmp):
    write_shards(in_tmp / "in", [2], "train")
    write_shards(in_tmp / "in", [3], "val")
    message = refusal(shards_config(in_tmp, train="train-0000.tar"))
    assert "a label below 2" in message and "'0/2'" in message


def test_shard_without_a_sample_among_others_is_indexed(in_tmp):
    theirs = write_shards(in_tmp / "in", [3, 0, 2])
    write_shards(in_tmp / "in", [3], "val")
    config = shards_config(in_tmp)
    prepare.run(config)
    assert samples(index_of(config)) == theirs


def test_shards_of_several_folders_are_refused_or_read(in_tmp):
    a, b = write_shards(in_tmp / "in" / "a", [3]), write_shards(in_tmp / "in" / "b", [4])
    write_shards(in_tmp / "in", [3], "val")
    config = shards_config(in_tmp, train="{a,b}/train-0000.tar")
    try:
        prepare.run(config)
    except PipelineError as error:
        assert "in/b" in str(error) or "data.train" in str(error)
    else:
        assert samples(index_of(config)) == a + b


def numbered_alike(root: Path, split: str, numbers: range) -> None:
    """Shards that each number their samples from 0."""
    for number in numbers:
        lot = [(f"{i:06d}", "png", picture(100 * number + i), i) for i in range(3)]
        write_shard(root / f"{split}-{number:04d}.tar", lot)


def test_keys_that_shards_share_become_unique_by_the_shard_s_name(in_tmp, capsys):
    numbered_alike(in_tmp / "in", "train", range(3))
    numbered_alike(in_tmp / "in", "val", range(1))
    config = shards_config(in_tmp)
    prepare.run(config)
    keys = [key for key, *_ in samples(index_of(config))]
    assert keys == [f"train-{number:04d}.tar/{i:06d}" for number in range(3) for i in range(3)]
    assert "train: duplicate key '000000' in train-0000.tar and in train-0001.tar" in capsys.readouterr().out
    assert [key for key, *_ in samples(index_of(config, "val"))] == ["000000", "000001", "000002"]


@pytest.mark.parametrize("quick", [False, True])
def test_a_shard_changed_next_to_others_that_share_its_keys_is_indexed(in_tmp, quick, later):
    numbered_alike(in_tmp / "in", "train", range(3))
    numbered_alike(in_tmp / "in", "val", range(1))
    config = shards_config(in_tmp)
    prepare.run(config, quick=quick)
    write_shards(in_tmp / "in", [2])
    prepare.run(config, quick=quick)
    assert len(samples(index_of(config))) == 8


def test_wildcards_of_shards_are_expanded_in_order(in_tmp):
    theirs = write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    config = shards_config(in_tmp, train="train-*.tar")
    prepare.run(config)
    assert samples(index_of(config)) == theirs


@pytest.mark.parametrize(
    ("train", "expected"),
    [("none-*.tar", "no file that matches"), ("{0..9999999999}.tar", "range of more")],
)
def test_names_of_shards_that_mean_none_or_too_many_are_refused(in_tmp, train, expected):
    assert expected in refusal(shards_config(in_tmp, train=train), UsageError)


def test_training_shard_is_refused_for_validation(in_tmp):
    write_shards(in_tmp / "in", [3])
    assert "train-0000.tar in both" in refusal(
        shards_config(in_tmp, train="train-0000.tar", val="train-0000.tar"), UsageError
    )


def test_shard_that_is_listed_twice_is_refused(in_tmp):
    write_shards(in_tmp / "in", [3])
    write_shards(in_tmp / "in", [3], "val")
    assert "twice: train-0000.tar" in refusal(shards_config(in_tmp, train="train-{0000,0000}.tar"), UsageError)


def test_quick_run_reads_only_the_shard_that_changed(in_tmp, later, monkeypatch):
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    config = shards_config(in_tmp)
    prepare.run(config, quick=True)
    path = in_tmp / "in" / "train-0001.tar"
    write_shard(path, [("new", "png", picture(55), 1)])
    read, index = [], splits.index_shard
    monkeypatch.setattr(splits, "index_shard", lambda *where: read.append(where[1]) or index(*where))
    prepare.run(config, quick=True)
    assert read == ["train-0001.tar"]
    assert [key for key, *_ in samples(index_of(config))][4] == "new"


# keys

letters = st.sampled_from("ab/.-_ é√\n|\"'{}0")
names = st.lists(st.text(letters, min_size=1, max_size=12), min_size=1, max_size=12, unique=True)
property_settings = settings(derandomize=True, deadline=None, max_examples=300)


@property_settings
@given(names)
def test_keys_are_unique_and_of_legal_characters(names):
    keys = sample_keys(names)
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) for key in keys)


@property_settings
@given(st.data())
def test_key_of_a_name_does_not_depend_on_the_order_of_names(data):
    some = data.draw(names)
    order = data.draw(st.permutations(range(len(some))))
    assert sample_keys([some[i] for i in order]) == [sample_keys(some)[i] for i in order]
