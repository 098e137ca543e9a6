"""Weights in and out: damage is told, whatever bit it hit; others' files are read without running code."""

import argparse
import hashlib
import json
import os
import struct

import pytest
import safetensors.torch
import torch
from conftest import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import atomic_write
from pipeline.config.params import resolve
from pipeline.models.build import build
from pipeline.models.weights import (
    load_weights,
    read_external_weights,
    read_saved_weights,
    read_weights,
    save_weights,
    state_dict_hash,
)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, small())
    return path


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(PipelineError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def test_a_flipped_bit_of_our_own_weights_is_told(saved, tmp_path):
    data, path = saved.read_bytes(), tmp_path / "w.safetensors"
    for bit in range(0, 8 * len(data), 11):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            state, _ = read_saved_weights(path)
        except PipelineError:
            continue
        # the header's padding and such: whatever is read is what was written
        assert state_dict_hash(state) == state_dict_hash(small().state_dict())


def test_a_flipped_bit_of_weights_named_by_hand_is_told_where_they_carry_a_digest(saved, tmp_path):
    path = tmp_path / "w.safetensors"
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "damaged weights" in refusal(read_weights, path)


def test_our_own_weights_without_a_digest_are_refused(tmp_path):
    safetensors.torch.save_file(small().state_dict(), tmp_path / "w.safetensors")
    assert "no checksum" in refusal(read_saved_weights, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors")


def test_the_same_weights_are_the_same_bytes(saved, tmp_path):
    for _ in range(5):
        save_weights(tmp_path / "w.safetensors", small())
        assert (tmp_path / "w.safetensors").read_bytes() == saved.read_bytes()


def test_a_released_file_that_is_not_of_the_digest_in_its_name_is_told(tmp_path):
    torch.save({"model": small().state_dict()}, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    good = (tmp_path / "w.pth").rename(tmp_path / f"deit-{digest[:8]}.pth")
    assert read_weights(good)
    bad = good.rename(tmp_path / "deit-01234567.pth")
    assert "damaged weights" in refusal(read_weights, bad)


STATE = small().state_dict()
WRAPPED = {
    "as DeiT trains": {
        "model": STATE, "optimizer": {"state": {}}, "epoch": 3,
        "args": argparse.Namespace(lr=5e-4, model="deit_tiny_patch16_224", resume="", eval=False),
    },
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "in parallel": {f"module.{name}": tensor for name, tensor in STATE.items()},
    "all of it": {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}, "arch": "deit"},
}  # fmt: skip


@pytest.mark.parametrize("content", WRAPPED.values(), ids=list(WRAPPED))
def test_a_training_checkpoint_is_read(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth")
    load_weights(small(), read_weights(tmp_path / "checkpoint.pth"), "trial")
    assert state_dict_hash(read_weights(tmp_path / "checkpoint.pth")) == state_dict_hash(STATE)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content", [{"model": STATE, "args": Evil()}, {"args": argparse.Namespace(x=Evil())}], ids=["beside", "inside"]
)
def test_a_checkpoint_with_code_is_refused_without_running_it_and_without_advice_to_run_it(tmp_path, capsys, content):
    torch.save(content, tmp_path / "checkpoint.pth")
    said = refusal(read_weights, tmp_path / "checkpoint.pth")
    assert "print" in said and "weights_only" not in said and "trust" not in said
    assert "run" not in capsys.readouterr().out


def test_a_full_disk_is_told_with_the_file_s_name(tmp_path):
    path = tmp_path / "w.safetensors"

    def publish():
        with full_disk(limit=128), atomic_write(path) as temporary:
            save_weights(temporary, small())

    said = refusal(publish)
    assert f"{path}: cannot be written" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg"])
@pytest.mark.parametrize("section", ["teacher", "student"])
def test_weights_by_way_of_a_models_arguments_are_refused(section, key):
    with pytest.raises(UsageError, match="use the key `weights` instead"):
        resolve({section: {"kwargs": {key: True}}}, (), "trial.yaml")


@pytest.mark.parametrize("model", ["hf-hub:timm/resnet10t.c3_in1k", "hf_hub:x/y", "local-dir:/tmp", "timm/resnet18"])
def test_a_model_that_would_be_fetched_is_refused(model):
    with pytest.raises(UsageError, match="a model built into timm"):
        resolve({"teacher": {"model": model}}, (), "trial.yaml")


@pytest.mark.parametrize(
    "kwargs", [{"num_heads": 0}, {"num_heads": 7}, {"embed_dim": "x"}, {"depth": -1.5}, {"patch_size": 0}], ids=str
)
def test_arguments_that_a_model_cannot_take_are_refused_with_what_was_found(kwargs):
    section = resolve({"student": {"kwargs": kwargs}}, (), "trial.yaml").student
    with pytest.raises(UsageError) as caught:
        build(section, 5, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = [line for line in str(caught.value).splitlines() if line.strip().startswith("found:")]
    assert found and len(found[0].split(":", 1)[1].strip()) > 5


changes = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(changes, st.integers(0, 3), st.booleans())
def test_a_damaged_file_of_weights_is_read_as_written_or_refused_in_our_words(tmp_path_factory, changes, cut, pickled):
    path = tmp_path_factory.mktemp("fuzz") / ("w.pth" if pickled else "w.safetensors")
    if pickled:
        torch.save({"model": STATE}, path)
    else:
        save_weights(path, small())
    data = bytearray(path.read_bytes())
    for place, byte in changes:
        data[place % len(data)] = byte
    path.write_bytes(data[: len(data) - 40 * cut])
    try:
        state = read_weights(path) if pickled else read_saved_weights(path)[0]
    except PipelineError:
        return
    assert pickled or state_dict_hash(state) == state_dict_hash(STATE)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.dictionaries(st.text(max_size=5), st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]),
    st.sampled_from(["F32", "F64", [2], [2**40], [-1], [0, 8], [0, 2**62], None, 3]))), st.integers(0, 2**63),
)  # fmt: skip
def test_a_header_of_anything_is_refused_in_our_words(tmp_path_factory, header, length):
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length % 2 else length) + text + bytes(8))
    try:
        assert sum(tensor.numel() for tensor in read_weights(path).values()) <= 8
    except PipelineError as error:
        assert str(path) in str(error)


def test_a_foreign_file_that_changed_since_its_first_use_is_told_and_one_that_was_replaced_is_not(tmp_path):
    path, checksums = tmp_path / "theirs.safetensors", tmp_path / "checksums"
    safetensors.torch.save_file(small().state_dict(), path)
    first, stat = state_dict_hash(read_external_weights(path, checksums)), path.stat()
    read_external_weights(path, checksums)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "as at first use" in refusal(read_external_weights, path, checksums)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert state_dict_hash(read_external_weights(path, checksums)) != first
    next(checksums.iterdir()).write_bytes(b"[\xff")
    assert read_external_weights(path, checksums)


def test_a_flipped_bit_in_a_tensor_of_a_pth_file_is_told(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": small().state_dict()}, path)
    data = bytearray(path.read_bytes())
    data[data.index(STATE["0.weight"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in refusal(read_weights, path)


def test_a_file_that_is_no_file_of_weights_is_named_as_such(tmp_path):
    (tmp_path / "params.yaml").write_text("name: digits\n")
    assert "not a file written by torch.save" in refusal(read_weights, tmp_path / "params.yaml")
