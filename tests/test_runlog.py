"""A run's log and its curve: what a crash cuts off is expected, all other damage is told."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import PipelineError
from pipeline.store.manifest import read_summary, write_summary
from pipeline.training.log import Log, read_curve, read_log, write_curve

EPOCHS = (
    {"epoch": 1, "loss": 2.302585, "lr": 1e-3},
    {"epoch": 2, "loss": 1.25, "lr": 5e-4, "val_top1_class": 0.5, "val_top1_mean": 0.5625, "validation": "these"},
)


@pytest.fixture
def log(tmp_path) -> Log:
    log = Log(tmp_path / "log.jsonl")
    for number, epoch in enumerate(EPOCHS):
        log.write("step", 5 * number, loss=2.5, lr=1e-3)
        log.write("epoch", 5 * number + 5, **epoch, speed={"samples_per_s": 3.5})
    return log


@pytest.fixture
def curve(log) -> Path:
    write_curve(log.path.with_name("curve.csv"), log.path, read_log(log.path)[-1])
    return log.path.with_name("curve.csv")


def refusal(call, *arguments) -> str:
    with pytest.raises(PipelineError) as caught:
        call(*arguments)
    return str(caught.value)


def test_a_log_reads_back_as_it_was_written(log):
    lines = read_log(log.path)
    assert [(line["kind"], line["step"]) for line in lines] == [("step", 0), ("epoch", 5), ("step", 5), ("epoch", 10)]
    assert lines[3].pop("time") > 0
    assert lines[3] == {"kind": "epoch", "step": 10, **EPOCHS[1], "speed": {"samples_per_s": 3.5}}


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b"\0" * 300, b"\xff\xfe", b"3", b"[]"])
def test_a_last_line_that_a_crash_cut_short_is_left_out(log, tail):
    expected = read_log(log.path)
    with open(log.path, "ab") as file:
        file.write(tail)
    assert read_log(log.path) == expected
    log.truncate(5)
    assert read_log(log.path) == expected[:2]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[]", b"3", b'"kind"', b"{}", b"", b"[" * 100_000], ids=lambda value: repr(value[:9]))
def test_damage_in_the_middle_of_a_log_is_told_with_its_line(log, damage):
    lines = log.path.read_bytes().split(b"\n")
    lines[1] = damage
    log.path.write_bytes(b"\n".join(lines))
    for call, arguments in ((read_log, (log.path,)), (log.truncate, (5,))):
        assert f"{log.path}: line 2 is damaged" in refusal(call, *arguments)


def test_a_flipped_bit_of_a_log_is_told_or_changes_nothing(log):
    data, expected = log.path.read_bytes(), read_log(log.path)
    for bit in range(0, 8 * (len(data) - 1), 13):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        log.path.write_bytes(flipped)
        with contextlib.suppress(PipelineError):
            assert read_log(log.path) == expected


def test_a_curve_has_the_last_epoch_though_the_log_lost_it(log, curve):
    whole, last = read_curve(curve), read_log(log.path)[-1]
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:3]))
    write_curve(curve, log.path, last)
    assert read_curve(curve) == whole


def test_a_curve_leaves_out_what_was_validated_on_other_images(log, curve):
    log.write("epoch", 15, epoch=3, loss=1.0, lr=0.1, val_top1_class=0.75, validation="others")
    write_curve(curve, log.path, {"epoch": 4, "loss": 0.5, "lr": 0.1, "val_top1_class": 0.875, "validation": "these"})
    assert [row["val_top1_class"] for row in read_curve(curve)] == ["", "0.5", "", "0.875"]


def test_a_log_is_on_the_disk_before_the_checkpoint_that_goes_on_from_it(log, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    log.sync()
    assert synced == [str(log.path)]


def test_a_curve_reads_back_as_the_epochs_that_were_logged(curve):
    first, second = read_curve(curve)
    assert first == {"epoch": "1", "loss": "2.302585", "lr": "0.001", "val_top1_class": "", "val_top1_mean": ""}
    assert float(second["val_top1_mean"]) == 0.5625


def test_a_curve_of_what_was_not_trained_here_has_no_epochs(tmp_path):
    write_curve(tmp_path / "curve.csv")
    assert read_curve(tmp_path / "curve.csv") == []


def test_a_flipped_bit_of_a_curve_is_told(curve):
    data, expected = curve.read_bytes(), read_curve(curve)
    for bit in range(0, 8 * len(data), 13):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        curve.write_bytes(flipped)
        try:
            assert read_curve(curve) == expected  # a line's end may be another
        except PipelineError as error:
            assert f"{curve}: the curve is damaged" in str(error)


def test_a_curve_cut_anywhere_is_told(curve):
    data = curve.read_bytes()
    for length in range(0, len(data) - 2, 5):
        curve.write_bytes(data[:length])
        refusal(read_curve, curve)


@pytest.mark.parametrize("rows", [[0, 2, 1], [0, 2], [0, 1], [0, 1, 1, 2], [0]])
def test_a_curve_whose_rows_are_others_is_told(curve, rows):
    lines = curve.read_bytes().splitlines(keepends=True)
    curve.write_bytes(b"".join(lines[row] for row in rows))
    refusal(read_curve, curve)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.binary(max_size=60))
def test_files_of_anything_are_read_as_nothing_or_refused_in_our_words(tmp_path_factory, data, more):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(data + b"\n" + more)
    for read in (read_log, read_curve, read_summary):
        try:
            assert not read(path)
        except PipelineError as error:
            assert str(path) in str(error)


SUMMARY = {"rows": 16, "views": 8, "kind": "dense", "bytes": 12345, "agreement_with_labels": 0.75}


def test_a_flipped_bit_of_a_summary_is_told_or_changes_nothing(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)
    data = path.read_bytes()
    assert read_summary(path) == SUMMARY
    for bit in range(0, 8 * len(data), 13):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert read_summary(path) == SUMMARY
        except PipelineError as error:
            assert "run: pipeline teacher-logits" in str(error)


@pytest.mark.parametrize(("folder", "command"), [
    ("teacher-logits", "run: pipeline teacher-logits"),
    ("teacher-logits-finetune", "run: pipeline teacher-logits --for finetune"),
])  # fmt: skip
def test_a_missing_manifest_or_summary_names_the_command_that_makes_it(tmp_path, folder, command):
    from pipeline.store.manifest import read_manifest

    for read in (read_manifest, read_summary):
        assert refusal(read, tmp_path / folder / "file.json").endswith(command)
