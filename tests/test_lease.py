"""One writer per part: a second one is refused while the holder lives and succeeds it when it is dead."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

import pipeline.common.lease
import pipeline.common.lock
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.lease import LEASE_SECONDS, lease, part_lease, part_lease_path, possibly_held
from pipeline.common.lock import is_held, kernel_lock

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(pipeline.common.lease, "POLL_SECONDS", 0.02)


def test_second_holder_is_refused_with_the_first_named(tmp_path):
    with lease(str(tmp_path / "new" / "a.lock"), "part 0 of 1"):
        with pytest.raises(UsageError) as caught, lease(str(tmp_path / "new" / "a.lock"), "part 0 of 1"):
            pass
    message = str(caught.value)
    assert f"process {os.getpid()} on " in message and "part 0 of 1" in message and "a.lock" in message


def test_lock_is_free_after_its_block(tmp_path):
    for _ in range(2):
        with lease(str(tmp_path / "a.lock"), "work"):
            assert json.loads((tmp_path / "a.lock").read_text())["process"] == os.getpid()


def test_lock_is_free_after_its_block_raised(tmp_path):
    with pytest.raises(ValueError), lease(str(tmp_path / "a.lock"), "work"):
        raise ValueError
    with lease(str(tmp_path / "a.lock"), "work"):
        pass


def test_parts_have_locks_of_their_own(tmp_path):
    with lease(str(tmp_path / "a.lock"), "work"), lease(str(tmp_path / "b.lock"), "work"):
        pass


@pytest.mark.parametrize(("first", "second"), [((0, 4), (0, 1)), ((0, 1), (0, 4)), ((1, 2), (0, 3))])
def test_a_store_is_written_in_one_number_of_parts_at_a_time(first, second, tmp_path):
    store = str(tmp_path / "a.zarr")
    with part_lease(store, *first, "work"):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), part_lease(store, *second, "work"):
            pass
    with part_lease(store, *second, "work"):
        pass


def test_parts_of_one_number_are_written_together(tmp_path):
    with part_lease(str(tmp_path / "a.zarr"), 0, 2, "work"), part_lease(str(tmp_path / "a.zarr"), 1, 2, "work"):
        pass


def test_another_machine_s_part_of_another_division_is_waited_for(tmp_path, monkeypatch):
    store, other = str(tmp_path / "a.zarr"), tmp_path / "a.zarr.part-1-of-4.lock"
    with another_machine(other, renews=True), pytest.raises(UsageError, match="process 7 on another"):
        with part_lease(store, 0, 1, "work"):
            pass
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 0.2)
    held_elsewhere(other, age=0)
    with part_lease(store, 0, 1, "work"):
        pass


def test_a_lock_is_possibly_held_unless_it_is_known_to_be_free(tmp_path):
    store, other = str(tmp_path / "a.zarr"), tmp_path / "a.zarr.part-1-of-2.lock"
    with lease(part_lease_path(store, 0, 2), "work"):
        assert possibly_held(store) == {part_lease_path(store, 0, 2)}
    assert not possibly_held(store)
    held_elsewhere(other, age=1e6)
    os.utime(other, (0, 0))
    assert possibly_held(store) == {str(other)}


@pytest.mark.parametrize("forked", [False, True])
def test_lock_of_a_killed_process_is_free(forked, tmp_path):
    """Even if a forked child is still alive, as a loader's workers are for some seconds."""
    code = f"""
import os, sys, time
from pipeline.common.lease import lease
with lease({str(tmp_path / "a.lock")!r}, "work"):
    if {forked} and os.fork() == 0:
        os.close(1)
        sys.exit(sys.stdin.read())
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # the child ends when its input does
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            who = f"process {holder.pid} on "
            with pytest.raises(UsageError, match=who), lease(str(tmp_path / "a.lock"), "work"):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
        while holder.poll() is None:
            time.sleep(0.01)
        with lease(str(tmp_path / "a.lock"), "work"):
            pass


def test_on_a_file_system_without_locks_leases_alone_count(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pipeline.common.lock.fcntl, "flock", refuse)
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 3.0)
    with lease(str(tmp_path / "a.lock"), "work"):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), lease(str(tmp_path / "a.lock"), "work"):
            pass


def held_elsewhere(path: Path, age: float) -> None:
    path.write_text(json.dumps({"host": "another", "process": 7, "token": "x", "renewed": time.time() - age}))


@contextlib.contextmanager
def another_machine(path: Path, renews: bool):
    """Another machine holds the lease; it renews it or is dead."""
    held_elsewhere(path, age=0)
    ended = threading.Event()

    def renewing():
        while not ended.wait(0.05):
            held_elsewhere(path, age=0)

    thread = threading.Thread(target=renewing)
    if renews:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if renews:
            thread.join()


def test_a_lease_that_another_machine_renews_is_respected(tmp_path):
    with another_machine(tmp_path / "a.lock", renews=True):
        with pytest.raises(UsageError, match="process 7 on another holds it, renewed 0 s ago"), lease(
            str(tmp_path / "a.lock"), "work"
        ):
            pass


def test_a_fresh_lease_of_a_dead_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 1.0)
    with another_machine(tmp_path / "a.lock", renews=False), lease(str(tmp_path / "a.lock"), "work"):
        assert json.loads((tmp_path / "a.lock").read_text())["process"] == os.getpid()
    assert "work: process 7 on another may still be running; waiting at most 1 s" in capsys.readouterr().out


def test_a_lease_that_another_machine_gives_back_meanwhile_is_taken(tmp_path, monkeypatch):
    held_elsewhere(tmp_path / "a.lock", age=0)
    monkeypatch.setattr(pipeline.common.lease.time, "sleep", lambda _: (tmp_path / "a.lock").unlink(missing_ok=True))
    with lease(str(tmp_path / "a.lock"), "work"):
        pass


def test_sigterm_gives_the_lease_back(tmp_path):
    code = f"""
import time
from pipeline.common.lease import lease
with lease({str(tmp_path / "a.lock")!r}, "work"):
    print("held", flush=True)
    time.sleep(60)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.terminate()
        _, said = holder.communicate(timeout=60)
    assert holder.returncode == 143 and said.startswith("ended by SIGTERM")
    assert not (tmp_path / "a.lock").exists()


def test_a_lease_that_was_not_renewed_is_dead(tmp_path):
    held_elsewhere(tmp_path / "a.lock", age=LEASE_SECONDS + 1)
    with lease(str(tmp_path / "a.lock"), "work"):
        assert json.loads((tmp_path / "a.lock").read_text())["process"] == os.getpid()


def test_another_machine_s_lease_is_broken_on_demand(tmp_path):
    held_elsewhere(tmp_path / "a.lock", age=10)
    with lease(str(tmp_path / "a.lock"), "work", break_lock=True):
        pass


def test_breaking_does_not_break_a_living_process_of_this_machine(tmp_path):
    with lease(str(tmp_path / "a.lock"), "work"):
        with pytest.raises(UsageError), lease(str(tmp_path / "a.lock"), "work", break_lock=True):
            pass


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"host": 1}', b"\xff"])
def test_a_torn_lease_holds_nothing(torn, tmp_path):
    (tmp_path / "a.lock").write_bytes(torn)
    with lease(str(tmp_path / "a.lock"), "work"):
        pass


def test_a_held_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 0.1)
    with lease(str(tmp_path / "a.lock"), "work"):
        first = json.loads((tmp_path / "a.lock").read_text())["renewed"]
        for _ in range(200):
            time.sleep(0.02)
            if json.loads((tmp_path / "a.lock").read_text())["renewed"] > first:
                return
    pytest.fail("never renewed")


def test_a_lease_that_another_machine_broke_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 1.0)
    with lease(str(tmp_path / "a.lock"), "work"):
        held_elsewhere(tmp_path / "a.lock", age=0)
        taken = (tmp_path / "a.lock").read_bytes()
        time.sleep(0.5)
    assert (tmp_path / "a.lock").read_bytes() == taken


def test_a_lease_at_a_url_refuses_a_second_holder(monkeypatch):
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 3.0)
    with lease("memory://locks/a.lock", "work"):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), lease("memory://locks/a.lock", "work"):
            pass
    assert not fsspec.filesystem("memory").exists("/locks/a.lock")


def test_a_lease_at_a_url_of_a_dead_process_of_this_machine_is_free(monkeypatch):
    monkeypatch.setattr(pipeline.common.lease.time, "sleep", lambda _: None)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    holder = {"host": os.uname().nodename, "process": process.pid, "token": "x", "renewed": time.time()}
    fsspec.filesystem("memory").pipe_file("/locks/b.lock", json.dumps(holder).encode())
    with lease("memory://locks/b.lock", "work"):
        pass


def test_a_lease_of_a_dead_container_of_the_same_name_and_number_is_taken_when_it_is_over(monkeypatch):
    monkeypatch.setattr(pipeline.common.lease, "LEASE_SECONDS", 1.0)
    holder = {"host": os.uname().nodename, "process": os.getpid(), "token": "x", "renewed": time.time()}
    fsspec.filesystem("memory").pipe_file("/locks/c.lock", json.dumps(holder).encode())
    with lease("memory://locks/c.lock", "work"):
        assert json.loads(fsspec.filesystem("memory").cat_file("/locks/c.lock"))["token"] != "x"


def test_a_place_that_cannot_be_written_is_an_error_without_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be written"), lease(str(tmp_path / "file" / "a.lock"), "work"):
        pass


def test_a_waiter_whose_lock_file_is_deleted_gets_the_one_that_replaces_it(tmp_path):
    path, got = tmp_path / "state" / "running", threading.Event()
    with kernel_lock(path):

        def wait():
            with kernel_lock(path, "waits"):
                assert is_held(path)
                got.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        path.unlink()
        path.parent.rmdir()
    waiting.join(10)
    assert got.is_set()


def test_a_damaged_lock_file_leaves_unknown_whether_it_is_held(tmp_path):
    (tmp_path / "lock").write_bytes(b"\xf6\x00host")
    assert is_held(tmp_path / "lock") is None
