"""Checkpoints: whole or not there, the last two, of this run only."""

import os
import shutil
import threading

import pytest
import torch
from conftest import full_disk

from pipeline.common.errors import PipelineError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import KEEP_LAST, CheckpointFile, newest, save

CPU = torch.device("cpu")
RUN = {"student": {"lr": 0.5, "model": "one"}, "index": "f" * 32}


def state(seed=0) -> dict:
    """What a run saves: weights, an optimizer that has moved, plain values."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    weights = {"w": parameter.detach().clone(), "half": torch.randn(3, generator=generator).bfloat16()}
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plain = {"best": 0.5, "history": [1, (2, "text"), None]}
    return {"model": weights, "optimizer": optimizer.state_dict(), **plain}


def load(folder, identity, device) -> dict | None:
    """The newest, as a run does that goes on."""
    found = newest(folder)
    return found and checkpoint.load(folder, identity, device, found)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(call, *arguments) -> str:
    with pytest.raises(PipelineError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 7 and 12."""
    save(tmp_path, 7, RUN, state(7))
    save(tmp_path, 12, RUN, state(12))
    return tmp_path


def test_state_is_loaded_as_it_was_saved(tmp_path):
    save(tmp_path / "new", 3, RUN, state())
    assert same(load(tmp_path / "new", RUN, CPU), {"step": 3, **state()})


@pytest.mark.parametrize("make", [True, False])
def test_without_a_checkpoint_there_is_no_state(tmp_path, make):
    folder = tmp_path / "run"
    if make:
        folder.mkdir()
    assert load(folder, RUN, CPU) is None


def test_newest_is_loaded(saved):
    assert load(saved, RUN, CPU)["step"] == 12


def test_newest_is_that_of_the_largest_step(saved):
    for step in (100, 99, 2_000_000):
        save(saved, step, RUN, state())
        assert load(saved, RUN, CPU)["step"] == max(100, step)


def test_the_one_that_rank_0_found_is_loaded_though_a_newer_one_is_there(tmp_path):
    save(tmp_path, 7, RUN, state(7))
    found = newest(tmp_path)
    save(tmp_path, 12, RUN, state(12))
    assert same(checkpoint.load(tmp_path, RUN, CPU, found)["model"], state(7)["model"])


def test_one_that_a_network_file_system_shows_late_is_waited_for(tmp_path):
    save(tmp_path / "there", 7, RUN, state(7))
    found = newest(tmp_path / "there")
    save(tmp_path, 7, RUN, state(6))  # of the same name, from before
    late = threading.Timer(0.2, shutil.copy, (tmp_path / "there" / found.name, tmp_path))
    late.start()
    assert same(checkpoint.load(tmp_path, RUN, CPU, found)["model"], state(7)["model"])


def test_one_that_rank_0_alone_sees_is_told(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "WAIT_SECONDS", 0.0)
    for name in ("step-000000012.ckpt", "step-000000013.ckpt"):
        message = refusal(checkpoint.load, saved, RUN, CPU, CheckpointFile(name, "00" * 32))
        assert f"{saved / name}: not the checkpoint that rank 0 resumes from" in message


def test_last_two_are_kept(tmp_path):
    for step in (5, 10, 20, 40):
        save(tmp_path, step, RUN, state(step))
        steps = [s for s in (5, 10, 20, 40) if s <= step][-KEEP_LAST:]
        assert sorted(files(tmp_path)) == [f"step-{s:09d}.ckpt" for s in steps]
    assert KEEP_LAST == 2


def test_same_step_is_replaced(saved):
    save(saved, 12, RUN, state(99))
    assert same(load(saved, RUN, CPU)["model"], state(99)["model"])
    assert len(files(saved)) == 2


def test_any_flipped_bit_is_found(saved):
    path = saved / "step-000000012.ckpt"
    whole = path.read_bytes()
    for place in [*range(40), *range(40, len(whole), 37)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        message = refusal(load, saved, RUN, CPU)
        assert f"{path}: damaged checkpoint" in message and "delete it" in message


def test_cut_or_longer_file_is_found(saved):
    path = saved / "step-000000012.ckpt"
    whole = path.read_bytes()
    for length in [0, 1, 31, 32, 33, *range(40, len(whole), 101), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(load, saved, RUN, CPU)
    path.write_bytes(whole + b"\0")
    assert str(path) in refusal(load, saved, RUN, CPU)


def test_deleting_a_damaged_one_goes_on_from_the_one_before(saved):
    (saved / "step-000000012.ckpt").write_bytes(b"damaged")
    refusal(load, saved, RUN, CPU)
    (saved / "step-000000012.ckpt").unlink()
    assert load(saved, RUN, CPU)["step"] == 7


def test_checkpoint_of_another_run_is_refused_with_what_differs(saved):
    message = refusal(load, saved, RUN | {"student": {"lr": 0.25, "model": "one"}}, CPU)
    assert "step-000000012.ckpt" in message and "student.lr: 0.5, 0.25" in message and "model" not in message


def test_whole_checkpoint_under_the_name_of_another_step_tells_its_own(saved):
    shutil.copyfile(saved / "step-000000007.ckpt", saved / "step-000000099.ckpt")
    assert load(saved, RUN, CPU)["step"] == 7


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    save(tmp_path, 1, RUN, {"model": Bomb()})
    with pytest.raises(Exception, match="(?i)weights"):
        load(tmp_path, RUN, CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_saving_is_interrupted(saved, error, monkeypatch):
    def interrupted(content, file):
        file.write(b"half")
        raise error

    before = files(saved)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(error):
        save(saved, 20, RUN, state())
    assert files(saved) == before


def test_nothing_is_left_when_the_process_stops_before_the_name_is_given(saved, monkeypatch):
    def interrupted(descriptor):
        assert len(files(saved)) == 3  # something is written by now
        raise KeyboardInterrupt

    before = files(saved)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(saved, 20, RUN, state())
    assert files(saved) == before


def test_half_written_file_of_a_killed_process_is_passed_over(saved):
    (saved / ".step-000000020.ckpt.123.partial").write_bytes(b"half")
    (saved / "step-000000020.ckpt.tmp").write_bytes(b"half")
    assert load(saved, RUN, CPU)["step"] == 12


def test_full_disk_is_told_plainly_and_leaves_the_old_ones(saved):
    before = files(saved)
    with full_disk(1000):
        message = refusal(save, saved, 20, RUN, state())
    assert "step-000000020.ckpt: cannot be written" in message
    assert files(saved) == before
